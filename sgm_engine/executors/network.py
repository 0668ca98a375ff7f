"""The score network as a step calls it: one float32 state in, one score out, in the precision that was asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sgm_engine.executors.watch import Watch, same, tensors_of
from sgm_engine.numerics import float32_math
from sgm_engine.rewriting.acceleration import Accelerated
from sgm_engine.rewriting.agreement import as_written
from sgm_engine.rewriting.altered import in_training
from sgm_engine.rewriting.biases import folded
from sgm_engine.rewriting.float8.config import Float8Config, check_float8, float8_layers, fuse_quantisation, trace_first
from sgm_engine.rewriting.float8.conv import Float8Conv
from sgm_engine.rewriting.observed import Observed
from sgm_engine.rewriting.rewrite import PooledConv

PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "float8", "direct")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}
SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The layers that autocast runs in 16 bits, and whose weights are therefore worth casting once instead of every step.
_CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
# The functions that those layers call.
_CASTING = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.linear}


class Network:
    """``model(x [B, C, H, W] float32, level [B] int64) → score``, checked, in one of these precisions.

    float32: the module as it is; its parameters are read where they lie, so that changes in place count at once. On a
    GPU without TensorFloat-32, whatever PyTorch's switches say: the numerics of the publications; and convolutions
    find their weights channels_last there, in buffers as those of 16 bits: cuDNN would copy others at every step.
    tf32: the same with TensorFloat-32 products (10 bits of mantissa), on a GPU.
    bfloat16, float16: autocast over the module itself (norms and parameters of other layers stay float32), which finds
    the weights of convolutions and linear layers cast already: 16-bit buffers, in place for good; ``sync`` rewrites
    them from the module's current weights.
    float8: bfloat16, and the convolutions that ``float8`` names in 8 bits (float8.py), quantised by ``sync`` likewise.
    It runs a copy of the module, as an accelerated module with buffers on a GPU does; another module, another copy.
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
        on_gpu = self.module is not None and device.type == "cuda"
        self._buffers = self._half or (torch.float32 if on_gpu else None)  # what ``sync`` writes: weights of this dtype
        if self._half is not None and self.module is None:
            raise ValueError(
                f"precision={precision!r} needs an nn.Module, got a plain callable: cast inside it instead"
            )
        check_float8(float8, precision, device)
        if precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision='tf32' needs a CUDA device, got {device}: use precision='float32'")
        self._forward, self._mode = model, nullcontext()
        trains = self.module is not None and in_training(self.module)  # refused by sync
        if float8 is not None or (device.type == "cuda" and not trains):  # a CPU's executors may not call it at all
            trace_first(self.module, shape, device)
        parts = () if self.module is None else self.module.modules()
        self.accelerated = any(isinstance(m, Accelerated) for m in parts)
        self._copies = float8 is not None or (self.accelerated and on_gpu)
        self.watch = Watch(self.module)
        self.renewals = 0  # how often the model became another
        self.spares_x = False  # the model writes to its input, and is given a copy
        self._copied: list[Tensor] = []
        self._casts: list[tuple[Tensor, Tensor]] = []  # (parameter, its 16-bit buffer)
        self._written: dict[int, tuple | None] = {}  # id of a parameter → what its buffer was written from
        self.float8, self._fused = float8, 0  # norms that write float8
        self._quantised: dict[nn.Conv2d, Float8Conv] = {}  # convolution → the layer in its place
        if float8 is not None:
            self._quantised = float8_layers(self.module, self.float8)  # raises what is wrong with it

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        given = x.clone() if self.spares_x else x
        version = given._version
        with self._numerics(), self._mode:
            score = self._forward(given, level)
        if given._version != version and not self.spares_x:
            raise ValueError("model wrote to its input x, the chain's own, in some calls: let it write to a copy")
        return _checked(score, x)

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
        self.refuse_training()
        states = self.watch.look()  # before anything is read: a write that comes meanwhile is seen at the next look
        for module in self.module.modules() if self.module is not None else ():
            if hasattr(module, "sync_weights"):  # kernels that a module derives from its own weights
                module.sync_weights()
        if self._buffers is None:
            return
        with torch.no_grad():
            if not same(self._copied, tensors_of(self.module)):
                trace_first(self.module, self.shape, self.device)
                self._copied, self._written = tensors_of(self.module), {}
                if self.float8 is not None:
                    self._quantised = float8_layers(self.module, self.float8)
                self._casts = _casts(self.module, self._buffers, self._quantised)
                if self._copies:
                    self._forward = _copy(self.module, self._casts, self._quantised)
                elif self._casts:
                    self._mode = _CastAlready(self._casts, self.device.type if self._half else None)
                if self._quantised:
                    self._fused = fuse_quantisation(self._forward)
            derived = {id(m.kernel): m._conv[0].weight for m in self.module.modules() if isinstance(m, PooledConv)}
            for parameter, buffer in self._casts:
                state = states.get(id(derived.get(id(parameter), parameter)))
                if force or state is None or self._written.get(id(parameter)) != state:
                    buffer.copy_(parameter)
                    self._written[id(parameter)] = state
            for conv, layer in self._quantised.items():
                layer.load(conv)

    def refuse_training(self) -> None:
        """ValueError if a part of the model computes something else in training mode and is in it."""
        if self.module is not None and (name := in_training(self.module)):
            raise ValueError(f"model: {name} is in training mode and draws or learns there: call model.eval() first")

    @cached_property
    def observed(self) -> Observed:
        """All that decides what the model computes, beside what its weights hold, as it is from the first look on."""
        return Observed(self.model)

    def renew(self) -> None:
        """The module is another than it was: copies and traces of it go."""
        self._copied, self.observed, self.renewals = [], Observed(self.model), self.renewals + 1
        for module in self.module.modules() if self.module is not None else ():
            if isinstance(module, Accelerated):
                module.forget()

    def copied(self) -> nn.Module:
        """In 16 bits: run a copy of the module from now on, which shares every tensor that is not cast; returns it."""
        self._copies, self._mode, self._copied = True, nullcontext(), []
        self.sync()
        return self._forward

    def spare_x(self) -> None:
        """The model writes to its input: give it a copy from now on, and say so."""
        if not self.spares_x:
            self.spares_x = True
            warnings.warn("model writes to its input x, which is the chain's: it is given a copy", stacklevel=7)

    def original(self, x: Tensor, level: Tensor) -> Tensor:
        """The user's own module, without anything that was made of it, in this precision; x may be written to."""
        with torch.no_grad(), self._numerics(), as_written():
            return _checked(self.model(x, level), x)

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
        """What an evaluation calls: the user's module, or after ``sync`` a copy of this network's own."""
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
        found = tensors_of(self._forward if self.module is not None else None)
        return [t.detach() for t in (*found, *(buffer for _, buffer in self._casts if not self._copies))]


