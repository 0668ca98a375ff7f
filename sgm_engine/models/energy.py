"""Energies: networks that answer with one number a sample, E(x). Their score is −∇E, one backward pass to x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """function(x) → [N] and its gradient in x [N, …]. Differentiable itself where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
    return (value, gradient) if create_graph else (value.detach(), gradient)
