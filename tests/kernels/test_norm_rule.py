"""The rule that norms are held to notices planted defects; and PyTorch's own norms agree."""

import pytest
import torch
from torch.nn import functional as F

from sgm_engine.kernels import ops, reference
from tests.kernels.norms import check, embedding, images, launch


def _formula(x, gamma, alpha, beta, level, defect):
    """InstanceNorm++ in float32 as someone might get it wrong."""
    gamma, alpha, beta = (p[level][:, :, None, None] for p in (gamma, alpha, beta))
    pixels, channels = x.shape[2] * x.shape[3], x.shape[1]
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().mean((2, 3), keepdim=True)
    if defect == "E[x²] − E[x]²":
        variance = (x.square().mean((2, 3), keepdim=True) - mean.square()).clamp(min=0)
    if defect == "N − 1 over pixels":
        variance = variance * pixels / (pixels - 1)
    rstd = 1 / (variance.sqrt() + 1e-5) if defect == "eps outside the root" else torch.rsqrt(variance + 1e-5)
    spread = mean - mean.mean(1, keepdim=True)
    across = spread.square().sum(1, keepdim=True) / (channels if defect == "C over channels" else channels - 1)
    ms = spread * torch.rsqrt(across + 1e-5)
    if defect == "alpha's rows swapped":
        alpha = alpha.flip(0)
    if defect == "alpha outside gamma":
        return (x - mean) * rstd * gamma + alpha * ms + beta
    return gamma * ((x - mean) * rstd + alpha * ms) + beta


DEFECTS = (
    "E[x²] − E[x]²",
    "N − 1 over pixels",
    "eps outside the root",
    "C over channels",
    "alpha's rows swapped",
    "alpha outside gamma",
)


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_rule_notices(defect):
    x, arguments = images((2, 24, 6, 6), mean=30.0), (*embedding(3, 24), torch.tensor([0, 2]))
    check(_formula(x, *arguments, None), x, *arguments)
    with pytest.raises(AssertionError, match="limit"):
        check(_formula(x, *arguments, defect), x, *arguments)


def _group_norm(x, groups, defect):
    """Group norm in float32 as someone might get it wrong."""
    part = x.unflatten(1, (groups, -1)) if defect != "strided groups" else x.unflatten(1, (-1, groups)).transpose(1, 2)
    mean, n = part.mean((2, 3, 4), keepdim=True), part[0, 0].numel()
    variance = (part - mean).square().sum((2, 3, 4), keepdim=True) / (n - 1 if defect == "N − 1" else n)
    if defect == "no spread between channels":
        variance = part.var((3, 4), correction=0, keepdim=True).mean(2, keepdim=True)
    part = (part - mean) * torch.rsqrt(variance + 1e-5)
    return (part if defect != "strided groups" else part.transpose(1, 2)).reshape(x.shape)


@pytest.mark.parametrize("defect", ["strided groups", "N − 1", "no spread between channels"])
def test_the_rule_notices_wrong_groups(defect):
    x = images((2, 24, 6, 6), mean=1.0)
    check(_group_norm(x, 4, None), x, groups=4)
    with pytest.raises(AssertionError, match="limit"):
        check(_group_norm(x, 4, defect), x, groups=4)


def test_agrees_with_torch_group_norm():
    x, (gamma, _, beta) = images((3, 18, 10, 10), mean=1.0), (p[0] for p in embedding(1, 18))
    found = ops.noise_conditioned_norm(x, gamma, None, beta, groups=6)
    torch.testing.assert_close(found, F.group_norm(x, 6, gamma, beta), rtol=1e-5, atol=2e-6)


def test_agrees_with_torch_instance_norm():
    x = images((3, 18, 10, 10))
    torch.testing.assert_close(launch(x)[0], F.instance_norm(x, eps=1e-5), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["x", "residual", "gamma"])
def test_a_gradient_for_one_argument_alone(name):
    """The sum that is returned beside the norm has none if only γ learns."""
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 4, 3, 3), "residual": (2, 4, 3, 3), "gamma": (4,)}
    arguments = {n: torch.randn(shape, generator=random) for n, shape in shapes.items()}
    found = []
    for norm in (ops.noise_conditioned_norm, reference.noise_conditioned_norm):
        tensors = {n: t.clone().requires_grad_(n == name) for n, t in arguments.items()}
        norm(**tensors, activation="elu")[0].square().sum().backward()
        found.append(tensors[name].grad)
    torch.testing.assert_close(*found)
