"""A classifier of potentials (models/cdm/potential.py) as layers of the native executor, forward and back to the input.

No logits are computed: of a level's, the weights of the potentials and the Gaussian's own score are tables, made in
float64 when weights are packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgm_engine.executors.native.gradient import append_gradient
from sgm_engine.executors.native.graph import Graph, Value
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Norm, Table, film
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.potential import Block, Film, Mixing, PotentialNet


def lower_potential(
    graph: Graph, model: CDM, shape: tuple[int, int, int], branches: Sequence[tuple[float, int | None]]
) -> None:
    """Emit the layers of ∇ₓ log q_σ of images [*shape]. branches: weights and labels of what is summed, one or two:
    two are one network of twice the potentials."""
    net = model.classifier
    waves, weights = net.features.waves.shape[1], [weight for weight, _ in branches]
    planes, noise = graph.noise_features(
        shape, net.potentials * len(branches), waves, _tables(model, weights), len(net.features.waves)
    )
    fields = [_fields(graph, net, planes, _embedded(graph, net, noise, label)) for _, label in branches]
    out = fields[0] if len(fields) == 1 else graph.concat(*fields)
    append_gradient(graph, (out, graph.potential(out)))


def _embedded(graph: Graph, net: PotentialNet, noise: Value, label: int | None) -> Value:
    """What tells a layer the noise, and the label."""
    first, rows = _dense(net.features.embed1), net.features.label
    first = first if rows is None else first.shifted(Table(lambda: rows.detach()[label][None], 1, (rows,)))
    return graph.conv(graph.conv(noise, first), _dense(net.features.embed2), None, "silu")


def _fields(graph: Graph, net: PotentialNet, planes: Value, e: Value) -> Value:
    h = graph.conv(planes, net.begin, add=[_constant(graph, net.place)])
    for block in net.before:
        h = _block(graph, block, h, e)
    kept, h = h, graph.conv(h, net.down, None, "silu", add=[_constant(graph, net.place2)])
    for part in net.middle:
        h = (_block if isinstance(part, Block) else _mixing)(graph, part, h, e)
    h = graph.conv(graph.nearest(h, kept.height, kept.width), net.up, None, "silu", add=[kept])
    for block in net.behind:
        h = _block(graph, block, h, e)
    return graph.conv(h, net.end, None, "silu")


def _block(graph: Graph, block: Block, h: Value, e: Value) -> Value:
    y = graph.conv(h, block.conv1, None, "silu")
    return graph.conv(y, block.conv2, _film(graph, block.film, e, y.channels), "silu", add=[h])


def _mixing(graph: Graph, part: Mixing, h: Value, e: Value) -> Value:
    y = graph.conv(h, part.narrow, None, "silu")
    flat = graph.reshape(y, (y.channels * y.height * y.width, 1, 1))
    hidden = graph.conv(flat, _mixed(part.mix1, y, 1))
    mixed = graph.conv(hidden, _mixed(part.mix2, y, 0), _film(graph, part.film, e, hidden.channels), "silu")
    return graph.conv(graph.reshape(mixed, y[1:]), part.widen, add=[h])


def _film(graph: Graph, part: Film, e: Value, channels: int) -> Norm:
    """The norm whose γ and β are 1 + a(e) and b(e)."""
    ones = Table(lambda: (torch.arange(2 * channels) < channels).float()[None])
    return film(channels, graph.conv(e, _dense(part.linear).shifted(ones), None, "silu"))


def _dense(linear: nn.Linear) -> Kernel:
    own = (linear.weight, linear.bias)
    return Kernel(linear.in_features, linear.out_features, 1, lambda: own[0][..., None, None], lambda: own[1], own)


def _mixed(linear: nn.Linear, y: Value, side: int) -> Kernel:
    """_dense, with the numbers of y on one side (1: the input) pixel by pixel, as ``reshape`` hands them out."""
    order = torch.arange(y.channels * y.height * y.width).view(y.channels, -1).T.flatten()
    own, kernel = (linear.weight, linear.bias), _dense(linear)
    weight = lambda: own[0].index_select(side, order)[..., None, None]  # noqa: E731
    bias = (lambda: own[1]) if side else (lambda: own[1][order])
    return Kernel(kernel.c_in, kernel.c_out, 1, weight, bias, own)


def _constant(graph: Graph, p: nn.Parameter) -> Value:
    return graph.constant(Table(lambda: p[0], 1, (p,)), tuple(p.shape[1:]))


def _tables(model: CDM, weights: Sequence[float]) -> Table:
    """float64, flat: csrc/cpu/executor/program.h's Potential, then a row a level."""
    net = model.classifier
    features, base, head = net.features, net.features.base, net.head

    def make() -> Tensor:
        by_class = [table.double().T for table in (base.precision, base.shifted, base.share, base.centre)]
        parts = [base.mean, base.basis, base.constant, features.log_noise, features.signal, features.waves, *by_class]
        t = model.level_class
        scale, shift = model.signal[t] * model.scale, model.signal[t] * model.shift
        own = head.weights(base.missed)[t].double()
        level = [t.double()[:, None], scale[:, None], shift[:, None], *(weight * own for weight in weights)]
        return torch.cat([part.detach().double().flatten() for part in (*parts, torch.cat(level, 1))])

    buffers = (base.mean, base.log_variance, base.basis, model.signal, model.level_class)
    return Table(make, len(model.sigmas), (head.weight, *buffers))
