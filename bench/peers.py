"""What a user would run instead: each peer is a function (model, x, level, precision, threads) → a call.

The model is plain PyTorch (``plain``), one evaluation of it the work. A peer that cannot run a case raises Unavailable
with the reason, which the table prints. ONNX Runtime and OpenVINO: ``pip install 'sgm-engine[peers]'``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from io import BytesIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models import blocks

Call = Callable[[], Tensor]


class Unavailable(Exception):
    """This peer has no such mode, or is not installed."""


class PlainNorm(nn.Module):
    """A network's norm as its formula: on var_mean in float32, which compilers fuse, or on F.instance_norm."""

    def __init__(self, norm: nn.Module, own_statistics: bool):
        super().__init__()
        self.norm, self.own_statistics = norm, own_statistics

    def forward(self, x: Tensor, level: Tensor, activation: str = "none") -> Tensor:
        norm = self.norm
        if isinstance(norm, blocks.ConditionalInstanceNormPlus):
            gamma, alpha, beta = (p[:, :, None, None] for p in norm.embed(level).chunk(3, dim=1))
        else:
            gamma, alpha, beta = (p[None, :, None, None] for p in (norm.gamma, norm.alpha, norm.beta))
        if self.own_statistics:
            variance, mean = torch.var_mean(x.float(), (2, 3), correction=0, keepdim=True)
            standard = ((x.float() - mean) * torch.rsqrt(variance + 1e-5)).to(x.dtype)
        else:
            mean, standard = x.float().mean((2, 3), keepdim=True), F.instance_norm(x, eps=1e-5)
        across = (mean - mean.mean(1, keepdim=True)) * torch.rsqrt(mean.var(1, keepdim=True) + 1e-5)
        y = gamma * (standard + alpha * across.to(x.dtype)) + beta
        return getattr(F, activation)(y) if activation != "none" else y


def plain(model: nn.Module, own_statistics: bool = True) -> nn.Module:
    """A copy of an NCSN or NCSNv2 with its norms as plain formulas."""
    kinds = (blocks.ConditionalInstanceNormPlus, blocks.InstanceNormPlus)
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds) and not isinstance(module, PlainNorm):
                setattr(module, name, PlainNorm(child, own_statistics))
    return model.eval()


def _prepared(model: nn.Module, x: Tensor, precision: str, channels_last: bool) -> tuple[nn.Module, Tensor]:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = plain(model, own_statistics=channels_last).to(dtype=dtype, memory_format=layout)
    return model, x.to(dtype=dtype, memory_format=layout)


def _torch(model: nn.Module, x: Tensor, level: Tensor, precision: str, channels_last: bool) -> Call:
    model, x = _prepared(model, x, precision, channels_last)

    def call() -> Tensor:
        with torch.no_grad():
            return model(x, level)

    return call


def eager(model, x, level, precision, threads) -> Call:
    if precision == "bfloat16":
        raise Unavailable("measured as channels-last, which is faster in bfloat16")
    return _torch(model, x, level, precision, channels_last=False)


def eager_channels_last(model, x, level, precision, threads) -> Call:
    return _torch(model, x, level, precision, channels_last=True)


def _compiled(model, x, level, precision, freezing: bool) -> Call:
    from torch._inductor import config

    model, x = _prepared(model, x, precision, channels_last=True)
    torch._dynamo.reset()
    graph = torch.compile(model, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            return graph(x, level)

    with config.patch(freezing=freezing):
        call()
    return call


def compile_default(model, x, level, precision, threads) -> Call:
    if len(x) != 8:
        raise Unavailable("measured at batch 8 only: compiling takes minutes, and freezing is the faster of the two")
    return _compiled(model, x, level, precision, freezing=False)


def compile_freezing(model, x, level, precision, threads) -> Call:
    return _compiled(model, x, level, precision, freezing=True)


def _onnx(model: nn.Module, x: Tensor, level: Tensor) -> bytes:
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise Unavailable("needs onnx: pip install 'sgm-engine[peers]'") from None
    file, settings = BytesIO(), {"input_names": ["x", "level"], "opset_version": 18, "verbose": False}
    with torch.no_grad():
        try:
            torch.onnx.export(plain(model), (x, level), file, dynamo=False, **settings)
        except (
            torch.onnx.errors.OnnxExporterError
        ):  # filters that the network makes as it runs; the other needs onnxscript
            file = BytesIO()
            torch.onnx.export(plain(model), (x, level), dynamo=True, **settings).save(file)
    return file.getvalue()


def onnxruntime(model, x, level, precision, threads) -> Call:
    if precision == "bfloat16":
        raise Unavailable("has no bfloat16 convolution on a CPU")
    try:
        import onnxruntime as runtime
    except ImportError:
        raise Unavailable("not installed: pip install 'sgm-engine[peers]'") from None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(_onnx(model, x, level), options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy(), "level": level.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(model, x, level, precision, threads) -> Call:
    try:
        import openvino as ov
    except ImportError:
        raise Unavailable("not installed: pip install 'sgm-engine[peers]'") from None
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
    }
    graph = core.compile_model(core.read_model(_onnx(model, x, level)), "CPU", settings)
    request = graph.create_infer_request()
    inputs = [ov.Tensor(x.numpy()), ov.Tensor(level.numpy())]
    return lambda: torch.from_numpy(request.infer(inputs)[0])


PEERS = {
    "eager": eager,
    "eager, channels-last": eager_channels_last,
    "torch.compile": compile_default,
    "torch.compile, freezing": compile_freezing,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}
