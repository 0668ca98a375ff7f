"""What a step asks of a GPU, counted on the rewritten network, without one: ``python -m bench.gpu.counts``.

Convolutions, norms, kernels, operations and bytes of NCSN on CIFAR-10, with empty tables: convolutions are cuDNN's, a
bias that no norm adds is a kernel of PyTorch's own, norms are Triton's. Not counted: what cuDNN launches beside its
products.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import fx, nn
from torch.nn import functional as F

from sgm_engine.programs.arguments import Program

NGF, SIDE, BATCH = 128, 32, 128
HALF, FULL = 2, 4  # bytes of bfloat16 and of float32


@dataclass(frozen=True)
class Op:
    """Kernels of one kind. shape: (C, H, W) of what comes out · read, written: bytes of an image · weights: bytes.

    form: of a convolution (channels in, kernel, stride, dilation); of a norm (residual, before, pool, activation, bias,
    residual_bias).
    """

    kind: str
    shape: tuple[int, ...]
    kernels: int
    read: int
    written: int
    flops: int = 0  # of an image
    weights: int = 0
    form: tuple = ()


@cache
def step(ngf: int = NGF, side: int = SIDE) -> tuple[Op, ...]:
    """One step in bfloat16, in order: the network as ``accelerate`` has it on a GPU, then the update."""
    from sgm_engine.models.ncsn import NCSN
    from sgm_engine.rewriting.acceleration import Accelerated

    model = NCSN(torch.logspace(0, -2, 10), channels=3, ngf=ngf, image_size=side).eval().requires_grad_(False)
    network = Accelerated(model)
    x, level = torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.int64)
    traced = network.traced(network.norms(), x, level, as_on_gpu=True)
    found = [op for node in traced.graph.nodes for op in _of(node, traced.modules, traced.values)]
    level = Op("level", (1,), 1, 16, 8)
    return level, *found, Op("update", (3, side, side), 1, (FULL + HALF) * x.numel(), FULL * x.numel())


def convolutions(ops: tuple[Op, ...]) -> Counter[tuple[int, int, int, int]]:
    """(channels in, channels out, side, dilation) → how many, of the 3×3 between the first and the last."""
    found = [op for op in ops if op.kind == "convolution"][1:-1]
    return Counter((op.form[0], *op.shape[:2], op.form[3]) for op in found if op.form[1:3] == (3, 1))


def total(ops: tuple[Op, ...], what: str, *kinds: str) -> int:
    """Of an image: kernels, read, written, flops or weights of all operations, or of some kinds."""
    return sum(getattr(op, what) for op in ops if not kinds or op.kind in kinds)


def moved(ops: tuple[Op, ...], *kinds: str) -> int:
    return total(ops, "read", *kinds) + total(ops, "written", *kinds)


def floor(ops: tuple[Op, ...]) -> int:
    """Bytes of an image that convolutions, and norms of one pass each, have to move: without biases and casts."""
    reread = sum(HALF * math.prod(op.shape) for op in ops if op.kind == "norm")
    return moved(ops, "convolution", "norm", "mean", "sum", "upsampling", "update") - reread


def _of(node: fx.Node, modules: dict[str, nn.Module], values: dict[fx.Node, object]) -> Iterator[Op]:
    if node.op not in ("call_module", "call_function") or node.target is operator.getitem:
        return
    from sgm_engine.rewriting.biases import BiasFree, BiasOf
    from sgm_engine.rewriting.norms import upsampled
    from sgm_engine.rewriting.recognise import FusedNorm
    from sgm_engine.rewriting.rewrite import PooledConv

    module = modules.get(node.target)
    if isinstance(module, BiasOf):
        return
    value = values[node]
    shape = tuple((value[0] if isinstance(value, tuple) else value).shape[1:])
    source = next(arg for arg in node.args if isinstance(arg, fx.Node))
    into = tuple(values[source].shape[1:])
    size, small = math.prod(shape), math.prod(into)
    if isinstance(module, FusedNorm):
        yield _norm(size, shape, node.kwargs)
    elif isinstance(module, PooledConv):
        yield from _convolution(module._conv[0], module.kernel, 2, module.biased, into, shape)
    elif isinstance(module, (nn.Conv2d, BiasFree)):
        conv = module if isinstance(module, nn.Conv2d) else module.conv
        yield from _convolution(conv, conv.weight, 1, conv is module, into, shape)
    elif node.target is upsampled:
        yield Op("upsampling", shape, 1, HALF * small, HALF * size)
    elif node.target is F.avg_pool2d:
        yield Op("mean", shape, 1, HALF * small, HALF * size)
    elif node.target is operator.add:
        yield Op("sum", shape, 1, 2 * HALF * size, HALF * size)
    else:  # of the state, before the first convolution
        yield Op("scaling", shape, 1, FULL * size, FULL * size)


def _convolution(
    conv: nn.Conv2d, weight: torch.Tensor, stride: int, biased: bool, into: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[Op]:
    size, small, kernel = math.prod(shape), math.prod(into), weight.shape[-1]
    if into[0] == 3:  # the state, which autocast makes 16 bits
        yield Op("cast", into, 1, FULL * small, HALF * small)
    form = (into[0], kernel, stride, conv.dilation[0])
    flops = 2 * into[0] * kernel**2 * size
    yield Op("convolution", shape, 1, HALF * small, HALF * size, flops, HALF * weight.numel(), form)
    if biased and conv.bias is not None:
        yield Op("bias", shape, 1, HALF * size, HALF * size)


def _norm(size: int, shape: tuple[int, ...], options: dict) -> Op:
    """A pass for the moments, which also makes and writes a sum, and one that reads that and applies."""
    residual, before, pool = "residual" in options, options.get("before", "none"), options.get("pool", False)
    summed = residual or before != "none"
    biases = ("bias" in options, "residual_bias" in options)
    form = (residual, before, pool, options.get("activation", "none"), *biases)
    return Op("norm", shape, 2, HALF * size * (2 + residual), HALF * size * (1 + summed), form=form)


def lines(ops: tuple[Op, ...], batch: int = BATCH) -> Iterator[str]:
    yield f"NCSN on CIFAR-10, one step in bfloat16; bytes at batch {batch}"
    yield f"{'':24}{'ops':>5}{'kernels':>9}{'GFLOP an image':>16}{'GB':>8}"
    for kind in dict.fromkeys(op.kind for op in ops):
        yield _line(kind, ops, batch, kind)
    yield _line("all", ops, batch)
    yield f"weights: {total(ops, 'weights') / 1e6:.1f} MB; what has to be moved: {floor(ops) / 1e6:.1f} MB an image"
    for (c_in, c_out, side, dilation), count in convolutions(ops).most_common():
        share = count * 2 * 9 * c_in * c_out * side**2 / total(ops, "flops")
        yield f"3×3 {c_in}→{c_out} at {side}², dilation {dilation}: {count}, {share:.1%} of the operations"


def _line(title: str, ops: tuple[Op, ...], batch: int, *kinds: str) -> str:
    count = sum(op.kind in kinds for op in ops) if kinds else len(ops)
    flops, gigabytes = total(ops, "flops", *kinds) / 1e9, moved(ops, *kinds) * batch / 1e9
    return f"{title:24}{count:5}{total(ops, 'kernels', *kinds):9}{flops:16.2f}{gigabytes:8.2f}"


if __name__ == "__main__":
    Program("bench.gpu.counts", __doc__).parse_args()
    print("\n".join(lines(step())))
