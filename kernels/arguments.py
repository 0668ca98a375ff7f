"""What the launchers of an op take: one structure each, the same on every backend. They check and allocate nothing.

Tensors lie on one device and are dense, NCHW or NHWC each on its own unless said. ops.py and norm_op.py check arguments
and make these; a loop whose tensors have been checked once makes its own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """out ← a·x + b·score + c·z + d·previous for every live slot; an idle one (row ≥ stop) is neither read nor written.

    x, previous, out: float32 [B, C, H, W]; score: float32, bfloat16 or float16; out may be x. coef: float32 [R, 4],
    (a, b, c, d); draw: int32 [R], the bits of the uint32 draw of z. row, stop, seed, sample_id, bad_row: int64 [B]. A
    live slot's row must be in the table; stop None: every slot is live. bad_row: lowered to the slot's row where a
    result is not finite. advance: row goes up by 1 in every live slot. keep: float32 [R, 2], (e, f): previous ← e·x +
    f·score, of the old x, unless both are 0. gain: float32 [B]: b·gain², c·gain.
    known: float32 in the layout of out, NaN where not known; elsewhere out is known + known_sigma[row]·z, z of draw
    known_draw[row] in stream "inpaint". known_sigma: float32 [R]; known_draw: int32 [R]. Rounded as csrc/update.h says.
    """

    x: Tensor
    score: Tensor
    coef: Tensor
    draw: Tensor
    row: Tensor
    stop: Tensor | None
    seed: Tensor
    sample_id: Tensor
    bad_row: Tensor | None
    previous: Tensor | None
    out: Tensor
    advance: bool
    keep: Tensor | None = None
    gain: Tensor | None = None
    known: Tensor | None = None
    known_sigma: Tensor | None = None
    known_draw: Tensor | None = None


class Norm(NamedTuple):
    """out ← act(norm(s)), s = before(x + residual), which is written to sum_out; without either, s is x.

    x: float32, bfloat16 or float16 [N, C, H, W]; residual, out, sum_out: like x; out may be x or sum_out, and sum_out
    may be x or residual. gamma, alpha, beta: float32 [C], or [L, C] with dense rows; None leaves the term out. level:
    int64 [N], the row of [L, C]. workspace: float32, norm_workspace_size(x) elements, any content. groups: divides C,
    statistics are then over a group's channels; alpha is None. pool: out is the 5×5 mean of norm(s), stride 1, padding
    counted as zeros; activation is then "none" and out neither x nor sum_out.
    bias, residual_bias: float32 [C], added to x and to residual first, which are without those of their convolutions.
    before, pool and biases are a GPU's alone; inverse and slab Triton's. inverse: of an out in float8, which is what
    would else be written, times inverse, rounded; not with pool. slab: x is s, and workspace holds the partials of
    every so many of its pixels, as the convolution left them.
    """

    x: Tensor
    gamma: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    level: Tensor | None
    activation: str
    residual: Tensor | None
    eps: float
    out: Tensor
    sum_out: Tensor | None
    workspace: Tensor
    groups: int | None = None
    before: str = "none"
    pool: bool = False
    inverse: float | None = None
    slab: int | None = None
    bias: Tensor | None = None
    residual_bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.gamma, self.alpha, self.beta

    @property
    def row_strides(self) -> tuple[int, ...]:
        """Elements between rows of γ, α and β; 0 for those that have one."""
        return tuple(p.stride(0) if p is not None and p.dim() == 2 else 0 for p in self.parameters)


class NormBackward(NamedTuple):
    """The gradient of a GroupNorm with activation, act(γ·x̂ + β): dx, and each sample's part of dγ and dβ.

    grad, x, dx: one dtype, NCHW. gamma, beta: float32 [C]; dgamma, dbeta: float32 [N, C].
    """

    grad: Tensor
    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    activation: str
    eps: float
    groups: int
    dx: Tensor
    dgamma: Tensor
    dbeta: Tensor