def _checked(score: object, x: Tensor) -> Tensor:
    if not isinstance(score, Tensor) or score.shape != x.shape:
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"model(x, level) must return a score of x's shape {tuple(x.shape)}, got {got}")
    if score.dtype not in SCORE_DTYPES or score.device != x.device:
        got = f"{score.dtype} on {score.device}"
        raise ValueError(f"model(x, level) must return float32, bfloat16 or float16 on {x.device}, got {got}")
    return score


class _CastAlready(TorchFunctionMode):
    """Convolutions and products under autocast find their weights cast. What it does not know autocast casts itself.

    device: of the autocast; None: there is none, and they find weights that lie as they should.
    """

    def __init__(self, casts: list[tuple[Tensor, Tensor]], device: str | None):
        super().__init__()
        self.known, self.device = {id(p): buffer for p, buffer in casts}, device  # the network keeps the parameters

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _CASTING and (self.device is None or torch.is_autocast_enabled(self.device)):
            args = [self.known.get(id(a), a) for a in args]
            kwargs = {name: self.known.get(id(a), a) for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _casts(module: nn.Module, dtype: torch.dtype, replaced: dict[nn.Conv2d, Float8Conv]) -> list[tuple[Tensor, Tensor]]:
    """(parameter, its buffer in ``dtype``) of the layers of _CAST, but for those that ``replaced`` has another for; and
    of kernels that take in a 2×2 mean, which are derived from parameters.

    In float32, only of weights that do not lie as images do on a GPU.
    """
    casts, kept = {}, _kept(module)
    for layer in module.modules():
        if isinstance(layer, (*_CAST, PooledConv)) and layer not in replaced:
            for p in [layer.kernel] if isinstance(layer, PooledConv) else layer.parameters(recurse=False):
                layout = torch.channels_last if p.dim() == 4 else torch.preserve_format  # as x
                if dtype == torch.float32 and (p.dim() != 4 or p.is_contiguous(memory_format=layout)):
                    continue
                if id(p) in kept:
                    continue
                empty = torch.empty_like(p, dtype=dtype, memory_format=layout)
                casts[id(p)] = p, nn.Parameter(empty, requires_grad=False)
    return list(casts.values())


def _kept(module: nn.Module) -> set[int]:
    """ids of the biases that norms add, in float32."""
    parts = (part for part in module.modules() if isinstance(part, Accelerated))
    return {id(bias) for part in parts for network, *_ in part._built.values() for bias in folded(network)}


def _copy(module: nn.Module, casts: list[tuple[Tensor, Tensor]], replaced: dict[nn.Conv2d, Float8Conv]) -> nn.Module:
    """A copy that shares every tensor with ``module`` but those cast, and has other layers in the place of some."""
    memo: dict[int, object] = {id(t): t for t in tensors_of(module)} | {id(old): new for old, new in replaced.items()}
    other = copy.deepcopy(module, memo | {id(p): buffer for p, buffer in casts})
    for part in other.modules():
        if isinstance(part, Accelerated):
            part.keep()
    return other
