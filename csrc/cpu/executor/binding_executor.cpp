// sgm_engine._C.NativeExecutor: the builder and runner of csrc/cpu/executor; sgm_engine/executors/native/executor.py checks and calls it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>

#include "cpu/executor/executor.h"

namespace py = pybind11;
using namespace sgm::executor;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Given = std::pair<uintptr_t, int64_t>;  // address and number of floats

Executor::Array array(Given given) { return {pointer<const float>(given.first), given.second}; }

}  // namespace

void bind_executor(py::module_& m) {
  // Every method: one that waited for the executor with the GIL held would wait for a run that asks for the GIL (signals).
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::enum_<Precision>(m, "Precision", py::module_local())
      .value("float32", Precision::float32)
      .value("bfloat16", Precision::bfloat16)
      .value("direct", Precision::direct)
      .value("winograd", Precision::winograd);
  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("none", Activation::none)
      .value("elu", Activation::elu)
      .value("relu", Activation::relu)
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("tanh", Activation::tanh)
      .value("sigmoid", Activation::sigmoid)
      .value("leaky_relu", Activation::leaky_relu)
      .value("clip", Activation::clip);
  py::enum_<Border>(m, "Border", py::module_local())
      .value("zeros", Border::zeros)
      .value("reflect", Border::reflect)
      .value("replicate", Border::replicate)
      .value("circular", Border::circular);
  py::enum_<Op>(m, "Op", py::module_local())
      .value("load", Op::load)
      .value("conv", Op::conv)
      .value("activate", Op::activate)
      .value("mean_pool", Op::mean_pool)
      .value("mean_pool5", Op::mean_pool5)
      .value("max_pool5", Op::max_pool5)
      .value("upsample", Op::upsample)
      .value("nearest", Op::nearest)
      .value("concat", Op::concat)
      .value("store", Op::store)
      .value("embed", Op::embed)
      .value("attention", Op::attention)
      .value("slope", Op::slope)
      .value("norm_backward", Op::norm_backward)
      .value("attention_backward", Op::attention_backward)
      .value("spread", Op::spread)
      .value("block_sum", Op::block_sum)
      .value("slice", Op::slice)
      .value("store_gradient", Op::store_gradient)
      .value("linear_attention", Op::linear_attention)
      .value("channel_norm", Op::channel_norm)
      .value("noise_features", Op::noise_features)
      .value("waves", Op::waves)
      .value("potential", Op::potential)
      .value("store_potential", Op::store_potential)
      .value("constant", Op::constant)
      .value("reshape", Op::reshape)
      .value("affine_backward", Op::affine_backward)
      .value("film_backward", Op::film_backward);
  py::class_<Executor>(m, "NativeExecutor", py::module_local(), "A whole network in one native call (csrc/cpu/executor/executor.h).")
      .def(py::init<int, Precision>(), py::arg("batch"), py::arg("precision"))
      .def("tensor", &Executor::tensor, py::arg("channels"), py::arg("height"), py::arg("width"), nogil)
      .def("norm", [](Executor& e, int channels, int groups, int levels, bool has_alpha, double eps, bool by_pixel, bool centred, double floor,
                      double after, int source) {
        return e.norm({channels, groups, levels, has_alpha, eps, by_pixel, centred, floor, after, source});
      }, py::arg("channels"), py::arg("groups"), py::arg("levels"), py::arg("has_alpha"), py::arg("eps"), py::arg("by_pixel") = false,
           py::arg("centred") = true, py::arg("floor") = 0., py::arg("after") = 0., py::arg("source") = -1, nogil)
      .def("conv", [](Executor& e, int c_in, int c_out, int kernel, int dilation, int stride, int up, int groups, std::array<int, 4> padding,
                      Border border, bool pool, int levels) {
        return e.conv({c_in, c_out, kernel, dilation, stride, up, groups, {padding[0], padding[1], padding[2], padding[3]}, border, pool, levels});
      }, py::arg("c_in"), py::arg("c_out"), py::arg("kernel"), py::arg("dilation"), py::arg("stride"), py::arg("up"), py::arg("groups"),
           py::arg("padding"), py::arg("border"), py::arg("pool"), py::arg("levels"), nogil)
      .def("heads", &Executor::heads, py::arg("count"), py::arg("size"), py::arg("scale"), py::arg("memory"), nogil)
      .def("layer", [](Executor& e, Op op, int input, int second, int output, const std::vector<Addend>& add, int norm, int conv, int heads,
                       Activation activation, double slope, double scale, double shift, int first) {
        e.layer(op, input, second, output, add, {norm, conv, heads, activation, slope, scale, shift, first});
      }, py::arg("op"), py::arg("input"), py::arg("second"), py::arg("output"), py::arg("add"), py::arg("norm"), py::arg("conv"),
           py::arg("heads"), py::arg("activation"), py::arg("slope"), py::arg("scale"), py::arg("shift"), py::arg("first"), nogil)
      .def("embedding", &Executor::embedding, py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("patch"), py::arg("octaves"), nogil)
      .def("potential", &Executor::potential, py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("classes"), py::arg("waves"),
           py::arg("potentials"), nogil)
      .def("constant", &Executor::constant, py::arg("channels"), py::arg("height"), py::arg("width"), nogil)
      .def("plan", &Executor::plan, nogil)
      .def("set_conv", [](Executor& e, int conv, Given weight, Given bias) {
        e.set_conv(conv, array(weight), array(bias));
      }, py::arg("conv"), py::arg("weight"), py::arg("bias"), nogil)
      .def("set_norm", [](Executor& e, int norm, Given table) { e.set_norm(norm, array(table)); }, py::arg("norm"), py::arg("table"), nogil)
      .def("set_heads", [](Executor& e, int heads, Given tokens) { e.set_heads(heads, array(tokens)); }, py::arg("heads"), py::arg("tokens"), nogil)
      .def("set_sigmas", [](Executor& e, Given sigmas) { e.set_sigmas(array(sigmas)); }, py::arg("sigmas"), nogil)
      .def("set_embedding", [](Executor& e, Given table) { e.set_embedding(pointer<const double>(table.first), table.second); },
           py::arg("table"), nogil)
      .def("set_potential", [](Executor& e, Given table) { e.set_potential(pointer<const double>(table.first), table.second); },
           py::arg("table"), nogil)
      .def("set_constant", [](Executor& e, int constant, Given values) { e.set_constant(constant, array(values)); }, py::arg("constant"),
           py::arg("values"), nogil)
      .def("run", [](Executor& e, uintptr_t x, uintptr_t level, uintptr_t score, int images) {
        e.run(pointer<const float>(x), pointer<const int64_t>(level), pointer<float>(score), images);
      }, py::arg("x"), py::arg("level"), py::arg("score"), py::arg("images"), nogil)
      .def("run_steps", [](Executor& e, int slots, uintptr_t x, bool nhwc, uintptr_t score, uintptr_t coef, uintptr_t draw,
                           uintptr_t level, int64_t rows, uintptr_t row, uintptr_t stop, uintptr_t seed, uintptr_t sample_id,
                           uintptr_t bad_row, int64_t steps, uintptr_t previous, uintptr_t keep, uintptr_t gain, uintptr_t adaptive,
                           uintptr_t known, uintptr_t known_sigma, uintptr_t known_draw) {
        const Chain chain{slots, pointer<float>(x), nhwc, pointer<float>(score), pointer<const float>(coef),
                          pointer<const int32_t>(draw), pointer<const int64_t>(level), rows, pointer<int64_t>(row),
                          pointer<const int64_t>(stop), pointer<const int64_t>(seed), pointer<const int64_t>(sample_id),
                          pointer<int64_t>(bad_row), pointer<float>(previous), pointer<const float>(keep), pointer<float>(gain),
                          pointer<const bool>(adaptive), pointer<const float>(known), pointer<const float>(known_sigma),
                          pointer<const int32_t>(known_draw)};
        bool interrupted = false;
        auto last_look = std::chrono::steady_clock::now();
        const auto signalled = [&] {  // Ctrl-C, looked for every 50 ms
          const auto now = std::chrono::steady_clock::now();
          if (now - last_look < std::chrono::milliseconds(50)) return false;
          last_look = now;
          py::gil_scoped_acquire gil;
          return interrupted = PyErr_CheckSignals() != 0;
        };
        {
          py::gil_scoped_release no_gil;
          e.run_steps(chain, steps, signalled);
        }
        if (interrupted) throw py::error_already_set();
      }, py::arg("slots"), py::arg("x"), py::arg("nhwc"), py::arg("score"), py::arg("coef"), py::arg("draw"), py::arg("level"),
           py::arg("rows"), py::arg("row"), py::arg("stop"), py::arg("seed"), py::arg("sample_id"), py::arg("bad_row"), py::arg("steps"),
           py::arg("previous") = 0, py::arg("keep") = 0, py::arg("gain") = 0, py::arg("adaptive") = 0, py::arg("known") = 0,
           py::arg("known_sigma") = 0, py::arg("known_draw") = 0)
      .def("bytes", &Executor::bytes, "Weights, tables and scratch memory.", nogil)
      .def("algorithm", &Executor::algorithm, py::arg("conv"), nogil);
}
