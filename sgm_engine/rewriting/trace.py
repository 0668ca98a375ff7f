"""Trace a module at one sample shape: torch.fx, with every value's shape known and the batch size left open.

Plain torch.fx stops at ``torch.zeros(x.shape[0], c, *shape)`` and at conditions on sizes. Here each proxy also carries
a fake tensor, so that channels, height and width are numbers while tracing; the first dimension stays symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from sgm_engine.rewriting.altered import altered, in_training

BATCH = 7  # a size that channels, heights and widths rarely have; where they do, they are left symbolic too
CREATORS = ("zeros", "ones", "empty", "full", "arange")  # of torch: given a proxy as a size, they do not let fx see it


class _Root(nn.Module):
    """Stands above the user's module: torch.fx stores constants in its root, and the user's object must not change."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.module(x, level)


class _Proxy(fx.Proxy):
    @property
    def shape(self) -> tuple:
        value = self.tracer.values.get(self.node)
        if not isinstance(value, Tensor):
            return self.__getattr__("shape")
        return tuple(self._size(i) if i == 0 or n == BATCH else n for i, n in enumerate(value.shape))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    ndim = property(dim)

    @property
    def dtype(self) -> torch.dtype:
        value = self.tracer.values.get(self.node)
        return value.dtype if isinstance(value, Tensor) else self.__getattr__("dtype")

    def __iter__(self):
        value = self.tracer.values.get(self.node)
        if isinstance(value, (tuple, list)):
            return iter([self[i] for i in range(len(value))])
        return super().__iter__()

    def __iadd__(self, other):  # torch.fx by itself would trace a += b as a = a + b, whoever else sees a
        return self._in_place(operator.iadd, other)

    def __isub__(self, other):
        return self._in_place(operator.isub, other)

    def __imul__(self, other):
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other):
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def _size(self, i: int):
        return self.tracer.create_proxy("call_method", "size", (self, i), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, leaves: set[nn.Module], inputs: tuple[Tensor, ...]):
        super().__init__()
        self.leaves, self.inputs = leaves, list(inputs)
        self.values: dict[fx.Node, object] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.evaluating = False

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr, value, cache):
        return value if self.evaluating else super().getattr(attr, value, cache)

    def call_module(self, module, forward, args, kwargs):
        return forward(*args, **kwargs) if self.evaluating else super().call_module(module, forward, args, kwargs)

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind != "output" and not self.evaluating:
            self.evaluating = True
            try:
                with self.fake, torch.no_grad():
                    self.values[proxy.node] = self._evaluate(proxy.node)
            finally:
                self.evaluating = False
        return proxy

    def _value(self, node: fx.Node) -> object:
        if node not in self.values and node.op == "get_attr":  # a constant tensor: torch.fx makes its node by itself
            self.values[node] = self._evaluate(node)
        return self.values[node]

    def _evaluate(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            value = self.inputs.pop(0)
            return torch.empty(BATCH, *value.shape[1:], dtype=value.dtype, device=value.device)
        if node.op == "get_attr":
            return self.fake.from_tensor(operator.attrgetter(node.target)(self.root))
        args, kwargs = (map_arg(a, self._value) for a in (node.args, node.kwargs))
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        module = self.root.get_submodule(node.target)
        return torch.empty_like(args[0]) if module in self.leaves else module.forward(*args, **kwargs)


@contextmanager
def _creators_traced(tracer: _Tracer) -> Iterator[None]:
    """While it lasts, torch.zeros and the like make a node where one of their arguments is a proxy."""

    def traced(original: Callable) -> Callable:
        def create(*args, **kwargs):
            proxies = any(isinstance(a, fx.Proxy) for a in pytree.tree_leaves((args, kwargs)))
            return (
                tracer.create_proxy("call_function", original, args, kwargs) if proxies else original(*args, **kwargs)
            )

        return create

    originals = {name: getattr(torch, name) for name in CREATORS}
    try:
        for name, original in originals.items():
            setattr(torch, name, traced(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def untraceable(module: nn.Module) -> str | None:
    """Why a trace of ``module``, in float32 on the CPU, might compute something else than the module; None if not."""
    if name := in_training(module):
        return f"{name} is in training mode: call model.eval() first"
    for name, part in module.named_modules():
        if why := altered(part):
            return f"{name or 'the network'}: {why}"
        for key, value in vars(part).items():
            for leaf in [] if key.startswith("_") else pytree.tree_leaves(value):
                of_torch = getattr(leaf, "__module__", "").startswith("torch")
                if callable(leaf) and not isinstance(leaf, (nn.Module, type)) and not of_torch:
                    return f"{name}.{key} holds a function, whose state a trace cannot follow".lstrip(".")
    for t in (*module.parameters(), *module.buffers()):
        if t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32):
            return f"its parameters must be float32 on the CPU, and one is {t.dtype} on {t.device}"
    return None


def trace(module: nn.Module, leaves: set[nn.Module], x: Tensor, level: Tensor) -> tuple[fx.Graph, Callable, dict]:
    """The graph of module(x, level), what its targets mean (name → module or tensor), and node → fake value.

    leaves: modules that stay one call, and return what their first argument is like. Raises whatever the module raises
    where it depends on values.
    """
    tracer = _Tracer(leaves, (x, level))
    with _creators_traced(tracer):
        graph = tracer.trace(_Root(module))
    root, values = tracer.root, pytree.tree_map_only(Tensor, _described, tracer.values)
    # Their mode keeps weak references to parameters, as long as a cycle lives, and torch.utils.swap_tensors minds them.
    describer = tracer.fake.fake_tensor_converter.meta_converter.describer
    describer.lookup_tensor.clear()
    describer.lookup_storage.clear()
    tracer.values.clear()
    tracer.fake = None
    return graph, lambda name: operator.attrgetter(name)(root), values


def _described(value: Tensor) -> Tensor:
    """Shape, strides and dtype, without memory."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def pins(module: nn.Module) -> list:
    """(where, name, tensor) of what a trace of ``module`` refers to."""
    parts = chain.from_iterable((m._parameters, m._buffers) for m in module.modules())
    return [(part, name, t) for part in parts for name, t in part.items() if t is not None]
