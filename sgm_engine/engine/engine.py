"""The engine: draws samples from a score network by running a Plan over slots.

Sample i is sample i: its noise is a function of (seed, sample id, draw, element) alone, whatever n, the batch, the
slot, the device or the order. Its bits are the same whenever batch, device, precision, executor and build are; between
two different batches the network's own arithmetic may differ in the last bits.
"""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from sgm_engine.checks import MAX_SEED, check_chains, check_int, check_plan, check_shape, own_sigmas, place
from sgm_engine.engine.defaults import default_plan
from sgm_engine.engine.lanes import Turns, check_buckets
from sgm_engine.engine.loop import Loop
from sgm_engine.engine.progress import StepInfo
from sgm_engine.engine.results import Results, divergence
from sgm_engine.errors import Cancelled, Divergence, EngineBusy, SampleDiverged
from sgm_engine.executors.choice import make_executor
from sgm_engine.executors.graphs import GraphConfig
from sgm_engine.executors.known import REDRAWS, check_known
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import NO_BAD_ROW
from sgm_engine.numerics import undisturbed
from sgm_engine.outputs.images import check_range, range_of, to_uint8
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import Sigmas
from sgm_engine.rewriting.float8.config import Float8Config


class Engine(Loop):
    """``Engine(model).sample(64)`` → float32 [64, C, H, W].

    model: ``model(x [B, C, H, W] float32, level [B] int64) → score``; an nn.Module is shared, never copied or changed,
        except that ``device`` moves it there (module.to). A running request follows changes of its parameters, written
        in place by whatever means or replaced, within 16 steps; docs/training.md has what that costs, and what a GPU's
        copies in 16 bits leave to the next request.
    batch: slots computed together; the compute batch is always this, so a request of fewer samples is no cheaper.
        None: 16 on a CPU, 128 on a GPU. Out of memory, it is halved, with a warning.
    buckets: smaller batches. A call of sample or inpaint for n samples runs in the smallest that holds n: cheaper, and
        its bits are then those of that batch. stream, jobs and services always use ``batch``.
    sigmas [L] descending and shape (C, H, W): None takes ``model.sigmas`` and ``model.shape``.
    data_range: (low, high) of the model's data, and of its samples, which pictures are made of. None takes
        ``model.data_range``, else [0, 1].
    precision: of the network, "float32", "bfloat16", "float16", on a GPU "tf32" or, with executor "native", "direct":
        float32 without Winograd convolutions, slower and with a smaller error. x is float32 always. "float8": bfloat16,
        and large convolutions in 8 bits (e4m3) on a GPU that has them; opt in with docs/float8.md, its measured effect
        on samples, in mind.
    executor: "eager"; "graph" (CUDA); "native" (CPU; NCSN, CDMs, networks of convolutions that can be traced); "hybrid"
        (CPU; fused ops, packed convolutions); or "auto", the fastest of those that can run the model. A module that
        "native" cannot take whole, or that fails to be captured, then runs slower, with a warning that says why.
    graph: how "graph" captures, a GraphConfig. float8: the scales of precision "float8", of calibrate_float8(model).

    One request runs at a time: a second thread waits for its turn.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        batch: int | None = None,
        device: torch.device | str | None = None,
        precision: str = "float32",
        executor: str = "auto",
        sigmas: Sigmas | None = None,
        shape: tuple[int, int, int] | None = None,
        buckets: Sequence[int] = (),
        graph: GraphConfig | None = None,
        float8: Float8Config | None = None,
        data_range: tuple[float, float] | None = None,
    ):
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, level), got {type(model).__name__}")
        self.model, self.precision = model, precision
        self.sigmas = own_sigmas(model, sigmas)
        self.data_range = range_of(model) if data_range is None else check_range(data_range)
        self.shape = check_shape(getattr(model, "shape", None) if shape is None else shape)
        self.device = place(model, device)
        batch = check_int("batch", (128 if self.device.type == "cuda" else 16) if batch is None else batch, 1, 2**31)
        buckets = check_buckets(buckets, batch)
        with undisturbed():
            network = Network(model, precision, self.device, self.shape, len(self.sigmas), float8)
            runs = make_executor(executor, network, batch, graph)
            super().__init__(network, runs, executor == "auto", batch, self.shape, buckets)
        self._lock, self._owner, self._process = threading.Lock(), None, os.getpid()
        self._turns = Turns(self.device)

    def __deepcopy__(self, memo: dict) -> object:
        """In a copy of a model that keeps its engine there is none; by itself an Engine cannot be copied."""
        return _NotCopied() if id(self.model) in memo else self.__reduce__()

    def __reduce__(self):
        raise TypeError("an Engine cannot be copied or pickled: send the model, and make an Engine of it there")

    def __repr__(self) -> str:
        shape, of = "×".join(map(str, self.shape)), type(self.model).__name__
        return (
            f"<Engine of {of}: {shape}, {len(self.sigmas)} levels σ {self.sigmas[0]:.4g} → {self.sigmas[-1]:.3g}, "
            f"executor {self.executor}, {self.numerics}, batch {self.batch}, on {self.device}>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: what runs, and the plan of a request that names none."""
        return (
            f"<pre>{html.escape(repr(self))}<br>{html.escape(self.describe())}</pre>{self.default_plan._repr_html_()}"
        )

    @property
    def numerics(self) -> str:
        """precision, and for "float8" a digest of its scales: what the bits of a job's samples depend on."""
        return self._network.numerics

    @property
    def float8(self) -> Float8Config | None:
        """The scales of precision "float8"."""
        return self._network.float8

    @cached_property
    def default_plan(self) -> Plan:
        """The plan of a request that names none: what the model's weights recommend, else annealed Langevin (NCSN).

        Of what as_score makes of a denoiser, a noise or a velocity predictor: DPM-Solver++(2M), at most 30 evaluations.
        """
        return default_plan(self.model, self.sigmas)

    def sample(
        self,
        n: int,
        seed: int | Sequence[int] = 0,
        plan: Plan | None = None,
        first_id: int = 0,
        callback: Callable[[StepInfo], object] | None = None,
        progress: bool | str = False,
        init: Tensor | None = None,
        nfe: int | None = None,
        quality: str | None = None,
    ) -> Tensor:
        """Samples first_id … first_id + n − 1 of ``seed`` (uint64): float32 [n, C, H, W] on the engine's device.

        seed: one for all, or n of them, one a sample; each sample then has id first_id. init: [n, C, H, W], where the
        chains start, instead of the plan's start law. callback: called after every step. progress: a bar on stderr,
            off a terminal a line now and then; "bar": a bar wherever that goes.
        nfe: instead of a plan, the best one of at most so many evaluations that keeps to the model's levels; quality:
        "draft", "good" or "best" likewise (good_plan). SampleDiverged, Cancelled: carry what is finished.
        """
        if nfe is not None or quality is not None:
            if plan is not None:
                raise ValueError("plan, nfe and quality: pass one of them")
            from sgm_engine.checkpoints.good_plan import good_plan

            plan = good_plan(self.model, nfe, quality, between=False, sigmas=self.sigmas)
        chains = check_chains(n, seed, first_id, init, self.shape, self.device)
        return self._sample(chains, self._check(plan, callback), callback, progress, None)

    def pictures(self, x: Tensor) -> np.ndarray:
        """Samples x [N, C, H, W] as 8 bits of the data range: uint8 [N, H, W, C], what ``images.grid`` takes."""
        return to_uint8(x, self.data_range)

    def inpaint(
        self,
        known: Tensor,
        mask: Tensor,
        n: int | None = None,
        seed: int = 0,
        plan: Plan | None = None,
        first_id: int = 0,
        redraw: str = "level",
        callback: Callable[[StepInfo], object] | None = None,
        progress: bool | str = False,
    ) -> Tensor:
        """Samples whose pixels agree with ``known`` where ``mask`` is True: float32 [n, C, H, W], otherwise as sample.

        known: floats [n, C, H, W], or [C, H, W] for all n. mask: bool, broadcast to known. Before every row known
        pixels are set to known + σ·z, in the result to known. redraw: z anew at each "level" (as NCSN's programs do) or
        at each "step" (NCSNv2's).
        A heuristic: the samples lean towards the posterior and do not follow it exactly; docs/samplers.md has figures.
        """
        if redraw not in REDRAWS:
            raise ValueError(f"redraw must be one of {REDRAWS}, got {redraw!r}")
        n = None if n is None else check_int("n", n, 0)
        known = check_known(known, mask, n, self.shape, self.device)
        chains = check_chains(len(known), seed, first_id, None, self.shape, self.device)
        return self._sample(chains, self._check(plan, callback), callback, progress, (known, redraw))

    def stream(
        self,
        sample_ids: Iterable[int],
        seed: int = 0,
        plan: Plan | None = None,
        callback: Callable[[StepInfo], object] | None = None,
        progress: bool | str = False,
        on_diverged: Callable[[Divergence], object] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (sample_id, x float32 [C, H, W]) in the order of ``sample_ids``, an iterable read as slots fall free.

        Diverged samples are not yielded: on_diverged is called for each, or else SampleDiverged is raised after the
        last good one. The engine is this stream's until it is exhausted, closed or cancelled (it raises Cancelled).
        """
        plan, seed = self._check(plan, callback), check_int("seed", seed, 0, MAX_SEED)
        total = len(sample_ids) if hasattr(sample_ids, "__len__") else None
        return self._stream(sample_ids, seed, plan, callback, progress, total, on_diverged)

    def cancel(self) -> None:
        """Stop the running request, from a callback or another thread, within a few steps. Nothing runs: no effect."""
        self._cancel.set()

    def sync_weights(self, force: bool = False) -> None:
        """Refresh copies of the weights in the middle of a request (every request starts with fresh ones).

        force: all of them, also those whose weights hold what they held.
        """
        self._refuse_fork()
        self._sync(force=force)

    def _sample(self, chains, plan, callback, progress, known) -> Tensor:
        results = Results([sample_id for sample_id, _, _ in chains], plan, self.shape, self.device)
        with self._request(len(chains)):
            for jobs, x, bad_row in self._run(chains, plan, callback, progress, len(chains), known):
                results.put([job.index for job in jobs], x, bad_row)
            cancelled = bool(self._slots.live)
        if cancelled:
            diverged, ids, samples = results.good()
            message = f"cancelled with {len(ids)} of {len(chains)} samples finished (.sample_ids, .samples)"
            raise Cancelled(message, diverged, ids, samples)
        return results.all()

    def _stream(self, ids, seed, plan, callback, progress, total, on_diverged) -> Iterator[tuple[int, Tensor]]:
        diverged: list[Divergence] = []
        chains = ((sample_id, seed, None) for sample_id in ids)
        with self._request():
            for jobs, x, bad_row in self._run(chains, plan, callback, progress, total):
                for job, sample, row in zip(jobs, x, bad_row.tolist(), strict=True):
                    if row == NO_BAD_ROW:
                        yield job.sample_id, sample
                        continue
                    diverged.append(divergence(job.sample_id, plan, row))
                    if on_diverged is not None:
                        on_diverged(diverged[-1])
            cancelled = bool(self._slots.live)
        nothing = torch.empty(0, *self.shape, device=self.device)
        if cancelled:
            raise Cancelled("the stream was cancelled", diverged, [], nothing)
        if diverged and on_diverged is None:
            raise SampleDiverged(diverged, [], nothing)

    @contextmanager
    def _request(self, n: int | None = None) -> Iterator[None]:
        """Own the engine, in the lane for n samples; leave every slot idle behind, however the request ends."""
        if self._owner == threading.get_ident():
            raise EngineBusy(
                "this thread is inside a request of this engine: finish or close the stream, or use another engine"
            )
        self._refuse_fork()
        with self._lock:
            self._owner = threading.get_ident()
            self._cancel.clear()
            try:
                self._turns.begin()
                with undisturbed():
                    self._or_next_best(partial(self._lanes.use, n))
                yield
            finally:
                self._slots.clear()
                self._slots.known = None
                self._turns.end()
                self._owner = None

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "this engine was made before a fork, and its threads are in the parent: start processes with spawn, or "
                "make the engine in the child"
            )

    def _check(self, plan, callback) -> Plan:
        plan = self.default_plan if plan is None else plan
        check_plan(plan, self.sigmas, self.model, self.shape)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        return plan


class _NotCopied:
    """In the place of an engine, where the model that kept it was copied."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("this engine stayed with the model that was copied: make an Engine of the copy")
