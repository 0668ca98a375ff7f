"""The native CPU executor against the engines that a user could pick instead: ``pytest bench/test_native.py --peers``.

One evaluation of NCSN on one thread. Each case checks the result first, then reports the peer's CPU time over the
executor's, from interleaved pairs in this process: above 1, the executor is faster. Peers get the plain formula of the
norm. OpenVINO and ONNX Runtime come with ``pip install sgm-engine[peers]``.
"""

import copy
import time

import pytest
import torch

from bench.common import paired_ratio
from sgm_engine import _C
from sgm_engine.models import NCSN
from sgm_engine.native import NativeNetwork
from sgm_engine.schedule import geometric

TOLERANCE = {"float32": 5e-6, "bfloat16": 5e-2}  # of the whole network at random weights, against float64
NETWORKS = {"ngf32-28": (32, 1, 28), "ngf128-32": (128, 3, 32)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1), _C.set_num_threads(1)
    yield
    torch.set_num_threads(before[0]), _C.set_num_threads(before[1])


def error(y, want):
    return ((y.double() - want).norm() / want.norm()).item()


def eager(model, x, level, precision):
    if precision == "bfloat16":
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return model(x, level)

    return call


def compiled(model, x, level, precision):
    from torch._inductor import config

    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    graph = torch.compile(lambda x, level: model(x, level))

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return graph(x, level)

    with config.patch(freezing=True):
        call()
    return call


def onnx_file(model, x, level):
    from io import BytesIO

    pytest.importorskip("onnx")
    file = BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE  # of the mode, and with it of the plain norm
    torch.onnx.export(
        model, (x, level), file, dynamo=False, input_names=["x", "level"], opset_version=17, training=keep
    )
    return file.getvalue()


def onnxruntime(model, x, level, precision):
    runtime = pytest.importorskip("onnxruntime", reason="pip install sgm-engine[peers]")
    if precision == "bfloat16":
        pytest.skip("ONNX Runtime has no bfloat16 convolution on a CPU")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(onnx_file(model, x, level), options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy(), "level": level.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(model, x, level, precision):
    ov = pytest.importorskip("openvino", reason="pip install sgm-engine[peers]")
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32"}
    graph = core.compile_model(core.read_model(onnx_file(model, x, level)), "CPU", settings)
    request = graph.create_infer_request()
    inputs = [ov.Tensor(x.numpy()), ov.Tensor(level.numpy())]
    return lambda: torch.from_numpy(request.infer(inputs)[0])


@pytest.mark.peers
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("peer", [eager, compiled, onnxruntime, openvino])
def test_against_a_peer(benchmark, peer, network, batch, precision):
    if precision == "bfloat16" and _C.isa() != "avx512_bf16":
        pytest.skip(f"bfloat16 needs AVX512_BF16; this is {_C.isa()}")
    compare(benchmark, peer, network, batch, precision, pairs=9)


@pytest.mark.quick
def test_against_eager(benchmark):
    assert compare(benchmark, eager, "ngf32-28", 4, "float32", pairs=9).low > 1.5


def compare(benchmark, peer, network, batch, precision, pairs):
    ngf, channels, size = NETWORKS[network]
    torch.manual_seed(0)
    model = NCSN(geometric(1, 0.01, 10), channels, ngf, image_size=size).eval()
    x, level = torch.rand(batch, channels, size, size), torch.arange(batch) % 10
    native = NativeNetwork(model, batch, size, size, precision)
    plain = copy.deepcopy(model).train()  # in training mode the norm is the plain formula, and nothing else differs
    other = peer(plain, x, level, precision)
    with torch.no_grad():
        want = copy.deepcopy(plain).double()(x[:2].double(), level[:2])
    assert error(native(x, level)[:2], want) < TOLERANCE[precision]
    assert error(other()[:2], want) < 2 * TOLERANCE[precision]
    ratio = paired_ratio(other, lambda: native(x, level), pairs, time.process_time, block=0.05)
    benchmark.extra_info.update(ratio=str(ratio), peer_ms=ratio.f_seconds * 1e3, native_ms=ratio.g_seconds * 1e3)
    benchmark.pedantic(lambda: native(x, level), rounds=1)
    print(f"\n{peer.__name__} {network} B={batch} {precision}: {ratio} ({ratio.g_seconds * 1e3:.1f} ms an evaluation)")
    return ratio
