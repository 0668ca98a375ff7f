"""What the tests of native cdm share."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.executors.native.gradient import append_gradient
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.norm import Norm, Table
from sgm_engine.models.cdm.config import CDMConfig
from tests.native.layers import relative_error

LEVELS = 20


def small(seed=0, **options):
    """A random classifier: every parameter matters."""
    options = {"channels": 1, "image_size": 12, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (6,),
               "schedule": "vp_geometric", "levels": LEVELS, **options}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CDMConfig(**options).build().eval()
        for p in model.parameters():
            if p.dim() == 1:
                nn.init.normal_(p, 0.3, 0.5)
        nn.init.normal_(model.classifier.head.weight, std=0.3)
    return model


def question(model, batch, seed=0):
    """Images as a chain meets them, x [B, C, H, W], at levels that begin with the first and the last."""
    generator = torch.Generator().manual_seed(seed)
    levels = len(model.sigmas)
    level = torch.randint(levels, (batch,), generator=generator)
    level[0], level[-1] = levels - 1, 0
    noise = torch.randn(batch, *model.shape, generator=generator)
    return torch.rand(noise.shape, generator=generator) + model.sigmas[level].view(-1, 1, 1, 1) * noise, level


def score64(model, x, level):
    return copy.deepcopy(model).double()(x.double(), level)


def worst(found, want):
    """The largest relative error of an image."""
    return max(relative_error(f, w) for f, w in zip(found, want, strict=True))


def gradient_of(emit, x, gamma, octaves=(), patch=1):
    """∇ₓ Σ γ_c·silu(out_c) of the layers that ``emit(graph, value)`` builds on what embed makes of x."""
    graph = Graph(len(x), "float32")
    one = torch.tensor([[1.0, 0, 1, 0, 0]], dtype=torch.float64)
    out = emit(graph, graph.embed(x.shape[1:], patch, octaves, Table(lambda: one)))
    scale = Norm(out.channels, 0, 0.0, (Table(lambda: gamma[None, : out.channels]), None, None))
    append_gradient(graph, (out, graph.slope(out, scale, "silu")))
    graph.plan()
    return graph.run(x, torch.zeros(len(x), dtype=torch.int64), torch.full_like(x, torch.nan))


def gradients_agree(cases, x, gamma):
    """cases: name → (layers for gradient_of, what they compute in float64)."""
    for name, (emit, f) in cases.items():
        x64 = x.double().requires_grad_()
        out = f(x64)
        want = torch.autograd.grad((F.silu(out) * gamma[: out.shape[1], None, None].double()).sum(), x64)[0]
        assert relative_error(gradient_of(emit, x, gamma), want) < 2e-6, name
