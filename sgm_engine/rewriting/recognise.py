"""Find the norms that ``noise_conditioned_norm`` computes in a user's module: by their parameters and by what they do.

A candidate is a module whose only parameters are one embedding [L, k·C] or one to three vectors [C]. Its copy
in float64, with random parameters, is called on random images; they have the roles that make the reference agree.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor, nn

from sgm_engine.kernels import ops, reference
from sgm_engine.models.blocks import ConditionalInstanceNormPlus, InstanceNormPlus
from sgm_engine.rewriting.altered import altered

TOLERANCE = 1e-9  # in float64
ROLES = {
    3: list(permutations(("gamma", "alpha", "beta"))),
    2: [*permutations(("gamma", "beta")), *permutations(("gamma", "alpha"))],
    1: [("gamma",), ("beta",), ("alpha",)],
}


class FusedNorm(nn.Module):
    """noise_conditioned_norm with the parameters of the module that it stands for, read from there at every call.

    roles: of the chunks of the embedding's rows (conditional), or role → name of the parameter. groups: of a GroupNorm.
    """

    def __init__(
        self,
        source: nn.Module,
        roles: tuple[str, ...] | dict[str, str],
        channels: int,
        eps: float,
        groups: int | None = None,
    ):
        super().__init__()
        self.source, self.roles, self.channels, self.eps, self.groups = source, roles, channels, eps, groups
        self.conditional = isinstance(roles, tuple)
        self.embedding = _embedding(source) if self.conditional else None

    def forward(
        self,
        x: Tensor,
        level: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        before: str = "none",
        pool: bool = False,
        inverse: float | None = None,
        partials: Tensor | None = None,
        bias: Tensor | None = None,
        residual_bias: Tensor | None = None,
    ):
        """inverse, partials, biases: of the convolutions after and before it, see ops.inference_norm."""
        if self.groups is not None and x.dim() != 4:  # of tokens, in a network that was not traced
            return self.source(x)
        if self.conditional:
            parameters = dict(zip(self.roles, self.embedding.weight.split(self.channels, dim=1), strict=True))
        else:
            parameters = {role: getattr(self.source, name) for role, name in self.roles.items()}
        level = level if self.conditional else None
        if residual is not None and residual.dtype != x.dtype:  # autocast on a GPU, which upsamples in float32
            dtype = min(x.dtype, residual.dtype, key=lambda dtype: dtype.itemsize)
            x, residual = x.to(dtype), residual.to(dtype)
        if bias is not None or residual_bias is not None:
            tensors = (x, residual, bias, residual_bias, *parameters.values())
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
                x, residual = _added(x, bias), _added(residual, residual_bias)
                bias = residual_bias = None
        options = {"level": level, "activation": activation, "residual": residual, "eps": self.eps}
        options |= {"groups": self.groups, "before": before, "pool": pool}
        beside = {"inverse": inverse, "partials": partials, "bias": bias, "residual_bias": residual_bias}
        if any(v is not None for v in beside.values()):
            return ops.inference_norm(x, **parameters, **options, **beside)
        return ops.noise_conditioned_norm(x, **parameters, **options)


def _added(x: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]


def recognise(module: nn.Module) -> FusedNorm | str | None:
    """What computes the same; None if module is nothing like a norm; if it is like one but differs, why it is left."""
    if isinstance(module, (nn.InstanceNorm2d, nn.GroupNorm)):
        return _of_torch(module)
    if type(module) is ConditionalInstanceNormPlus:
        return _altered(module) or FusedNorm(module, ROLES[3][0], module.channels, 1e-5)
    if type(module) is InstanceNormPlus:
        return _altered(module) or FusedNorm(module, {role: role for role in ROLES[3][0]}, len(module.gamma), 1e-5)
    parameters = dict(module.named_parameters())
    if type(module).__module__.startswith("torch.nn.") or not 1 <= len(parameters) <= 3:
        return None
    embedding = _embedding(module)
    if embedding is None and (any("." in name or p.dim() != 1 for name, p in parameters.items())):
        return None
    if len({p.shape for p in parameters.values()}) > 1:
        return None
    if any(p.dtype != torch.float32 for p in parameters.values()):
        return "its parameters are not float32"
    return _altered(module) or _by_behaviour(module, embedding is not None)


def _of_torch(norm: nn.InstanceNorm2d | nn.GroupNorm) -> FusedNorm | str:
    if getattr(norm, "track_running_stats", False):
        return "InstanceNorm2d with running statistics"
    if any(p.dtype != torch.float32 for p in norm.parameters()):
        return "its parameters are not float32"
    roles = {"gamma": "weight", "beta": "bias"}  # a parameter that is None has no part
    roles = {role: name for role, name in roles.items() if getattr(norm, name) is not None}
    groups = getattr(norm, "num_groups", None)
    channels = norm.num_features if groups is None else norm.num_channels
    fused = FusedNorm(norm, roles, channels, norm.eps, groups)
    if type(norm) not in (nn.InstanceNorm2d, nn.GroupNorm) and not _agrees(fused):
        return "it extends a norm of torch.nn and computes something else"
    return _altered(norm) or fused


@torch.no_grad()
def _agrees(fused: FusedNorm) -> bool:
    """In float32: what extends GroupNorm often casts to it."""
    try:
        probe = copy.deepcopy(fused)
        for p in probe.source.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        device = next((p.device for p in probe.source.parameters()), None)
        x = torch.randn(3, fused.channels, 5, 4, generator=torch.Generator().manual_seed(1)).to(device) + 1
        ours, theirs = probe(x), probe.source(x)
        return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5 * ours.abs().max())
    except Exception:  # it wants another call
        return False


def _embedding(module: nn.Module) -> nn.Embedding | None:
    """The embedding that holds all of the module's parameters, if that is how it is made."""
    owners = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return owners[0] if len(owners) == 1 and type(owners[0]) is nn.Embedding else None


