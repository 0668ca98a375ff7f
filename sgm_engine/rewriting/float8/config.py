"""precision="float8": which convolutions run in float8 (e4m3), and by what scales.

Everything else of the network is bfloat16, as with precision="bfloat16". docs/float8.md has what it does to samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from sgm_engine.checks import check_int
from sgm_engine.files.reading import parse_json
from sgm_engine.kernels.reference import E4M3_MAX
from sgm_engine.rewriting.acceleration import Accelerated
from sgm_engine.rewriting.altered import altered
from sgm_engine.rewriting.biases import BiasFree
from sgm_engine.rewriting.chosen_conv import ChosenConv, ConvNorm
from sgm_engine.rewriting.float8.conv import Float8Conv
from sgm_engine.rewriting.norms import norm_call

CHANNELS = 32  # what the kernel needs a convolution's channels to divide by
FORMAT = "sgm-float8"


@dataclass(frozen=True)
class Float8Config:
    """How precision="float8" quantises. Make one with :func:`calibrate_float8`, once for a set of weights.

    maxima: name of a convolution → the largest |input| that it has seen; a convolution without stays bfloat16.
    margin: inputs up to margin·maximum are represented, larger ones cut off. e4m3 has an exponent of its own, so that
        a margin of 2 costs digits only of what is below 1/14,000 of the maximum.
    channels: a convolution takes part if its channels, in and out, divide by this; below 32 only emulated.
    source: what the maxima were taken from, in words.
    emulate: compute the same numbers in plain PyTorch: quantised operands, products and sums in float32. On any device,
        and slow. Sums run in another order than on a GPU: results agree to rounding, not bit by bit.

    Weights need no calibration: whenever they change they are quantised, by the largest of each output channel.
    """

    maxima: Mapping[str, float]
    margin: float = 2.0
    channels: int = CHANNELS
    source: str = ""
    emulate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.maxima, Mapping):
            raise TypeError(f"maxima must be a mapping from names to numbers, got {type(self.maxima).__name__}")
        for name, largest in self.maxima.items():
            if not (isinstance(largest, (int, float)) and 1e-30 < largest < 1e30):
                raise ValueError(f"maxima must be positive and finite, got {largest!r} for {name!r}: calibrate again")
        if not (isinstance(self.margin, (int, float)) and 1 <= self.margin <= 256):
            raise ValueError(f"margin must be in [1, 256], got {self.margin!r}")
        if not isinstance(self.emulate, bool):
            raise TypeError(f"emulate must be True or False, got {self.emulate!r}")
        check_int("channels", self.channels, 1)
        if self.channels % CHANNELS and not self.emulate:
            raise ValueError(
                f"channels must be a multiple of {CHANNELS}, got {self.channels}: fewer can be emulated only"
            )

    def inverse(self, name: str) -> float:
        """What the input of that convolution is multiplied by before it is rounded to float8; a float32."""
        return float(np.float32(E4M3_MAX / (self.margin * self.maxima[name])))

    @property
    def digest(self) -> str:
        """Of everything that results depend on."""
        return hashlib.sha256(replace(self, source="").to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Float8Config:
        """What ``to_json`` wrote. ValueError says why a text is refused."""
        try:
            content = parse_json(text)
            if content.pop("format", None) != FORMAT:
                raise ValueError(f'expected an object with "format": "{FORMAT}"')
            return cls(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"not a float8 calibration ({error}): make one with calibrate_float8") from error


def check_float8(config: Float8Config | None, precision: str, device: torch.device) -> None:
    """ValueError unless the two arguments of an engine fit each other and the device."""
    if precision != "float8":
        if config is not None:
            raise ValueError(f"float8=… is for precision='float8', got {precision!r}: leave it out")
        return
    if config is None:
        raise ValueError(
            "precision='float8' needs float8=calibrate_float8(model), the scales of its layers; "
            "docs/float8.md says what it does to samples"
        )
    if not isinstance(config, Float8Config):
        raise TypeError(f"float8 must be a Float8Config, of calibrate_float8(model), got {type(config).__name__}")
    if not config.emulate and (lack := lacking(device)):
        raise ValueError(
            f"precision='float8' needs {lack}: use precision='bfloat16', or float8=replace(float8, emulate=True), "
            "which computes the same numbers slowly"
        )


def lacking(device: torch.device) -> str | None:
    """What float8 needs and this device does not have, in words."""
    if device.type != "cuda":
        return f"a CUDA device, got {device}"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"e4m3 tensor cores (compute capability 8.9), which {name} does not have"
    return None


def qualifies(conv: nn.Module, channels: int = CHANNELS) -> bool:
    """3×3, stride 1, size kept, ungrouped, channels that divide by ``channels``: the kernel's, and where the work is.

    So the first and the last convolution stay bfloat16 (images have few channels, and an error there is one of x), as
    do those of one tap, which read as much as they compute.
    """
    if type(conv) is not nn.Conv2d or altered(conv):
        return False
    same = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == conv.dilation
    square = conv.dilation[0] == conv.dilation[1] and conv.padding_mode == "zeros" and conv.groups == 1
    return same and square and conv.in_channels % channels == 0 and conv.out_channels % channels == 0


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Name → convolution of the user's own module. Accelerated, one that a 2×2 mean follows is called no more."""
    derived = module.derived.values() if isinstance(module, Accelerated) else ()
    pooled = {id(pooled_conv._conv[0]) for pooled_conv in derived}
    modules = _own(module).named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Conv2d) and id(m) not in pooled}


