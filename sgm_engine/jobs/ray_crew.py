"""A job's shards over Ray's actors. Ray places the actors and says which are gone; here is who has which shard.

Every shard is somewhere at any time: waiting, or with an actor that has answered. One whose actor is gone, or takes
too long, waits again, so that it may be drawn twice, with the same bytes; the first to come is taken.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import monotonic
from typing import Any

from sgm_engine.errors import EngineError
from sgm_engine.jobs.ray_actor import actor_class
from sgm_engine.jobs.spec import changed

QUEUED = 2  # shards that an actor has at a time, so that it does not wait for this process
ATTEMPTS = 3  # errors of one shard, each on another node where there is one
CRASHES = 5  # of actors in a row: of one shard, or as they start
STRIKES = 3  # failures in a row, after which a node is left aside
LATE = 10  # times the median of the latest shards
LEAST = 30.0  # seconds that a shard may take in any case
POLL = 0.2  # seconds between two looks at whether to stop
LOOK = 1.0  # seconds between two looks at the nodes


@dataclass(eq=False)
class Member:
    """since: when its oldest shard began, or when Ray was asked for it. late: its shards wait for others too."""

    actor: Any
    hello: Any
    since: float
    node: str = ""
    pid: int = 0
    where: str = ""  # both, in words
    ready: bool = False
    late: bool = False
    queue: deque[tuple[Any, int]] = field(default_factory=deque)


class Crew:
    """patience: seconds without a shard or a new actor after which it gives up, saying what it waits for."""

    def __init__(self, ray: Any, make: bytes, kind: str, wanted: int | None, env: dict[str, str], patience: float):
        """kind: what each actor takes one of, "CPU" or "GPU". wanted: actors; None: as many as the nodes have room."""
        self._ray, self._make, self._kind, self._wanted = ray, ray.put(make), kind, wanted
        self._options = {"max_restarts": 0, f"num_{kind.lower()}s": 1}
        self._options |= {"runtime_env": {"env_vars": env}} if env else {}
        self.patience, self.members = patience, list[Member]()
        self.aside: dict[str, str] = {}  # node → why
        self.agreed: dict[str, str] | None = None  # what the first actor said of how it computes
        self.about: Any = None
        self._strikes, self._stillborn = Counter(), 0
        self._took: deque[float] = deque(maxlen=100)  # seconds of the latest shards
        self._looked, self._nodes = -LOOK, []

    def describe(self) -> Any:
        """What the first actor says of itself; no other one is asked for."""
        self._hear()
        while self.agreed is None:
            self._fill(1)
            self._answer(deque(), set())
            self._look(deque(), set())
        return self.about

    def draw(
        self,
        job: bytes,
        shards: Sequence[int],
        args_of: Callable[[int], tuple],
        stopped: Callable[[], bool],
        stay: bool = False,
    ) -> Iterator[tuple[int, tuple]]:
        """(shard, what ``draw(job, *args_of(shard))`` of an actor returned), as they get finished. stay: actors that
        have nothing more to draw are there for the next call; else none is left."""
        waiting, done = deque(shards), set()
        job, self._errors, self._crashes = self._ray.put(job), Counter(), Counter()
        self._shunned: dict[int, set[str]] = defaultdict(set)
        self._hear()
        try:
            while len(done) < len(shards) and not stopped():
                self._fill(self._wanted)
                self._hand_out(job, waiting, done, args_of)
                for shard, drawn in self._answer(waiting, done):
                    yield shard, drawn
                    self._hear()  # the time that the disk took is not the actors'
                self._look(waiting, done)
        finally:
            for member in list(self.members):
                if member.queue or not stay:
                    self._drop(member)

    def close(self) -> None:
        for member in list(self.members):
            self._drop(member)

    # Actors -----------------------------------------------------------------------------------------------------------

    def _fill(self, wanted: int | None) -> None:
        """Ask Ray for the actors that are missing. Those that it has no room for stay in its queue, without a shard."""
        if monotonic() - self._looked > LOOK:
            nodes, self._looked = self._ray.nodes(), monotonic()
            self._nodes = [n for n in nodes if n["Alive"] and n["Resources"].get(self._kind, 0) >= 1]
            if self._nodes and not self._usable():
                why = (f"{n['NodeManagerHostname']}: {self.aside[n['NodeID']]}" for n in self._nodes)
                raise EngineError(f"no node of the cluster can draw: {'; '.join(why)}")
        room = sum(int(node["Resources"][self._kind]) for node in self._usable())
        for _ in range((wanted or max(room, 1)) - sum(not member.late for member in self.members)):
            options = dict(self._options)
            if self.aside:
                options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self.aside)})"}
            actor = self._ray.remote(actor_class()).options(**options).remote(self._make)
            self.members.append(Member(actor, actor.hello.remote(), monotonic()))

    def _usable(self) -> list[dict]:
        return [node for node in self._nodes if node["NodeID"] not in self.aside]

    def _drop(self, member: Member) -> None:
        self.members.remove(member)
        self._ray.kill(member.actor)

    def _strike(self, node: str, where: str, why: str, most: int = STRIKES) -> None:
        """Count a failure of a node; after ``most`` in a row it is left aside, unless it is the only one."""
        self._strikes[node] += 1
        if node not in self.aside and self._strikes[node] >= most and (most == 1 or len(self._usable()) > 1):
            self.aside[node], self._looked = why, -LOOK
            warnings.warn(f"node {where} is left aside: {why}", stacklevel=2)

    # Shards -----------------------------------------------------------------------------------------------------------

    def _hand_out(self, job: Any, waiting: deque[int], done: set[int], args_of: Callable[[int], tuple]) -> None:
        """Shards to the actors that have fewest; one that failed on a node goes to another, where there is one."""
        ready = [member for member in self.members if member.ready and not member.late]
        nodes = {member.node for member in ready}
        for had in range(QUEUED):
            for member in ready:
                if len(member.queue) != had:
                    continue
                passed = []
                while waiting and (shard := waiting.popleft()) is not None:
                    if shard in done:
                        continue
                    if member.node in self._shunned.get(shard, ()) and not nodes <= self._shunned[shard]:
                        passed.append(shard)
                        continue
                    member.since = member.since if member.queue else monotonic()
                    member.queue.append((member.actor.draw.remote(job, *args_of(shard)), shard))
                    break
                waiting.extendleft(reversed(passed))

    def _answer(self, waiting: deque[int], done: set[int]) -> list[tuple[int, tuple]]:
        """What has come within POLL; each shard once."""
        calls = {m.queue[0][0] if m.ready else m.hello: m for m in self.members if m.queue or not m.ready}
        if not calls:
            return []
        first, rest = self._ray.wait(list(calls), timeout=POLL)
        more = self._ray.wait(rest, num_returns=len(rest), timeout=0)[0] if first and rest else []
        found = []
        for call in (*first, *more):
            member = calls[call]
            try:
                answer = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                self._failed(member, error, waiting, done)
                continue
            if not member.ready:
                self._greet(member, *answer)
                continue
            shard = member.queue.popleft()[1]
            now = monotonic()
            self._took.append(now - member.since)
            member.since, member.late, self._strikes[member.node], self._crashes[shard] = now, False, 0, 0
            if shard not in done:
                done.add(shard)
                found.append((shard, answer))
        return found

    def _greet(self, member: Member, where: tuple[str, str, int], error: str | None, about: bytes | None) -> None:
        member.node, member.pid, member.where = where[0], where[2], f"{where[1]} (process {where[2]})"
        if error is None:
            agreed, what = self._ray.cloudpickle.loads(about)
            if self.agreed is None:
                self.agreed, self.about = agreed, what
            error = changed(self.agreed, agreed)
            error = error and f"it computes otherwise than the first: {error}"
        if error:
            self._strike(member.node, where[1], error, most=1)
            self._drop(member)
            return
        member.ready, self._stillborn = True, 0
        self._hear()

    def _failed(self, member: Member, error: Exception, waiting: deque[int], done: set[int]) -> None:
        """An actor is gone or its shard raised: another one takes its place, others take its shards."""
        why, late = _why(error), member.late
        self._drop(member)
        if not member.ready:
            self._stillborn += 1
            if self._stillborn >= CRASHES:
                raise EngineError(f"{CRASHES} actors in a row were gone before they could draw: {why}") from error
            return
        shards = [shard for _, shard in member.queue if shard not in done]
        if not late:
            waiting.extendleft(reversed(shards))
        if not shards:
            return
        raised = isinstance(error, self._ray.exceptions.RayTaskError)
        counts, most = (self._errors, ATTEMPTS) if raised else (self._crashes, CRASHES)
        counts[shards[0]] += self._alive(member.node)
        if counts[shards[0]] >= most:
            what = "failed" if raised else "took its actor with it"
            raise EngineError(f"shard {shards[0]} {what} {most} times, at last on {member.where}: {why}") from error
        if raised:
            self._shunned[shards[0]].add(member.node)
        warnings.warn(f"shard {shards[0]} is lost on {member.where}, another actor draws it: {why}", stacklevel=2)
        self._strike(member.node, member.where, why)

    def _alive(self, node: str) -> bool:
        return any(n["NodeID"] == node and n["Alive"] for n in self._ray.nodes())

    # Time -------------------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        self._heard = monotonic()
        self._say = self._heard + min(60.0, self.patience / 4)

    def _look(self, waiting: deque[int], done: set[int]) -> None:
        """Take back what is late; say what is waited for; EngineError when patience is at its end."""
        now = monotonic()
        if now - self._heard > self.patience:
            raise EngineError(f"nothing came from Ray for {self.patience:.0f} s: {self._state()}")
        if now > self._say:
            warnings.warn(f"nothing came from Ray for {now - self._heard:.0f} s: {self._state()}", stacklevel=2)
            self._say = now + min(60.0, self.patience / 4)
        limit = max(min(LEAST, self.patience / 8), LATE * median(self._took)) if self._took else self.patience / 2
        for member in list(self.members):
            if not member.ready and now - member.since > self.patience / 2:
                self._drop(member)  # frozen as it started, or still in Ray's queue, where another one takes its place
            elif member.queue and now - member.since > limit and not self._came(member):
                self._overdue(member, now - member.since > 2 * limit, waiting, done)

    def _came(self, member: Member) -> bool:
        return bool(self._ray.wait([member.queue[0][0]], timeout=0)[0])

    def _overdue(self, member: Member, give_up: bool, waiting: deque[int], done: set[int]) -> None:
        shards = [shard for _, shard in member.queue]
        if not member.late:
            member.late = True
            waiting.extendleft(shard for shard in reversed(shards) if shard not in done)
            seconds = monotonic() - member.since
            warnings.warn(
                f"shard {shards[0]} takes {seconds:.0f} s on {member.where}: others draw it too", stacklevel=3
            )
        elif give_up:  # its place is worth more than what it may still say
            self._strike(member.node, member.where, f"shard {shards[0]} did not come")
            self._drop(member)

    def _state(self) -> str:
        """What is waited for, in words."""
        drawing = [f"shard {m.queue[0][1]} on {m.where}" for m in self.members if m.queue]
        free = self._ray.available_resources().get(self._kind, 0)
        room = sum(node["Resources"][self._kind] for node in self._nodes)
        words = [f"{sum(not m.ready for m in self.members)} actors wait for a {self._kind} or start"]
        words += [f"{free:g} of {room:g} {self._kind}s are free on {len(self._nodes)} nodes"]
        words += [f"drawing {', '.join(drawing[:4])}" + (", …" if len(drawing) > 4 else "")] if drawing else []
        return "; ".join(words)


def _why(error: Exception) -> str:
    """One line out of Ray's many: what the actor raised, or that it is gone."""
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines() or [""]
    return f"{type(cause or error).__name__}: {lines[0]}"
