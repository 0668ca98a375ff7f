"""Notices that a module's tensors were written, moved or replaced, by whichever writer, while an engine runs on it."""

from __future__ import annotations

import weakref
from itertools import chain

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sgm_engine.kernels.digest import digests


class Watch:
    """Two looks at the tensors of ``module``. Neither changes anything, and any other tensor or content changes both.

    ``glance``: cheap enough for every step. Objects, addresses, version counters, and the steps of optimizers that hold
    one of the tensors: torch's fused ones raise no version. What is written through ``.data`` does not show.
    ``look``: reads every tensor on the CPU (kernels/digest.py), so that all writes show.
    """

    def __init__(self, module: nn.Module | None):
        self.steps = 0
        self.states: dict[int, tuple | None] = {}
        self._module = module
        self.follow()
        hook = register_optimizer_step_post_hook(_counting(weakref.ref(self)))
        weakref.finalize(self, hook.remove)

    def follow(self) -> bool:
        """Watch the tensors that the module has at present; returns whether they are other objects than before."""
        before = getattr(self, "tensors", None)
        self.tensors = tensors_of(self._module)
        parts = () if self._module is None else self._module.modules()
        holders = chain.from_iterable((p._modules, p._parameters, p._buffers) for p in parts)
        self._holders = [holder for holder in holders if holder]
        self._ids = frozenset(map(id, self.tensors))
        return before is None or not same(before, self.tensors)

    def glance(self) -> tuple:
        """Equal to an earlier one unless something was written, moved or replaced since; see above."""
        objects = [list(map(id, holder.values())) for holder in self._holders]
        return objects, [(t.data_ptr(), t._version) for t in self.tensors], self.steps

    def look(self) -> dict[int, tuple | None]:
        """id → what the tensor holds, of each, None where the CPU cannot read it; also kept as ``states``."""
        self.states = self._now()
        return self.states

    def moved(self) -> bool:
        """Whether a tensor holds something else than at the last ``look``."""
        return self._now() != self.states

    def _now(self) -> dict[int, tuple | None]:
        return dict(zip(map(id, self.tensors), digests(self.tensors), strict=True))


def _counting(watch: weakref.ref[Watch]):
    def count(optimizer: Optimizer, *_) -> None:
        own = watch()
        if own is not None and any(id(p) in own._ids for group in optimizer.param_groups for p in group["params"]):
            own.steps += 1

    return count


def tensors_of(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else list(chain(module.parameters(), module.buffers()))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether both are the same objects."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
