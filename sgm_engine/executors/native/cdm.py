"""A classification diffusion model as layers of the native executor: forward, and back to the input.

Of the head only its gradient is needed. f_t − f_r = −Σ (w_j·features + b_j) over j = t + 1 … r, so the gradient in the
pooled features is a table by level; what baseline and reference add is affine in x, a table of numbers by level. Both
are made in float64 when weights are packed. The logits are never computed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.executors.native.gradient import append_gradient
from sgm_engine.executors.native.graph import Graph, Value
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Norm as NativeNorm
from sgm_engine.executors.native.norm import Table, Unsupported
from sgm_engine.executors.native.potential import lower_potential
from sgm_engine.models.cdm.layers import Attention, Downsample, Norm, Residual, Told, Upsample
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import Head, UNet
from sgm_engine.models.cdm.potential import PotentialNet
from sgm_engine.rewriting.altered import altered

LANES = 16  # q, k and v begin at multiples of the longest vector


OWN = ("sgm_engine.models.cdm.", "torch.nn.modules.")


def lower_cdm(graph: Graph, model: CDM, shape: tuple[int, int, int], levels: int) -> None:
    """Emit the layers of ∇ₓ log q_σ of images [*shape]. Raises Unsupported for a classifier that is no U-Net."""
    if levels != len(model.sigmas):
        raise ValueError(f"the model has {len(model.sigmas)} levels, got {levels}")
    net = model.classifier
    if type(net) not in (UNet, PotentialNet):
        raise Unsupported(f"a classifier that is {type(net).__name__}, not sgm_engine.cdm.UNet or PotentialNet")
    head = net.head
    terms = {name for name, _ in (*head.named_parameters(), *head.named_buffers())}
    if type(net) is UNet and (type(head) is not Head or terms - {"weight", "bias", "mean", "variance"}):
        raise Unsupported(f"a head with other terms than a linear map and a baseline: {', '.join(sorted(terms))}")
    for name, part in model.named_modules():
        if why := altered(part):
            raise Unsupported(f"{name or 'the model'}: {why}")
        if not type(part).__module__.startswith(OWN):
            raise Unsupported(f"{name or 'the model'} is {type(part).__name__}, in the place of another layer")
    for name, p in model.named_parameters():
        if p.dtype != torch.float32 or p.device.type != "cpu":
            raise Unsupported(f"{name} is {p.dtype} on {p.device}, not float32 on the CPU")
    if type(net) is PotentialNet:
        return lower_potential(graph, model, shape, branches(model))
    if shape[1] % net.patch or shape[2] % net.patch:
        raise ValueError(f"image size must divide by patch = {net.patch}, got {shape[1]}×{shape[2]}")
    x = graph.embed(shape, net.patch, net.fourier, _ends(model))
    append_gradient(graph, *(_branch(graph, model, x, *part) for part in branches(model)))


def branches(model: CDM) -> list[tuple[float, int | None]]:
    """Weights and labels of the networks whose logits are summed: one, or two that guide (models/cdm/model.py)."""
    if not model.labels:
        return [(1.0, None)]
    if model.class_label is None or model.guidance == 1:
        return [(1.0, model.labels if model.class_label is None else model.class_label)]
    return [(1 - model.guidance, model.labels), (model.guidance, model.class_label)]


def _branch(graph: Graph, model: CDM, x: Value, weight: float, label: int | None) -> tuple[Value, Value]:
    """What the pooled features are made of, and weight·(gradient of f_t − f_r) in it."""
    net = model.classifier
    out = _unet(graph, net, x, label)
    scale = _features(model, out.height * out.width).map(lambda table: weight * table)
    return out, graph.slope(out, NativeNorm(out.channels, 0, 0.0, (scale, None, None)), _last(net))


def _last(net: UNet) -> str:
    """The activation before the pool."""
    return "none" if net.published else "silu"


def _unet(graph: Graph, net: UNet, x: Value, label: int | None) -> Value:
    """What the pooled features are the SiLU of, or the mean."""
    h = graph.conv(x, net.begin)
    kept = [h]
    for stage in net.down:
        kept.append(h := _stage(graph, stage, h, net.told, label))
    h = _stage(graph, net.middle, h, net.told, label)
    for stage in net.up:
        if isinstance(stage, Upsample):
            h = graph.conv(graph.nearest(h, stage.size, stage.size), stage.conv)
        else:
            h = _stage(graph, stage, graph.concat(h, kept.pop()), net.told, label)
    return graph.conv(h, net.end, _norm(net.norm), net.norm.activation)


def _stage(graph: Graph, stage: nn.Module, x: Value, told: Told | None, label: int | None) -> Value:
    if isinstance(stage, nn.Sequential):
        for part in stage:
            x = _stage(graph, part, x, told, label)
        return x
    if isinstance(stage, Downsample):
        kernel = Kernel.of(stage)
        return graph.conv(x, replace(kernel, padding=(0, 1, 0, 1)) if stage.after else kernel)
    if isinstance(stage, Residual):
        skip = x if isinstance(stage.skip, nn.Identity) else graph.conv(x, stage.skip)
        first = Kernel.of(stage.conv1)
        first = first if stage.told is None else first.shifted(_told(stage, told, label))
        h = graph.conv(x, first, _norm(stage.norm1), stage.norm1.activation)
        return graph.conv(h, stage.conv2, _norm(stage.norm2), stage.norm2.activation, add=[skip])
    if isinstance(stage, Attention):
        qkv = graph.conv(x, Kernel.of(stage.qkv).split(3, LANES), _norm(stage.norm), stage.norm.activation)
        return graph.conv(graph.attention(qkv, x.channels), stage.out, add=[x])
    raise Unsupported(f"{type(stage).__name__} in a U-Net")


def _norm(norm: Norm) -> NativeNorm:
    gamma, beta = (Table(lambda p=p: p[None], 1, (p,)) for p in (norm.weight, norm.bias))
    return NativeNorm(norm.weight.numel(), norm.groups, norm.eps, (gamma, None, beta))


def _told(block: Residual, told: Told, label: int) -> Table:
    """What a label adds to the output of a block's first convolution [1, C]."""

    def make() -> Tensor:
        with torch.no_grad():
            return block.told(F.silu(told(torch.tensor([label]))))

    return Table(make, 1, (*told.parameters(), *block.told.parameters()))


