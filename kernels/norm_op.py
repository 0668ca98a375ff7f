"""noise_conditioned_norm as an op: arguments checked, outputs allocated, a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sgm_engine.kernels import reference
from sgm_engine.kernels.arguments import Norm, NormBackward
from sgm_engine.kernels.checks import check_biases, check_norm, check_norm_backward, dense, like
from sgm_engine.kernels.dispatch import launchers, library, register


def noise_conditioned_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    level: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    eps: float = 1e-5,
    groups: int | None = None,
    before: str = "none",
    pool: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(γ·(x̂ + α·ms) + β) with the level's own γ, α, β: InstanceNorm++, see reference.noise_conditioned_norm.

    x: float32, bfloat16 or float16 [N, C, H, W]; the result has its dtype and layout. gamma, alpha, beta: float32 [C],
    or [L, C] (rows may be strided) gathered by level, int64 [N]; None leaves the term out. residual: like x; the norm
    is then of x + residual, rounded to x's dtype, and (y, x + residual) is returned. activation: one of
    reference.ACTIVATIONS. groups: GroupNorm, statistics over that many groups of channels; it must divide C, and alpha
    must be None. before: an activation; the norm is of before(x + residual), rounded, and (y, that) is returned. pool:
    y is the 5×5 mean of the norm, stride 1, padding counted as zeros; activation must be "none".
    Statistics in float32, centred. Differentiable, twice, by recomputation; the first gradient of a GroupNorm without
    levels, residual, before and pool is one kernel. Levels are checked on the CPU only.
    """
    if residual is None and before == "none":
        return torch.ops.sgm_engine.noise_conditioned_norm(x, gamma, alpha, beta, level, activation, eps, groups, pool)
    return torch.ops.sgm_engine.noise_conditioned_norm_both(
        x, residual, gamma, alpha, beta, level, activation, eps, groups, pool, before
    )


