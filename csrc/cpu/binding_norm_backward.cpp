#include <pybind11/pybind11.h>

#include "cpu/norm_backward.h"

namespace py = pybind11;
using Address = uintptr_t;

void bind_norm_backward(py::module_& m) {
  m.def(
      "norm_backward",
      [](Address x, Address dy, Address dx, Address gamma, Address beta, Address dgamma, Address dbeta, int64_t samples,
         int64_t channels, int64_t pixels, int64_t groups, float eps, int dtype, int activation) {
        sgm::norm_backward({(const void*)x, (const void*)dy, (void*)dx, (const float*)gamma, (const float*)beta,
                            (float*)dgamma, (float*)dbeta, samples, channels, pixels, groups, eps,
                            static_cast<sgm::Dtype>(dtype), static_cast<sgm::Activation>(activation)});
      },
      py::call_guard<py::gil_scoped_release>(), "csrc/cpu/norm_backward.h; dtype and activation as for norm.", py::arg("x"),
      py::arg("dy"), py::arg("dx"), py::arg("gamma"), py::arg("beta"), py::arg("dgamma"), py::arg("dbeta"),
      py::arg("samples"), py::arg("channels"), py::arg("pixels"), py::arg("groups"), py::arg("eps"), py::arg("dtype"),
      py::arg("activation"));
}