@torch.no_grad()
def trace_first(module: nn.Module, shape: tuple[int, int, int] | None, device: torch.device) -> None:
    """Have an accelerated network traced as it is called from now on, before it is copied for another precision: what
    it calls decides who takes part, and a trace is compared with the module in float32."""
    if isinstance(module, Accelerated) and shape is not None:
        level = torch.zeros(1, dtype=torch.int64, device=device)
        module.traced_for(torch.zeros(1, *shape, device=device), level)


def fuse_quantisation(module: nn.Module) -> int:
    """In the copy of an accelerated network: a norm that one float8 layer alone reads writes float8, the same bits.

    Returns how many do. Elsewhere the layer quantises what it reads.
    """
    networks = [network for network, *_ in module._built.values()] if isinstance(module, Accelerated) else []
    graphs = [network for network in networks if isinstance(network, fx.GraphModule)]
    return sum(_fuse(network, dict(network.named_modules())) for network in graphs)


def _fuse(network: fx.GraphModule, modules: dict[str, nn.Module]) -> int:
    fused = 0
    for node in network.graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        while isinstance(layer, (ConvNorm, ChosenConv, BiasFree)):
            layer = layer.conv
        if not isinstance(layer, Float8Conv):
            continue
        call = norm_call(node.args[0], lambda n: modules.get(n.target) if n.op == "call_module" else None)
        if call is not None and "pool" not in call.kwargs:
            call.kwargs = {**call.kwargs, "inverse": layer.inverse}
            fused += 1
    network.recompile()
    return fused


def nothing_to_do(convolutions: int, channels: int) -> ValueError:
    return ValueError(
        f"precision='float8' finds nothing to do: none of {convolutions} convolutions is 3×3, keeps the size, has "
        f"channels that divide by {channels} and a maximum in float8.maxima; use precision='bfloat16'"
    )


def _own(module: nn.Module) -> nn.Module:
    return module.source if isinstance(module, Accelerated) else module


def float8_layers(module: nn.Module, config: Float8Config) -> dict[nn.Conv2d, Float8Conv]:
    """The layer in place of each convolution that qualifies and was calibrated, its weights not loaded yet."""
    found = convolutions(module)
    known = dict(_own(module).named_modules())
    if unknown := [name for name in config.maxima if name not in known]:
        raise ValueError(f"float8 was calibrated on another network: this one has no {unknown[0]!r}")
    chosen = {name: conv for name, conv in found.items() if name in config.maxima and qualifies(conv, config.channels)}
    if not chosen:
        raise nothing_to_do(len(found), config.channels)
    return {conv: Float8Conv(conv, config.inverse(name), config.emulate) for name, conv in chosen.items()}
