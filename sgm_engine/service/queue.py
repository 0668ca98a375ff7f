"""What a SamplerService keeps of its requests: their samples to come, in a fair order, and how long they waited."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from weakref import ref

import numpy as np

from sgm_engine.engine.results import Results
from sgm_engine.errors import QueueFull, ServiceClosed
from sgm_engine.plans.plan import Plan

TIDY = 64  # entries of ended requests that a heap may keep, or as many as it has others
REMEMBERED = 4096  # requests that the percentiles of Metrics look back on


@dataclass(eq=False)
class Request:
    """n samples of one plan. Its future stays pending until the last is there: till then it can be cancelled."""

    chains: Sequence[tuple]  # (sample id, seed, init) of each sample
    plan: Plan
    submitted: float  # seconds of time.monotonic, as are deadline and started
    deadline: float | None = None
    future: Future = field(default_factory=Future)
    n: int = field(init=False)
    results: Results | None = None  # from the first harvest on
    started: float | None = None  # when the first of its samples got a slot
    next: int = 0  # the index of the next sample to start
    over: bool = False

    def __post_init__(self) -> None:
        self.n = len(self.chains)


def note_cancelled(cancelled: deque[Request], request: Request) -> None:
    """Have ``request`` in ``cancelled`` as soon as its future is cancelled, unless nobody knows it any more by then."""
    found = ref(request)

    def note(future: Future) -> None:
        if future.cancelled() and (request := found()) is not None:
            cancelled.append(request)

    Future.add_done_callback(request.future, note)  # at once, in whatever thread


def check_seconds(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value >= 0):
        raise ValueError(f"{name} must be seconds >= 0 or None, got {value!r}")


class FairQueue:
    """Requests with samples to start. They share the network's evaluations evenly; none waits for another's end.

    Self-clocked fair queueing (Golestani, INFOCOM 1994). A request's turn comes ``plan.nfe`` after its last one, or
    after the one being served when it came, on a clock that each turn sets. With equal plans this is round robin; of a
    plan of 10 rows beside one of 100, ten samples start for each of the other.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []  # (its turn, a number that breaks ties, request)
        self._clock, self._pushed, self._most = 0, 0, TIDY

    def push(self, request: Request) -> None:
        self._pushed += 1
        self._most = tidied(self._heap, self._most, lambda entry: not entry[2].over)
        heapq.heappush(self._heap, (self._clock + request.plan.nfe, self._pushed, request))

    def peek(self) -> Request | None:
        """The request whose turn it is; None if no request has a sample to start."""
        while self._heap and self._heap[0][2].over:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> tuple[Request, int]:
        """The next sample to start: its request (that of ``peek``) and its index there."""
        self._clock, _, request = heapq.heappop(self._heap)
        index = request.next
        request.next += 1
        if request.next < request.n:
            self.push(request)
        return request, index


class Door:
    """Room for ``capacity`` samples. Who finds none waits, first come first served. lock: what the caller holds."""

    def __init__(self, capacity: int, lock: threading.Condition):
        self.capacity, self._lock = capacity, lock
        self.pending, self.closed = 0, False  # pending: samples inside, finished ones of unfinished requests included
        self.waiting: deque[object] = deque()

    def enter(self, n: int, wait: float | None) -> None:
        """Wait up to ``wait`` seconds for room for n samples; QueueFull or ServiceClosed instead of room."""
        place = object()
        self.waiting.append(place)
        try:
            if not self._lock.wait_for(lambda: self.closed or self._admits(place, n), wait):
                raise QueueFull(
                    f"{self.pending} samples are pending and capacity is {self.capacity}: try again later, wait "
                    "longer (wait=None), or raise capacity"
                )
        finally:
            self.waiting.remove(place)
            self._lock.notify_all()
        if self.closed:
            raise ServiceClosed("the service has been shut down: make another one")
        self.pending += n

    def leave(self, n: int) -> None:
        self.pending -= n
        self._lock.notify_all()

    def _admits(self, place: object, n: int) -> bool:
        return self.waiting[0] is place and self.pending + n <= self.capacity


class Deadlines:
    """Requests by deadline; weak, so that one which ended long before its deadline is not kept, nor its samples."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ref[Request]]] = []  # the number breaks ties
        self._most = TIDY

    def add(self, request: Request) -> None:
        if request.deadline is not None:
            self._most = tidied(self._heap, self._most, lambda entry: (r := entry[2]()) is not None and not r.over)
            heapq.heappush(self._heap, (request.deadline, id(request), ref(request)))

    def passed(self) -> list[Request]:
        """Those whose deadline has passed, each once, less those that are over."""
        found = []
        while self._heap and self._heap[0][0] <= monotonic():
            found.append(heapq.heappop(self._heap)[2]())
        return [request for request in found if request is not None and not request.over]


def tidied(heap: list, most: int, alive: Callable[[tuple], bool]) -> int:
    """Drop the entries of a heap that are not ``alive`` once it has more than ``most``; how many it may have next."""
    if len(heap) <= most:
        return most
    heap[:] = filter(alive, heap)
    heapq.heapify(heap)
    return max(TIDY, 2 * len(heap))


@dataclass(frozen=True)
class Metrics:
    """A service at one moment.

    pending: samples accepted and not finished, of capacity · running: slots in use, of batch · occupancy: of all slots
    in all steps so far, the share that advanced a sample · finished: samples; samples_per_second: over the seconds in
    which there was work · requests: by outcome · wait_p50, wait_p99: seconds from submit to a request's first slot;
    latency_p50, latency_p99: from submit to its end (finished requests, the latest 4,096; NaN before the first)
    """

    pending: int
    capacity: int
    running: int
    batch: int
    occupancy: float
    finished: int
    samples_per_second: float
    requests: dict[str, int]
    wait_p50: float
    wait_p99: float
    latency_p50: float
    latency_p99: float


class Meter:
    """Counts and times; the service's lock guards it."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(("finished", "failed", "cancelled", "late"), 0)
        self.finished, self.steps, self.evaluations, self.busy = 0, 0, 0, 0.0
        self._times: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)

    def end(self, request: Request, outcome: str) -> None:
        self.requests[outcome] += 1
        if outcome == "finished" and request.started is not None:
            self._times.append((request.started - request.submitted, monotonic() - request.submitted))

    def percentiles(self) -> tuple[float, float, float, float]:
        """Median and 99th percentile of the waits, and of the latencies, in seconds."""
        times = np.array(self._times or [(np.nan, np.nan)])
        return tuple(float(value) for value in np.percentile(times, (50, 99), axis=0).T.ravel())
