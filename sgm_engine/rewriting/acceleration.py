"""``accelerate(module)``: a user's own network, with its own parameters, on the fused ops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from sgm_engine.kernels.reference import ACTIVATIONS
from sgm_engine.models.blocks import ConditionalInstanceNormPlus, InstanceNormPlus
from sgm_engine.numerics import undisturbed
from sgm_engine.rewriting.agreement import AS_WRITTEN, refuse_disagreement, refuse_training
from sgm_engine.rewriting.altered import hooked_everywhere
from sgm_engine.rewriting.chosen_conv import ChosenConv, chosen, join_norms
from sgm_engine.rewriting.observed import Observed
from sgm_engine.rewriting.recognise import FusedNorm, recognise
from sgm_engine.rewriting.rewrite import Left, PooledConv, Rewriter
from sgm_engine.rewriting.trace import pins, trace

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OWN_NORMS = (ConditionalInstanceNormPlus, InstanceNormPlus)


@dataclass
class Report:
    """What was replaced, and what was left, and why: what → names in the user's module."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, what: str, where: str) -> None:
        found = self.left if what.startswith("left: ") else self.replaced
        found.setdefault(what.removeprefix("left: "), []).append(where)

    def __str__(self) -> str:
        lines = [f"{title} {what}: {len(where)} ({', '.join(where[:3])}{', …' if len(where) > 3 else ''})"
                 for title, found in (("replaced", self.replaced), ("left", self.left))
                 for what, where in found.items()]  # fmt: skip
        return "\n".join(lines) or "nothing to replace"


