"""The native CPU executor: a whole network as a flat list of layers, which csrc/cpu/executor runs in one call."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sgm_engine.errors import CannotRun, out_of_memory
from sgm_engine.executors.native.graph import PRECISIONS, Graph
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.refinenet import lower_refinenet
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Slots, Tables
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.ncsn import RefineNet
from sgm_engine.models.score_model import NotAScore
from sgm_engine.rewriting.altered import altered

if TYPE_CHECKING:
    from sgm_engine.executors.native.program import Program

AGREEMENT = {"bfloat16": 0.1}  # of a network with its module, relative; a wrong graph is off by O(1)
FLOAT32_AGREEMENT = 1e-4
OWN = ("sgm_engine.models.", "torch.nn.modules.")


def lowered(
    model: nn.Module, batch: int, precision: str, shape: tuple[int, int, int], levels: int
) -> tuple[Graph, Program | None]:
    """The layers of ``model`` for x [*shape] at level in [0, levels), and what makes its tables, if it was recorded.

    Raises Unsupported, and says what it is.
    """
    graph = Graph(batch, precision)
    if is_published(model):
        if shape[0] != model.channels:
            raise ValueError(f"the model takes {model.channels} channels, got shape {shape}")
        lower_refinenet(graph, model, *shape[1:])
        return graph, None
    if not isinstance(model, nn.Module):
        raise Unsupported(f"{type(model).__name__} is no nn.Module")
    if next(model.parameters(), None) is None:  # a function in a wrapper, say: there is nothing to look into
        raise Unsupported(
            "it holds no convolution, nor any other parameter of its own: pass the nn.Module that holds them"
        )
    if type(model) is CDM:
        from sgm_engine.executors.native.cdm import lower_cdm

        lower_cdm(graph, model, shape, levels)
        return graph, None
    from sgm_engine.executors.native.recorded import has_own_norms, lower_recorded  # which NCSN does not need
    from sgm_engine.executors.native.traced import lower_traced

    fronts, reasons = [lower_recorded, lower_traced], {}
    for front in fronts[::-1] if has_own_norms(model) else fronts:
        try:
            graph = Graph(batch, precision)
            return graph, front(graph, model, shape, levels)
        except Unsupported as reason:
            reasons[front] = reason
    raise reasons[lower_recorded]


def is_published(model: object) -> bool:
    """Whether this is an NCSN or NCSNv2 as it stands in models/, so that its layers need no look at its forward.

    A subclass, a hook, a forward or a layer put in the place of another (LoRA, a parametrization): traced like others.
    """
    if not isinstance(model, RefineNet):
        return False
    parts, classes = list(model.modules()), {}
    return all(type(part).__module__.startswith(OWN) and not altered(part, classes) for part in parts)


class NativeNetwork:
    """``model`` as a callable (x float32 [B, C, H, W], level int64 [B]) → score float32, as x; one native call.

    batch: the number of images that it is tuned for; it takes any. height, width: the only image size it takes.
    precision: "float32", "bfloat16" (operands of convolutions), "direct" or "winograd": see PRECISIONS.
    channels, levels: of x, and how many; None takes ``model.shape`` and ``model.sigmas``.
    Weights are packed copies: ``sync`` refreshes those whose parameters changed. Raises Unsupported. Threads may share
    it: one call at a time runs, and none while weights are packed.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        height: int,
        width: int,
        precision: str = "float32",
        channels: int | None = None,
        levels: int | None = None,
    ):
        if channels is None:
            channels = (getattr(model, "shape", None) or (3,))[0]
        levels = len(getattr(model, "sigmas", (0,))) if levels is None else levels
        self.shape = (channels, height, width)
        self.graph, self._program = lowered(model, batch, precision, self.shape, levels)
        self.graph.plan()
        self._packed()
        self.model, self._lock = model, threading.Lock()
        self._asked = self._read()
        if not is_published(model):
            self._refuse_disagreement(levels, AGREEMENT.get(precision, FLOAT32_AGREEMENT))

    def sync(self, states: Mapping[int, tuple | None] | None = None, force: bool = False) -> int:
        """Pack the weights that changed since the last time, or all; returns how many layers' they were.

        states: id → what the tensor holds (kernels/digest.py), where it has just been looked at.
        """
        with self._lock:
            changed = self.graph.sync(states, force)
            self._packed()
            return changed

    def stale(self) -> bool:
        """Whether a tensor whose values chose the layers has other values."""
        return self._asked != self._read()

    def _read(self) -> list[bytes]:
        asked = () if self._program is None else self._program.recording.asked
        return [t.detach().numpy().tobytes() for t in asked]

    def _packed(self) -> None:
        if self._program is not None:
            self._program.forget()

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape or x.dtype != torch.float32 or x.device.type != "cpu":
            shape = ", ".join(map(str, self.shape))
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"x must be float32 [B, {shape}] on the CPU, got {got}")
        if level.shape != x.shape[:1] or level.dtype != torch.int64 or level.device.type != "cpu":
            got = f"{level.dtype} {tuple(level.shape)} on {level.device}"
            raise ValueError(f"level must be int64 [{len(x)}] on the CPU, got {got}")
        x = x.contiguous()
        with self._lock:
            return self.graph.run(x, level.contiguous(), torch.empty_like(x))

    def describe(self) -> str:
        """Its convolutions by algorithm, and its memory."""
        found = [self.graph.native.algorithm(i) for i in self.graph.convs]
        counts = ", ".join(f"{found.count(a)} {a}" for a in sorted(set(found)))
        return f"convolutions: {counts}; {self.graph.native.bytes() / 2**20:.1f} MiB"

    @torch.no_grad()
    def _refuse_disagreement(self, levels: int, tolerance: float) -> None:
        random = torch.Generator("cpu").manual_seed(0)
        x = torch.rand(2, *self.shape, generator=random, dtype=torch.float32, device="cpu")
        level = torch.tensor([levels - 1, 0], device="cpu")  # in another order than those of a trace
        ours, theirs = self(x, level).flatten(1), self.model(x, level).float().flatten(1)
        difference = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-30)).max().item()
        if not difference <= tolerance:
            raise Unsupported(f"lowered, it would differ by {difference:.1e}")