def inference_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    level: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    eps: float = 1e-5,
    groups: int | None = None,
    before: str = "none",
    pool: bool = False,
    inverse: float | None = None,
    partials: Tensor | None = None,
    bias: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """noise_conditioned_norm without a gradient, and with what the convolutions beside it may have to do with it.

    inverse: y is float8, reference.quantised(y, inverse), for the next one; not with pool. partials: float32
    [N, slabs, 2, C], what the one before has left of x (triton/conv.py), used up; without residual and before, on CUDA.
    bias, residual_bias: float32 [C], those of the convolutions that made x and residual without them. They are added
    where the sum is made, in float32; without a sum they shift no more than means, and x is read as it is.
    """
    given = (x, residual, bias, residual_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        raise RuntimeError("a norm in float8 has no gradient: use precision='bfloat16' where one is needed")
    y, total = _norm(
        x, residual, gamma, alpha, beta, level, activation, eps, groups, pool, before, inverse, partials, bias,
        residual_bias,
    )  # fmt: skip
    return y if total is None else (y, total)


def _norm(
    x, residual, gamma, alpha, beta, level, activation, eps, groups=None, pool=False, before="none", inverse=None,
    partials=None, bias=None, residual_bias=None,
):  # fmt: skip
    check_norm(x, gamma, alpha, beta, level, activation, residual, groups, pool, before)
    check_biases(x, residual, bias, residual_bias)
    tables = [p for p in (gamma, alpha, beta) if p is not None and p.dim() == 2]
    if level is not None and level.numel() and level.device.type == "cpu":
        low, high = (int(v) for v in level.aminmax())
        if low < 0 or high >= tables[0].shape[0]:
            raise ValueError(f"level must be in [0, {tables[0].shape[0]}), got values from {low} to {high}")
    x = dense(x)
    residual = None if residual is None else like(x, residual)
    if x.device.type == "cpu" and partials is None:
        parameters, biases = (gamma, alpha, beta, level, activation), (bias, residual_bias)
        y, total = _norm_on_cpu(x, residual, parameters, eps, groups, pool, before, biases)
        return y if inverse is None else reference.quantised(y, inverse), total
    launch = launchers(x.device.type)
    out = torch.empty_like(x, dtype=x.dtype if inverse is None else torch.float8_e4m3fn)
    total = None if residual is None and before == "none" else torch.empty_like(x)
    slab = None if partials is None else x.shape[2] * x.shape[3] // partials.shape[1]
    if partials is None:
        partials = torch.empty(launch.norm_workspace_size(x), dtype=torch.float32, device=x.device)
    parameters = (gamma, alpha, beta, level, activation, residual, eps)
    options = (groups, before, pool, inverse, slab, bias, residual_bias)
    launch.norm(Norm(x, *parameters, out, total, partials, *options))
    return out, total


def _norm_on_cpu(x, residual, parameters, eps, groups, pool, before, biases):
    """C++ makes the sum and the norm; what stands before and after them is PyTorch's, and so are biases."""
    launch = launchers("cpu")
    returned = residual is not None or before != "none"
    if before != "none" or biases != (None, None):
        x, residual = reference.summed(x.float(), residual, *biases).to(x.dtype), None
        x = reference.ACTIVATIONS[before](x)
    out, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    workspace = torch.empty(launch.norm_workspace_size(x), dtype=torch.float32)
    launch.norm(Norm(x, *parameters, residual, eps, out, total, workspace, groups))
    if pool:
        out = F.avg_pool2d(out, 5, stride=1, padding=2)
    return out, x if returned and total is None else total


def _fake_norm(x, residual, gamma, alpha, beta, level, activation, eps, groups=None, pool=False, before="none"):
    check_norm(x, gamma, alpha, beta, level, activation, residual, groups, pool, before)
    return torch.empty_like(dense(x)), torch.empty_like(dense(x))


def _save_norm(ctx, inputs, output):
    tensors = [v for v in inputs if v is None or isinstance(v, Tensor)][: 6 if isinstance(output, tuple) else 5]
    ctx.activation, ctx.eps, *ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _norm_backward(grad, x, gamma, beta, activation, eps, groups):
    """(dx, dγ, dβ) of act(γ·x̂ + β): dx like x but NCHW, dγ and dβ float32 [N, C], each sample's own part."""
    check_norm_backward(grad, x, gamma, beta, activation, groups)
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    dx, dgamma, dbeta = torch.empty_like(x), *(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    arguments = NormBackward(grad, x, gamma, beta, activation, eps, groups, dx, dgamma, dbeta)
    launchers(x.device.type).norm_backward(arguments)
    return dx, dgamma, dbeta


def _fake_norm_backward(grad, x, gamma, beta, activation, eps, groups):
    check_norm_backward(grad, x, gamma, beta, activation, groups)
    parts = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *parts


def _is_fused(inputs, groups, pool) -> bool:
    """Whether the one-kernel gradient of GroupNorm is what is asked for: once, no residual, one row of γ and β."""
    vectors = all(p is None or (p.dim() == 1 and p.is_contiguous()) for p in inputs[1:-1])
    return groups is not None and not pool and len(inputs) == 5 and vectors and not torch.is_grad_enabled()


def _backward_norm(ctx, *grads):
    """Recompute through the reference, in float32; under create_graph the result is itself differentiable."""
    groups, pool, before = (*ctx.options, "none")[:3]
    if _is_fused(ctx.saved_tensors, groups, pool):
        x, gamma, _, beta, _ = ctx.saved_tensors
        dx, *parts = torch.ops.sgm_engine.norm_backward(grads[0], x, gamma, beta, ctx.activation, ctx.eps, groups)
        dgamma, dbeta = (
            part.sum(0) if need else None for part, need in zip(parts, ctx.needs_input_grad[1:4:2], strict=True)
        )
        return dx, dgamma, None, dbeta, *[None] * (len(ctx.needs_input_grad) - 4)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where x was computed from the residual, the gradient must not find its way back through that history.
        inputs = [t if t is None else t.view_as(t) for t in ctx.saved_tensors]
        x, residual, gamma, alpha, beta, level = (inputs[0], None, *inputs[1:]) if len(inputs) == 5 else inputs
        residual = residual if residual is None else residual.float()
        out = reference.noise_conditioned_norm(
            x.float(), gamma, alpha, beta, level, ctx.activation, residual, ctx.eps, groups, before, pool
        )
        out = out if isinstance(out, tuple) else (out,)
        wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        grads = [g.to(o.dtype) for g, o in zip(grads, out, strict=True) if o.requires_grad]
        out = [o for o in out if o.requires_grad]  # not the sum, if only γ, α or β learn
        found = iter(torch.autograd.grad(out, wanted, grads, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


_arguments = "Tensor? gamma, Tensor? alpha, Tensor? beta, Tensor? level, str activation, float eps, int? groups=None, "
_arguments += "bool pool=False"
register(
    f"noise_conditioned_norm(Tensor x, {_arguments}) -> Tensor",
    lambda x, *rest: _norm(x, None, *rest)[0],
    lambda x, *rest: _fake_norm(x, None, *rest)[0],
)
register(
    f'noise_conditioned_norm_both(Tensor x, Tensor? residual, {_arguments}, str before="none") -> (Tensor, Tensor)',
    _norm,
    _fake_norm,
)
register(
    "norm_backward(Tensor grad, Tensor x, Tensor? gamma, Tensor? beta, str activation, float eps, int groups) -> "
    "(Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_norm_backward,
)
for _name in ("noise_conditioned_norm", "noise_conditioned_norm_both"):
    torch.library.register_autograd(f"sgm_engine::{_name}", _backward_norm, setup_context=_save_norm, lib=library)
