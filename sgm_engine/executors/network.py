"""The score network as a step calls it: one float32 state in, one score out, in the precision that was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from sgm_engine.executors.watch import Watch, same, tensors_of
from sgm_engine.numerics import float32_math
from sgm_engine.rewriting.float8.config import Float8Config, check_float8, float8_layers, fuse_quantisation, trace_first
from sgm_engine.rewriting.float8.conv import Float8Conv

PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "float8", "direct")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}
SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The layers that autocast runs in 16 bits, and whose weights are therefore worth casting once instead of every step.
_CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
# Layers that compute something else while a module is in training mode.
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Network:
    """``model(x [B, C, H, W] float32, level [B] int64) → score``, checked, in one of these precisions.

    float32: the module as it is; its parameters are read where they lie, so that changes in place count at once. On a
    GPU without TensorFloat-32, whatever PyTorch's switches say: the numerics of the publications.
    tf32: the same with TensorFloat-32 products (10 bits of mantissa), on a GPU.
    bfloat16, float16: autocast (norms and parameters of other layers stay float32) over a copy of the module that
    shares everything with it except the weights of convolutions and linear layers. Those are 16-bit buffers of their
    own, in place for good; ``sync`` rewrites them from the module's current weights.
    float8: bfloat16, and the convolutions that ``float8`` names in 8 bits (float8.py), quantised by ``sync`` likewise.
    direct: float32, by the one executor that has a choice (native) without Winograd.
    shape, levels: (C, H, W) of a sample and the number of levels, for executors that prepare for them.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        precision: str,
        device: torch.device,
        shape: tuple[int, int, int] | None = None,
        levels: int | None = None,
        float8: Float8Config | None = None,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        self.model, self.precision, self.device, self.shape, self.levels = model, precision, device, shape, levels
        self.module = model if isinstance(model, nn.Module) else None
        self._half = HALVES.get(precision)
        if self._half is not None and self.module is None:
            raise ValueError(
                f"precision={precision!r} needs an nn.Module, got a plain callable: cast inside it instead"
            )
        check_float8(float8, precision, device)
        if precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision='tf32' needs a CUDA device, got {device}: use precision='float32'")
        self._modal = self.module is not None and any(isinstance(m, _MODAL) for m in self.module.modules())
        self._forward = model
        trains = self._modal and self.module.training  # refused by sync
        if float8 is not None or (device.type == "cuda" and not trains):  # a CPU's executors may not call it at all
            trace_first(self.module, shape, device)
        self.watch = Watch(self.module)
        self._copied: list[Tensor] = []
        self._casts: list[tuple[Tensor, Tensor]] = []  # (parameter, its 16-bit buffer)
        self._written: dict[int, tuple | None] = {}  # id of a parameter → what its buffer was written from
        self.float8, self._fused = float8, 0  # norms that write float8
        self._quantised: dict[nn.Conv2d, Float8Conv] = {}  # convolution → the layer in its place
        if float8 is not None:
            self._quantised = float8_layers(self.module, self.float8)  # raises what is wrong with it

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        with self._numerics():
            score = self._forward(x, level)
        if not isinstance(score, Tensor) or score.shape != x.shape:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"model(x, level) must return a score of x's shape {tuple(x.shape)}, got {got}")
        if score.dtype not in SCORE_DTYPES or score.device != x.device:
            got = f"{score.dtype} on {score.device}"
            raise ValueError(f"model(x, level) must return float32, bfloat16 or float16 on {x.device}, got {got}")
        return score

    def _numerics(self) -> AbstractContextManager[None]:
        if self._half is not None:
            return torch.autocast(self.device.type, self._half, cache_enabled=False)
        stack = ExitStack()
        stack.enter_context(torch.autocast(self.device.type, enabled=False))  # the caller's
        if self.device.type == "cuda":
            stack.enter_context(float32_math("tf32" if self.precision == "tf32" else "ieee"))
        return stack

    def sync(self, force: bool = False) -> None:
        """Make the next evaluation see the module's current parameters: buffers whose source changed are rewritten in
        place, with ``force`` all of them."""
        if self._modal and self.module.training:
            raise ValueError("model is in training mode and holds dropout or batch norm: call model.eval() first")
        states = self.watch.look()  # before anything is read: a write that comes meanwhile is seen at the next look
        for module in self.module.modules() if self.module is not None else ():
            if hasattr(module, "sync_weights"):  # kernels that a module derives from its own weights
                module.sync_weights()
        if self._half is None:
            return
        with torch.no_grad():
            if not same(self._copied, tensors_of(self.module)):
                trace_first(self.module, self.shape, self.device)
                self._copied, self._written = tensors_of(self.module), {}
                if self.float8 is not None:
                    self._quantised = float8_layers(self.module, self.float8)
                self._forward, self._casts = _cast_copy(self.module, self._half, self._quantised)
                if self._quantised:
                    self._fused = fuse_quantisation(self._forward)
            for parameter, buffer in self._casts:
                state = states.get(id(parameter))
                if force or state is None or self._written.get(id(parameter)) != state:
                    buffer.copy_(parameter)
                    self._written[id(parameter)] = state
            for conv, layer in self._quantised.items():
                layer.load(conv)

    @property
    def numerics(self) -> str:
        return self.precision if self.float8 is None else f"{self.precision} {self.float8.digest}"

    def describe(self) -> str:
        """What the precision leaves to be said."""
        if not self._quantised:
            return ""
        convolutions = sum(isinstance(m, nn.Conv2d) for m in self.module.modules())
        how = "emulated" if self.float8.emulate else "e4m3"
        said = f"{len(self._quantised)} of {convolutions} convolutions in float8 ({how}), the others in bfloat16"
        return said + (f"; {self._fused} norms write float8" if self._fused else "")

    @property
    def forward_module(self) -> nn.Module:
        """What an evaluation calls: after ``sync``, in 16 bits, a copy of this network's own."""
        return self._forward

    def contents(self) -> list[tuple]:
        """What each parameter and buffer holds; where the CPU cannot read it, address, version and steps."""
        held = zip(self.watch.tensors, self.watch.look().values(), strict=True)
        return [state or (t.data_ptr(), t._version, self.watch.steps) for t, state in held]

    def replaced(self) -> bool:
        """Whether the module has other Parameter or buffer objects than when this was last asked."""
        return self.watch.follow()

    def tensors(self) -> list[Tensor]:
        """Every tensor of the module that an evaluation reads, as aliases that keep the memory alive."""
        return [t.detach() for t in tensors_of(self._forward if self.module is not None else None)]


def _cast_copy(
    module: nn.Module, dtype: torch.dtype, replaced: dict[nn.Conv2d, Float8Conv]
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A copy that shares every tensor with ``module`` but the weights of _CAST layers, and those paired with theirs.

    replaced: layers in whose place the copy has others, wherever they are called.
    """
    memo: dict[int, object] = {id(t): t for t in tensors_of(module)} | {id(old): new for old, new in replaced.items()}
    casts = []
    for layer in module.modules():
        if isinstance(layer, _CAST) and layer not in replaced:
            for p in layer.parameters(recurse=False):
                layout = torch.channels_last if p.dim() == 4 else torch.preserve_format  # as x in 16 bits
                empty = torch.empty_like(p, dtype=dtype, memory_format=layout)
                buffer = nn.Parameter(empty, requires_grad=False)
                memo[id(p)] = buffer
                casts.append((p, buffer))
    return copy.deepcopy(module, memo), casts
