"""A GraphBackend without a GPU: it records the operations of a step and repeats them, on the very same memory."""

import weakref

from sgm_engine.errors import CaptureFailed
from sgm_engine.executors.graphs import WARM_UPS
from tests.recorder import Recorder


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
        recorder = Recorder()
        try:
            with recorder:
                step()
        except RuntimeError as error:
            raise CaptureFailed(str(error)) from error
        updates = [args[0].shape[0] for func, args, _, _ in recorder.calls if "langevin_update_" in str(func)]
        self.captured.append((updates[0], len(updates)))

        def replay():
            self.replays += 1
            recorder.replay()

        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(replay, self._freed)
        return replay

    def _freed(self):
        self.alive -= 1
