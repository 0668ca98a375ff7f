// The Python module sgm_engine._C: raw functions on data pointers. They check nothing (kernels/ops.py does) and release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/digest.h"
#include "cpu/norm.h"
#include "cpu/peak.h"
#include "cpu/pool.h"
#include "isa.h"
#include "update.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // data_ptr(); 0 for an absent tensor

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

void noise_fill(Address out, bool nhwc, int64_t batch, int64_t channels, int64_t pixels, Address seed, Address sample_id,
                uint32_t draw, uint32_t stream, int kind) {
  sgm::noise_fill({{batch, channels, pixels}, at<float>(out), nhwc, at<int64_t>(seed), at<int64_t>(sample_id), draw, stream,
                   static_cast<sgm::Kind>(kind)});
}

void langevin_update(Address x, bool x_nhwc, Address score, bool score_nhwc, int score_dtype, Address previous, bool previous_nhwc,
                     Address out, bool out_nhwc, int64_t batch, int64_t channels, int64_t pixels, Address coef, Address draw,
                     int64_t rows, Address row, Address stop, Address seed, Address sample_id, Address bad_row, bool advance,
                     Address keep, Address gain, Address known, Address known_sigma, Address known_draw) {
  sgm::langevin_update({{batch, channels, pixels}, at<float>(x), x_nhwc, at<void>(score), score_nhwc,
                        static_cast<sgm::Dtype>(score_dtype), at<float>(previous), previous_nhwc, at<float>(out), out_nhwc,
                        at<float>(coef), at<int32_t>(draw), rows, at<int64_t>(row), at<int64_t>(stop), at<int64_t>(seed),
                        at<int64_t>(sample_id), at<int64_t>(bad_row), at<float>(keep), at<float>(gain), at<float>(known),
                        at<float>(known_sigma), at<int32_t>(known_draw)});
  if (advance) sgm::advance_rows(batch, at<int64_t>(row), at<int64_t>(stop));
}

void norm(Address x, Address residual, Address y, Address total, Address gamma, Address alpha, Address beta, int64_t gamma_stride,
          int64_t alpha_stride, int64_t beta_stride, Address level, Address workspace, int64_t samples, int64_t channels,
          int64_t pixels, float eps, int dtype, int activation, bool channels_last, int64_t groups) {
  sgm::norm({at<void>(x), at<void>(residual), at<void>(y), at<void>(total), at<float>(gamma), at<float>(alpha), at<float>(beta),
             gamma_stride, alpha_stride, beta_stride, at<int64_t>(level), at<float>(workspace), samples, channels, pixels, eps,
             static_cast<sgm::Dtype>(dtype), static_cast<sgm::Activation>(activation), channels_last, groups});
}

void philox(Address counter, Address key, Address words, int64_t n) {
  SGM_PICK(philox_range)(at<uint32_t>(counter), at<uint32_t>(key), at<uint32_t>(words), n);
}

}  // namespace

// A part with a large interface has its own csrc/<part>/binding_<part>.cpp: declare its function here, call it below.
void bind_executor(py::module_& m);       // csrc/cpu/executor/binding_executor.cpp
void bind_norm_backward(py::module_& m);  // csrc/cpu/binding_norm_backward.cpp

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

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("multiply_adds", [](bool bf16, int64_t rounds) { return SGM_PICK(multiply_adds)(bf16, rounds); }, nogil,
        "csrc/cpu/peak.h: operations that `rounds` rounds of multiply-adds on registers were, for bench/.", py::arg("bf16"),
        py::arg("rounds"));
  m.def("noise_fill", &noise_fill, nogil, "csrc/update.h, NoiseFill. kind: 0 normal, 1 uniform.", py::arg("out"), py::arg("nhwc"),
        py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("seed"), py::arg("sample_id"), py::arg("draw"),
        py::arg("stream"), py::arg("kind"));
  m.def("langevin_update", &langevin_update, nogil, "csrc/update.h, Update. score_dtype: 0 float32, 1 bfloat16, 2 float16.",
        py::arg("x"), py::arg("x_nhwc"), py::arg("score"), py::arg("score_nhwc"), py::arg("score_dtype"), py::arg("previous"),
        py::arg("previous_nhwc"), py::arg("out"), py::arg("out_nhwc"), py::arg("batch"), py::arg("channels"), py::arg("pixels"),
        py::arg("coef"), py::arg("draw"), py::arg("rows"), py::arg("row"), py::arg("stop"), py::arg("seed"), py::arg("sample_id"),
        py::arg("bad_row"), py::arg("advance"), py::arg("keep") = 0, py::arg("gain") = 0, py::arg("known") = 0,
        py::arg("known_sigma") = 0, py::arg("known_draw") = 0);
  m.def("norm", &norm, nogil, "csrc/cpu/norm.h, Norm. dtype: 0 float32, 1 bfloat16, 2 float16; activation: 0 none, 1 elu, 2 relu, 3 silu.",
        py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("total"), py::arg("gamma"), py::arg("alpha"), py::arg("beta"),
        py::arg("gamma_stride"), py::arg("alpha_stride"), py::arg("beta_stride"), py::arg("level"), py::arg("workspace"),
        py::arg("samples"), py::arg("channels"), py::arg("pixels"), py::arg("eps"), py::arg("dtype"), py::arg("activation"),
        py::arg("channels_last"), py::arg("groups") = 0);
  m.def("norm_workspace_size", [](int64_t samples, int64_t channels) { return samples * sgm::Norm::workspace_size(channels); },
        "float32 elements that norm's workspace has.", py::arg("samples"), py::arg("channels"));
  m.def("philox", &philox, nogil, "uint32 counters [4, n] and keys [2, n] to words [4, n].", py::arg("counter"), py::arg("key"),
        py::arg("words"), py::arg("n"));

  m.def("digest", [](const std::vector<std::pair<Address, int64_t>>& memory) {
    std::vector<sgm::Bytes> bytes;
    for (const auto& [address, size] : memory) bytes.push_back({at<void>(address), size});
    std::vector<uint64_t> found(bytes.size());
    py::gil_scoped_release no_gil;
    sgm::digest(bytes.data(), static_cast<int64_t>(bytes.size()), found.data());
    return found;
  }, "csrc/cpu/digest.h: 64 bits for each (address, bytes).", py::arg("memory"));

  bind_executor(m);
  bind_norm_backward(m);
}
