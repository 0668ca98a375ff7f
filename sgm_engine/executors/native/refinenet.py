"""NCSN and NCSNv2 as layers of the native executor: a walk over the modules of sgm_engine.models."""

from __future__ import annotations

from sgm_engine.executors.native.graph import Graph, Value
from sgm_engine.executors.native.norm import Table
from sgm_engine.models import blocks
from sgm_engine.models.ncsn import RefineNet


def lower_refinenet(graph: Graph, model: RefineNet, height: int, width: int) -> None:
    """Emit the layers of ``model`` for images [model.channels, height, width]."""
    if height % model.size_divisor() or width % model.size_divisor():
        raise ValueError(f"image size must divide by {model.size_divisor()}, got {height}×{width}")
    h = graph.conv(graph.load(model.channels, height, width, 2.0, -1.0), model.begin_conv)
    outputs = {}
    for stage in model.stages:
        for block in model._modules[stage.name]:
            h = _res_block(graph, block, h)
        outputs[stage.name] = h
    for i, refine in enumerate(model.refines):
        skip = outputs[refine.stage]
        h = _refine_block(graph, model._modules[refine.name], [skip, h] if i else [skip])
    graph.store(h, model.end_conv, model.normalizer, "elu")
    if model.divide_by_sigma:
        graph.divide_by(Table(lambda: model.sigmas, len(model.sigmas), (model.sigmas,)))


def _res_block(graph: Graph, block: blocks.ResBlock, x: Value) -> Value:
    h = graph.conv(x, block.conv1, block.normalize1, "elu")
    if isinstance(block.shortcut, blocks.PoolConv1x1):
        shortcut = graph.conv(graph.mean_pool(x), block.shortcut.conv)
    else:
        shortcut = x if block.shortcut is None else graph.conv(x, block.shortcut)
    pool = isinstance(block.conv2, blocks.ConvMeanPool)
    return graph.conv(h, block.conv2.conv if pool else block.conv2, block.normalize2, "elu", [shortcut], pool)


def _rcu_block(graph: Graph, block: blocks.RCUBlock, x: Value) -> Value:
    for i in range(1, block.blocks + 1):
        h = x
        for j in range(1, block.stages + 1):
            add = [x] if j == block.stages else []
            h = graph.conv(h, block._modules[f"{i}_{j}_conv"], block._modules.get(f"{i}_{j}_norm"), "elu", add)
        x = h
    return x


def _msf_block(graph: Graph, block: blocks.MSFBlock, xs: list[Value]) -> Value:
    norms = block.norms if block.norms is not None else [None] * len(xs)
    total: list[Value] = []
    for x, conv, norm in zip(xs, block.convs, norms, strict=True):
        if (x.height, x.width) == (xs[0].height, xs[0].width):
            total = [graph.conv(x, conv, norm, add=total)]
        else:
            total = [graph.upsample(graph.conv(x, conv, norm), xs[0].height, xs[0].width, add=total)]
    return total[0]


def _crp_block(graph: Graph, block: blocks.CRPBlock, x: Value) -> Value:
    x = path = graph.activate(x, "elu")
    last = len(block.convs) - 1
    for i, conv in enumerate(block.convs):
        norm = None if block.norms is None else block.norms[i]
        pooled = graph.pool5(path, "max" if norm is None else "mean", norm)
        if i == last:  # the sum so far is needed once only, so it is added here
            return graph.conv(pooled, conv, add=[x] if path is x else [x, path])
        if i:
            x = graph.activate(x, "none", add=[path])
        path = graph.conv(pooled, conv)
    return x


def _refine_block(graph: Graph, block: blocks.RefineBlock, xs: list[Value]) -> Value:
    hs = [_rcu_block(graph, adapt, x) for adapt, x in zip(block.adapt_convs, xs, strict=True)]
    h = hs[0] if block.msf is None else _msf_block(graph, block.msf, hs)
    return _rcu_block(graph, block.output_convs, _crp_block(graph, block.crp, h))
