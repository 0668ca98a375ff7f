"""The gradient of a native graph in its input, as more layers of the same graph: reverse mode over its own record.

Weights get no gradient. A convolution's gradient is a convolution with its kernel turned round; what a layer reads of
the way forward (the input of a norm, and its statistics) the arena keeps until then.
"""

from __future__ import annotations

from collections.abc import Callable

from sgm_engine import _C
from sgm_engine.executors.native.graph import Graph, Layer, Value
from sgm_engine.executors.native.norm import Unsupported

Op = _C.Op


def append_gradient(graph: Graph, *ends: tuple[Value, Value]) -> None:
    """End ``graph``, which begins with ``embed`` or ``noise_features``, by its gradient in x, given those in its ends:
    pairs of a value and the gradient in it.

    Raises Unsupported.
    """
    way = _Way(graph)
    for out, gradient in ends:
        way.sums[out.id] = gradient
    for layer in reversed(tuple(graph.layers)):
        if layer.out is not None and layer.out.id in way.sums:
            way.back(layer, way.sums.pop(layer.out.id))


class _Way:
    """sums: value → the sum of the gradients that layers behind it have given so far."""

    def __init__(self, graph: Graph):
        self.graph, self.sums, self.waves = graph, {}, None

    def give(self, x: Value, emit: Callable[[list[Value]], Value]) -> None:
        """emit(addends) makes one more gradient of x, the sum so far added."""
        self.sums[x.id] = emit([self.sums[x.id]] if x.id in self.sums else [])

    def give_on(self, x: Value, g: Value) -> None:
        self.give(x, lambda add: self.graph.activate(g, "none", add=add) if add else g)

    def back(self, layer: Layer, g: Value) -> None:
        graph, x = self.graph, layer.x
        for a, scale in layer.add:
            if scale != 1:
                raise Unsupported(f"the gradient of an addend times {scale}")
            self.give_on(a, g)
        if layer.op == Op.waves:
            self.waves = g
        elif layer.op == Op.noise_features:
            graph.store_potential(g, self.waves)
        elif layer.op == Op.constant:
            pass  # a parameter's: it gets none
        elif layer.op == Op.reshape:
            self.give(x, lambda add: self._plus(graph.reshape(g, x[1:]), add))
        elif layer.op == Op.embed:
            graph.store_gradient(g, layer.out)
        elif layer.op == Op.conv and layer.kernel is not None:
            self._conv(layer, g)
        elif layer.op == Op.attention and layer.turns:
            self.give(x, lambda add: self._plus(graph.attention_backward(x, g), add))
        elif layer.op == Op.nearest:
            self.give(x, lambda add: graph.block_sum(g, x.height, x.width, add))
        elif layer.op == Op.concat:
            self.give(x, lambda add: graph.slice(g, 0, x.channels, add))
            second = layer.second
            self.give(second, lambda add: graph.slice(g, x.channels, second.channels, add))
        else:
            raise Unsupported(f"the gradient of the layer {layer.op.name}")

    def _conv(self, layer: Layer, g: Value) -> None:
        graph, x, kernel = self.graph, layer.x, layer.kernel
        if kernel.stride == 2:
            g = graph.spread(g, x.height, x.width)
        elif kernel.stride != 1:
            raise Unsupported(f"the gradient of a convolution of stride {kernel.stride}")
        turned = kernel.transposed()
        if layer.norm is None and layer.activation == "none":
            return self.give(x, lambda add: graph.conv(g, turned, add=add))
        inner, norm, activation = graph.conv(g, turned), layer.norm, layer.activation
        if norm is None or norm.groups == 0:
            self.give(x, lambda add: graph.affine_backward(x, inner, norm, activation, add))
            if norm is not None and norm.source is not None:
                film = graph.film_backward(x, inner, norm, activation)
                self.give(norm.source, lambda add: self._plus(film, add))
            return
        self.give(x, lambda add: graph.norm_backward(x, inner, layer.norm, layer.activation, add))

    def _plus(self, value: Value, add: list[Value]) -> Value:
        return self.graph.activate(value, "none", add=add) if add else value