class Traced(NamedTuple):
    """A forward as a graph. modules: of its calls · values: node → fake tensor · left: why it is not rewritten."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    values: dict[fx.Node, object]
    resolve: Callable[[str], object]
    report: Report
    left: str | None


class Accelerated(nn.Module):
    """module(x [N, C, H, W], level [N]) → the same result, sooner. Make one with :func:`accelerate`.

    source: the user's module. Its parameters are this module's parameters, read where they lie at every call.
    report: of the shape traced last; None before the first call if accelerate was given no shape.
    Other attributes (sigmas, shape, plan, …) are the source's.
    """

    def __init__(self, source: nn.Module):
        super().__init__()
        self.source, self.training = source, source.training
        self.derived = nn.ModuleDict()  # PooledConv by the name of its convolution; kernels derived from shared weights
        self.report: Report | None = None
        self._built: dict[tuple, tuple[nn.Module, list, Observed | None]] = {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("source"), name)

    def __getstate__(self) -> dict:
        """For pickle: without what was traced, which belongs to this process. The next call traces again."""
        return self.__dict__ | {"_modules": {"source": self.source, "derived": nn.ModuleDict()}, "_built": {}}

    def __deepcopy__(self, memo: dict) -> Accelerated:
        """With what was traced, over the tensors that memo names: a network in 16 bits is such a copy."""
        other = memo[id(self)] = Accelerated.__new__(Accelerated)
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        if AS_WRITTEN.get() or hooked_everywhere():  # those would see other modules in a trace
            return self.source(x, level)
        return self.traced_for(x, level)(x, level)

    def traced_for(self, x: Tensor, level: Tensor) -> nn.Module:
        """What a call with these runs; traced now unless it has been. Not under autocast: see ``Network.sync``."""
        key = tuple(x.shape[1:]), x.dtype, x.device, level.dtype, self.source.training
        network, pinned, observed = self._built.get(key) or (None, (), None)
        moved = any(holder.get(name) is not tensor for holder, name, tensor in pinned)
        if network is None or moved or (observed and observed.changed()):
            self._built = {k: built for k, built in self._built.items() if k[2] == x.device}  # else it was moved since
            observed = Observed(self.source)
            network, pinned = self._build(x, level)
            self._built[key] = network, pinned, observed.settle()
        return network

    def __observed__(self) -> nn.Module:
        return self.source  # the rest follows from it

    def keep(self) -> None:
        """What was traced stands, whatever becomes of the source: of a copy that somebody else watches over."""
        self._built = {key: (*built[:2], None) for key, built in self._built.items()}

    def forget(self) -> None:
        """Trace again at the next call."""
        self._built = {}

    def train(self, mode: bool = True) -> Accelerated:
        """Changes this module's flag only; the source's mode is the user's to set."""
        self.training = mode
        return self

    def stale(self) -> bool:
        """Whether a derived kernel is older than the weights that it comes from."""
        return any(pooled.stale() for pooled in self.derived.values())

    def sync_weights(self) -> None:
        """Rewrite stale derived kernels in place. A call does it by itself; a captured graph needs to be told."""
        for pooled in self.derived.values():
            if pooled.stale():
                pooled.sync()

    def norms(self) -> dict[str, FusedNorm | str | None]:
        """What ``recognise`` says of each of the source's modules, by name."""
        return {name: recognise(module) for name, module in self.source.named_modules() if name}

    @torch.no_grad()
    @undisturbed()
    def _build(self, x: Tensor, level: Tensor) -> tuple[nn.Module, list]:
        refuse_training(self.source)
        norms = self.norms()
        try:
            network, report, pinned = self._rewritten(norms, x, level)
            refuse_disagreement(network, self.source, x, level)
        except Exception as error:  # whatever the user's forward does that tracing cannot follow
            network, report, pinned = self._walked(norms)
            said = " ".join(str(error).split())[:120]
            report(f"left: the network between its norms ({type(error).__name__}: {said})", "forward")
            try:
                refuse_disagreement(network, self.source, x, level)
            except Left as reason:
                network, report = self.source, Report()
                report(f"left: the whole network ({reason})", "forward")
        for name, why in norms.items():
            if isinstance(why, str):
                report(f"left: {why}", name)
        for name, module in network.named_children():
            if isinstance(module, PooledConv):
                self.derived[name] = module
        self.report = report
        return network, pinned

    def rewritten(self, x: Tensor, level: Tensor) -> tuple[nn.Module, Report, list]:
        """An executable module of the traced graph, and what was replaced in it; raises what the trace raises."""
        refuse_training(self.source)
        return self._rewritten(self.norms(), x, level)

    def _rewritten(self, norms: dict, x: Tensor, level: Tensor) -> tuple[nn.Module, Report, list]:
        """The traced graph after Rewriter, over the user's own layers."""
        found = self.traced(norms, x, level)
        if found.left:
            found.report(f"left: all but the norms ({found.left})", "forward")
        modules = {name: chosen(module, x.device) for name, module in found.modules.items()}
        for name, module in modules.items():
            if isinstance(module, ChosenConv):
                found.report("convolution by the table of tuned shapes", name.removeprefix("module."))
        join_norms(found.graph, modules, found.report)
        network, pinned = self._assemble(found.graph, modules, found.resolve)
        return network, found.report, pinned

    def traced(self, norms: dict, x: Tensor, level: Tensor, as_on_gpu: bool = False) -> Traced:
        """The graph of source(x, level) after Rewriter. norms: ``recognise`` of its modules, by name."""
        report, modules = Report(), {}
        fused = {self.source.get_submodule(n): f for n, f in norms.items() if isinstance(f, FusedNorm)}
        graph, resolve, values = trace(self.source, set(fused), x, level)
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            module = modules[node.target] = resolve(node.target)
            if module in fused:
                if why := _misfit(fused[module], node, values):
                    report(f"left: {why}", node.target.removeprefix("module."))
                    continue
                report("norm", node.target.removeprefix("module."))
                _as_fused_call(node)
                modules[node.target] = fused[module]
        left = None
        try:
            Rewriter(graph, modules, values, report, around_norms=as_on_gpu or _is_fused_around(x)).run()
        except Left as reason:
            left = str(reason)
        return Traced(graph, modules, values, resolve, report, left)

    def _assemble(self, graph: fx.Graph, modules: dict, resolve) -> tuple[fx.GraphModule, list]:
        """An executable module of the graph, and (holder, name, tensor) of the tensors that it keeps a reference to."""
        root: dict[str, object] = {}
        pinned = []
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            name = node.target.removeprefix("module.").replace(".", "_")
            while name in root and root[name] is not modules.get(node.target):
                name += "_"
            if node.op == "call_module":
                root[name] = self.derived[name] if name in self.derived else modules[node.target]
            else:
                root[name] = resolve(node.target)
                owner, _, attribute = node.target.rpartition(".")
                if owner:  # not a constant of the trace's own
                    holder = resolve(owner)
                    holder = holder._parameters if attribute in holder._parameters else holder._buffers
                    pinned.append((holder, attribute, root[name]))
            node.target = name
        graph.lint()
        return fx.GraphModule(root, graph), pinned

    def _walked(self, norms: dict) -> tuple[nn.Module, Report, list]:
        """A copy of the module tree, over the same tensors and layers, with only its norms replaced."""
        report = Report()
        layers = (m for m in self.source.modules() if m is not self.source and next(m.children(), None) is None)
        kept = chain(self.source.parameters(), self.source.buffers(), layers)
        network = copy.deepcopy(self.source, {id(what): what for what in kept})
        for name, norm in norms.items():
            if isinstance(norm, FusedNorm) and not any(
                name.startswith(f"{n}.") for n in report.replaced.get("norm", ())
            ):
                parent, _, last = name.rpartition(".")
                setattr(network.get_submodule(parent), last, norm)
                report("norm", name)
        return network, report, pins(self.source)


