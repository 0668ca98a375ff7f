"""What a network computes from the level alone, as tables: evaluated for every level at once."""

from __future__ import annotations

from numbers import Number

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sgm_engine.executors.native.norm import Table, Unsupported
from sgm_engine.rewriting.acceleration import Traced


class LevelTables:
    """The nodes of a traced graph that depend on no image: on the level, on parameters and on the batch size only."""

    def __init__(self, traced: Traced, levels: int):
        self.traced, self.levels = traced, levels
        self.varies: dict[fx.Node, bool] = {}  # node → whether it depends on the level
        level = [node for node in traced.graph.nodes if node.op == "placeholder"][1]
        for node in traced.graph.nodes:
            inputs = node.all_input_nodes
            if node is level or node.op == "get_attr":
                self.varies[node] = node is level
            elif _is_size(node):
                self.varies[node] = node.args[1] == 0
            elif node.op not in ("placeholder", "output") and all(n in self.varies for n in inputs):
                self.varies[node] = any(self.varies[n] for n in inputs)

    def has(self, what: object) -> bool:
        """Whether it is a number or depends on the level alone."""
        return what in self.varies if isinstance(what, fx.Node) else isinstance(what, Number)

    def of(self, what: fx.Node | Number, channels: int) -> Table:
        """What is broadcast against images [N, channels, H, W]. Raises Unsupported if it varies within an image."""
        if isinstance(what, Number):
            return Table.of(what)
        rows = self.levels if self.varies[what] else 1
        table = Table(lambda: _as_rows(self._evaluate(what), rows, channels), rows, self._behind(what))
        table.make()  # refuses at once what is no table
        return table

    def scalars(self, what: object) -> Table | None:
        """[levels, 1]; None if it is not one number a level."""
        if not isinstance(what, fx.Node) or not self.varies.get(what) or self._evaluate(what).numel() != self.levels:
            return None
        return Table(lambda: self._evaluate(what).reshape(self.levels, 1), self.levels, self._behind(what))

    def index(self, what: fx.Node) -> Table | None:
        """int64 [levels], which row of an embedding is looked up; None if it is the level itself."""
        if what.op == "placeholder":
            return None
        return Table(lambda: self._evaluate(what).reshape(self.levels), self.levels, self._behind(what))

    def _ancestors(self, node: fx.Node) -> list[fx.Node]:
        """In order, the node last."""
        found, todo = {node}, [node]
        while todo:
            top = todo.pop()
            new = [] if _is_size(top) else [n for n in top.all_input_nodes if n not in found]
            found.update(new)
            todo += new
        return [n for n in self.varies if n in found]

    def _behind(self, node: fx.Node) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        for n in self._ancestors(node):
            if n.op == "get_attr":
                tensors.append(self.traced.resolve(n.target))
            elif n.op == "call_module":
                module = self.traced.modules[n.target]
                tensors += [*module.parameters(), *module.buffers()]
        return tuple({id(t): t for t in tensors}.values())

    @torch.no_grad()
    def _evaluate(self, node: fx.Node) -> Tensor:
        """Its value with a batch of all levels."""
        known: dict[fx.Node, object] = {}
        for n in self._ancestors(node):
            args, kwargs = map_arg(((), {}) if _is_size(n) else (n.args, n.kwargs), known.__getitem__)
            if n.op == "placeholder":
                known[n] = torch.arange(self.levels)
            elif n.op == "get_attr":
                known[n] = self.traced.resolve(n.target)
            elif _is_size(n):
                known[n] = self.levels if n.args[1] == 0 else self.traced.values[n]
            elif n.op == "call_module":
                known[n] = self.traced.modules[n.target](*args, **kwargs)
            elif n.op == "call_method":
                known[n] = getattr(args[0], n.target)(*args[1:], **kwargs)
            else:
                known[n] = n.target(*args, **kwargs)
        return torch.as_tensor(known[node])


def _is_size(node: fx.Node) -> bool:
    """x.size(i), of whichever x: the batch's, and those that happen to be like the trace's batch."""
    return node.op == "call_method" and node.target == "size" and len(node.args) == 2


def _as_rows(table: Tensor, rows: int, channels: int) -> Tensor:
    """[rows or 1, C or 1] of what is broadcast against [N, C, H, W]."""
    shape = (1,) * (4 - table.dim()) + tuple(table.shape)
    if len(shape) != 4 or shape[2:] != (1, 1) or shape[0] not in (1, rows) or shape[1] not in (1, channels):
        raise Unsupported(f"a table of shape {tuple(table.shape)} that varies within an image")
    return table.detach().float().reshape(shape[:2]).expand(rows, -1)