def _altered(module: nn.Module) -> str | None:
    inside = (why for part in module.modules() if (why := altered(part)))
    return "it has hooks" if module._backward_hooks or module._backward_pre_hooks else next(inside, None)


@torch.no_grad()
def _by_behaviour(module: nn.Module, conditional: bool) -> FusedNorm | str:
    names = [name for name, _ in module.named_parameters()]
    device = next(module.parameters()).device
    random = torch.Generator(device).manual_seed(0)
    try:
        probe = copy.deepcopy(module).double()
    except Exception as error:
        return f"it cannot be copied for a trial ({error})"
    for p in probe.parameters():
        p.copy_(torch.randn(p.shape, generator=random, device=device, dtype=torch.float64))
    values = list(probe.parameters())
    for parts in (3, 2, 1) if conditional else (len(values),):
        channels, rest = divmod(values[0].shape[-1], parts if conditional else 1)
        if rest or channels < 2:
            continue
        # Three samples of different offset and spread: the smallest spread shows eps.
        x = torch.randn(3, channels, 5, 4, generator=random, device=device, dtype=torch.float64)
        x = x * torch.tensor([1, 0.01, 3.0], device=device)[:, None, None, None].double() + x.mean((2, 3), keepdim=True)
        level = torch.tensor([0, values[0].shape[0] - 1, values[0].shape[0] // 2], device=device)
        found = _called(probe, x, level, conditional)
        if found is None:
            continue
        chunks = values[0].split(channels, dim=1) if conditional else values
        for roles in ROLES[parts]:
            for eps in _epsilons(module):
                given = dict(zip(roles, chunks, strict=True))
                expected = reference.noise_conditioned_norm(x, **given, level=level if conditional else None, eps=eps)
                if (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
                    pairs = roles if conditional else dict(zip(roles, names, strict=True))
                    return FusedNorm(module, pairs, channels, eps)
    return "it has the parameters of a norm and computes something else"


def _called(probe: nn.Module, x: Tensor, level: Tensor, conditional: bool) -> Tensor | None:
    """What a candidate makes of x; one without level may still take one and ignore it."""
    for arguments in ((x, level),) if conditional else ((x,), (x, level)):
        try:
            found = probe(*arguments)
        except Exception:  # x has not its number of channels, or it is no norm
            continue
        if isinstance(found, Tensor) and found.shape == x.shape:
            return found
    return None


def _epsilons(module: nn.Module) -> Iterator[float]:
    yield from dict.fromkeys([*(m.eps for m in module.modules() if isinstance(getattr(m, "eps", None), float)), 1e-5])