def accelerate(
    module: nn.Module, shape: tuple[int, int, int] | None = None, level_dtype: torch.dtype = torch.int64
) -> Accelerated:
    """module(x, level) on the fused ops: the same outputs to rounding (2e-6), over the same parameters, sooner.

    module: any network called as module(x [N, C, H, W], level [N]); the original NCSN and NCSNv2 classes, or one that
        contains InstanceNorm++ (conditional or plain), InstanceNorm2d, GroupNorm, means after convolutions, …
        Recognised by structure and behaviour, not by name. It is not changed; moving or casting the result moves or
        casts it.
    shape: (C, H, W) of one sample, to trace and report at once; None takes ``module.shape`` if it has one, or else the
        first call's. Another shape is traced when it comes. level_dtype: of ``level``, for modules that take sigmas.

    Every traced network is compared with the module on random images before it is used. Raises TypeError and
    ValueError for what is not such a module, or is in training mode with dropout or batch norm.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}; as_score takes any callable")
    if isinstance(module, Accelerated):
        return module
    refuse_training(module)
    model = Accelerated(module)
    shape = getattr(module, "shape", None) if shape is None else shape
    if shape is not None:
        if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"shape must be (C, H, W), got {shape}")
        device = next((t.device for t in chain(module.parameters(), module.buffers())), None)
        x = torch.zeros(1, *shape, device=device)
        level = torch.zeros(1, dtype=level_dtype, device=device) if not level_dtype.is_floating_point else x.new_ones(1)
        model(x, level)
    return model


def _is_fused_around(x: Tensor) -> bool:
    """Whether an activation before a norm and a pool after it are part of its kernels, as they are on a GPU."""
    return x.is_cuda


def _as_fused_call(node: fx.Node) -> None:
    """Arguments (x, level), and the activation that our own norms take as a third."""
    given = [*node.args, *node.kwargs.values()]
    node.args, node.kwargs = tuple(given[:2]), {"activation": given[2]} if len(given) > 2 else {}


def _misfit(norm: FusedNorm, node: fx.Node, values: dict) -> str | None:
    """Why this call of a norm cannot be the fused op's."""
    given = [*node.args, *node.kwargs.values()]
    ours = len(given) == 3 and given[2] in ACTIVATIONS and isinstance(norm.source, OWN_NORMS)
    x, level = (values.get(a) if isinstance(a, fx.Node) else None for a in [*given, None][:2])
    if len(given) > 2 and not ours:
        return "a norm called with more than (x, level)"
    if x is None or x.dim() != 4 or x.dtype not in FUSED_DTYPES or x.shape[1] != norm.channels:
        return "a norm of something else than float images [N, C, H, W]"
    if norm.conditional and (level is None or level.dtype != torch.int64 or level.dim() != 1):
        return "a norm whose level is not int64 [N]"
    return None
