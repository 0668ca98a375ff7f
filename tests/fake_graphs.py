"""A GraphBackend without a GPU: it records the operations of a step and repeats them, on the very same memory."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgm_engine.errors import CaptureFailed
from sgm_engine.graphs import WARM_UPS


class Recorder(TorchDispatchMode):
    """Records operations with the very tensors they ran on, and refuses what a CUDA stream under capture refuses."""

    HOST_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.item")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.HOST_READS):
            raise CaptureFailed(f"{func} reads back to the host")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class FakeGraphs:
    """The Python of a step runs at capture only.

    captured: (batch, steps) of each graph so far · alive, peak: graphs that there are, and were at most
    """

    def __init__(self):
        self.warm_ups = self.replays = self.alive = self.peak = 0
        self.captured = []

    def capture(self, step):
        for _ in range(WARM_UPS):
            step()
            self.warm_ups += 1
        with Recorder() as recorder:
            step()
        calls = recorder.calls
        updates = [args[0].shape[0] for func, args, _, _ in calls if "langevin_update_" in str(func)]
        self.captured.append((updates[0], len(updates)))

        @torch.no_grad()
        def replay():
            self.replays += 1
            for func, args, kwargs, out in calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(replay, self._freed)
        return replay

    def _freed(self):
        self.alive -= 1