def refusal(
    model: object, precision: str = "float32", shape: tuple[int, int, int] | None = None, levels: int | None = None
) -> str | None:
    """Why the native executor cannot run ``model`` in this precision, or None if it can.

    shape, levels: None takes ``model.shape`` and ``model.sigmas``. A module that is no NCSN is traced and compared.
    """
    made = _attempt(model, 1, precision, getattr(model, "shape", None) if shape is None else shape, levels)
    return made if isinstance(made, str) else None


def _attempt(
    model: object, batch: int, precision: str, shape: tuple[int, int, int] | None, levels: int | None
) -> NativeNetwork | str | None:
    """The network, why there is none, or None for one that surely can be made."""
    if precision not in PRECISIONS:
        return f"precision={precision!r} is not one of its own, which are float32, bfloat16 and direct"
    if is_published(model):  # but for a size or padding without a layer, which ``bind`` finds: lowering takes a second
        return None
    if shape is None:
        return "the size of its images is not known: pass shape=(C, H, W)"
    try:
        return NativeNetwork(model, batch, *shape[1:], precision, shape[0], levels)
    except NotAScore:
        raise  # no executor could run it
    except Exception as error:
        if out_of_memory(error):
            raise
        return str(error)


class NativeExecutor:
    """Runs chains inside C++: the network, the update and the rows, ``steps`` of them in one call without the GIL.

    Packed weights follow the module's parameters at ``sync_weights``, which the engine calls when one has changed.
    """

    name, captures = "native", 0

    def __init__(self, made: NativeNetwork | None = None) -> None:
        """made: what the first ``bind`` would make."""
        self.score: Tensor | None = None
        self._made = made

    @classmethod
    def of(cls, network: Network, batch: int) -> NativeExecutor | str:
        """One that is bound to ``batch`` slots first, or why it cannot run the network."""
        made = _attempt(network.model, batch, network.precision, network.shape, network.levels)
        return made if isinstance(made, str) else cls(made)

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        if slots.device.type != "cpu":
            raise ValueError(f"executor='native' runs on a CPU, got device {slots.device}: use executor='graph' there")
        if network.precision not in PRECISIONS:
            raise ValueError(f"executor='native' runs float32, bfloat16 or direct, got precision={network.precision!r}")
        self.slots, self.tables = slots, tables
        channels, height, width = slots.shape
        made, self._made = self._made, None
        try:
            self.network = made or NativeNetwork(
                network.model, slots.batch, height, width, network.precision, channels, network.levels
            )
        except Exception as reason:
            if out_of_memory(reason):
                raise
            raise CannotRun(f"executor='native' cannot run this model: {reason}; use executor='eager'") from reason
        self.source = network
        self.score = torch.zeros_like(slots.x, memory_format=torch.contiguous_format)

    def describe(self) -> str:
        return self.network.describe()

    def sync_weights(self, force: bool = False) -> None:
        states = self.source.watch.look()  # before anything is packed: a write meanwhile is seen at the next look
        if self.network.stale():
            self.bind(self.source, self.slots, self.tables)
        else:
            self.network.sync(states, force)

    def answer(self, x: Tensor, level: Tensor) -> Tensor:
        """The network's score of other images than the slots', as ``Network`` is called."""
        return self.network(x, level)

    def sibling(self) -> NativeExecutor:
        return NativeExecutor()

    def run(self, steps: int) -> None:
        s, t = self.slots, self.tables
        buffers = {"row": s.row, "stop": s.stop, "seed": s.seed, "sample_id": s.sample_id, "bad_row": s.bad_row}
        tables = {"coef": t.coef, "draw": t.draw, "level": t.level}
        if s.previous is not None:
            buffers |= {"previous": s.previous}
            tables |= {"keep": t.keep}
        if s.gain is not None:
            buffers |= {"gain": s.gain}
            tables |= {"adaptive": t.adaptive}
        if s.known is not None:
            tables |= s.known.arguments(t)
        self.network.graph.native.run_steps(
            slots=s.batch,
            x=s.x.data_ptr(),
            nhwc=not s.x.is_contiguous(),
            score=self.score.data_ptr(),
            rows=len(t.draw),
            steps=steps,
            **{name: tensor.data_ptr() for name, tensor in (buffers | tables).items()},
        )
