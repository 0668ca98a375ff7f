// The Python module sgm_engine._C: raw functions on data pointers. They check nothing (kernels/ops.py does) and release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/pool.h"
#include "isa.h"

namespace py = pybind11;

// A part with a large interface has its own csrc/<part>/binding_<part>.cpp: declare its function here, call it below.

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sgm-engine on raw pointers; sgm_engine.kernels.ops checks and calls them.";

  m.def("isa", [] { return std::string(sgm::name(sgm::isa())); }, "The instruction set in use: $SGM_ISA, else the best this CPU has.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < sgm::kIsas; ++i)
      if (sgm::supported(static_cast<sgm::Isa>(i))) names.emplace_back(sgm::name(static_cast<sgm::Isa>(i)));
    return names;
  }, "The instruction sets this build and this CPU have, weakest first.");
  m.def("set_isa", [](const std::string& isa) { sgm::set_isa(isa.c_str()); }, "Use another instruction set (for tests).", py::arg("isa"));
  m.def("num_threads", &sgm::num_threads, "Threads of the pool: $SGM_NUM_THREADS, else the CPUs this process may use.");
  m.def("set_num_threads", &sgm::set_num_threads, "Resize the pool.", py::arg("n"), py::call_guard<py::gil_scoped_release>());
}
