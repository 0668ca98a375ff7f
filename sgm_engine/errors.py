"""What can go wrong while sampling. Wrong arguments are plain ValueError and TypeError; these carry results."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(NamedTuple):
    """The first non-finite value of one sample: the row of its plan, that row's level and sigma."""

    sample_id: int
    row: int
    level: int
    sigma: float

    def __str__(self) -> str:
        return f"sample {self.sample_id} at row {self.row} (level {self.level}, sigma {self.sigma:g})"


class EngineError(RuntimeError):
    """Base of the errors that an engine raises while it runs."""


class EngineBusy(EngineError):
    """A call from within a running request of the same engine and thread."""


class CaptureFailed(EngineError):
    """The step could not be captured as a CUDA graph."""


class _Unfinished(EngineError):
    """samples [k, C, H, W] that did finish, in order of sample_ids (length k); for a stream only those not yet yielded."""

    def __init__(self, message: str, sample_ids: list[int], samples: Tensor):
        super().__init__(message)
        self.sample_ids, self.samples = sample_ids, samples


class Cancelled(_Unfinished):
    """``Engine.cancel()`` stopped the request; the finished samples are attached."""


class SampleDiverged(_Unfinished):
    """Some samples became non-finite (``divergences``); the good ones are attached."""

    def __init__(self, divergences: list[Divergence], sample_ids: list[int], samples: Tensor):
        shown = ", ".join(map(str, divergences[:4])) + (", …" if len(divergences) > 4 else "")
        super().__init__(
            f"{len(divergences)} samples became non-finite: {shown}; the others are unaffected (.sample_ids, .samples). "
            "Lower step_lr, or check the model's weights and precision",
            sample_ids,
            samples,
        )
        self.divergences = divergences