def _features(model: CDM, pixels: int) -> Table:
    """Gradient of f_t − f_r in the sum over pixels [levels, F]; features are that sum over √pixels, or its mean."""
    weight, power = model.classifier.head.weight, 1.0 if model.classifier.published else 0.5

    def make() -> Tensor:
        behind = weight.detach().double().flip(0).cumsum(0).flip(0)  # Σ of rows t, t + 1 … r
        return -behind[model.level_class + 1] / pixels**power

    return Table(make, len(model.sigmas), (weight, model.level_class))


def _ends(model: CDM) -> Table:
    """float64 [levels, 5]: u = a·x + b; score = a·∇ᵤ(f_t − f_r) + p·x + q of baseline and reference."""
    head, classes = model.classifier.head, model.classes

    def make() -> Tensor:
        t = model.level_class
        a, b = model.signal[t] * model.scale, model.signal[t] * model.shift
        curve, centre = -torch.ones_like(a) / classes.noise[-1] ** 2, torch.zeros_like(a)  # ∇ᵤ: curve·u + centre
        if head.has_baseline:
            mean, variance = head.mean.double(), head.variance.double()
            curve = curve + 1 / variance[-1] - 1 / variance[t]
            centre = mean[t] / variance[t] - mean[-1] / variance[-1]
        return torch.stack([a, b, a, a * curve * a, a * (curve * b + centre)], 1)

    buffers = (model.signal, model.level_class, *((head.mean, head.variance) if head.has_baseline else ()))
    return Table(make, len(model.sigmas), buffers)
