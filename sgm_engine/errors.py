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


class CannotRun(ValueError):
    """An executor other than eager cannot run this model, or not any more; the message says what is in the way."""


class JobBusy(EngineError):
    """Another process writes the shards that a job was to write."""


class _Unfinished(EngineError):
    """Carries what did finish: samples [k, C, H, W] in the order of sample_ids; from a stream, which has yielded what
    it had, both are empty. divergences: the samples that became non-finite."""

    def __init__(self, message: str, divergences: list[Divergence], sample_ids: list[int], samples: Tensor):
        super().__init__(message)
        self.divergences, self.sample_ids, self.samples = divergences, sample_ids, samples

    def __reduce__(self):
        return _again, (type(self), str(self), self.divergences, self.sample_ids, self.samples)


def _again(kind: type[_Unfinished], *args) -> _Unfinished:
    """From another process: SampleDiverged takes no message."""
    error = kind.__new__(kind)
    _Unfinished.__init__(error, *args)
    return error


class Cancelled(_Unfinished):
    """``Engine.cancel()`` stopped the request; what is finished is attached."""


class SampleDiverged(_Unfinished):
    """Some samples became non-finite; the good ones are attached."""

    def __init__(self, divergences: list[Divergence], sample_ids: list[int], samples: Tensor):
        shown = ", ".join(map(str, divergences[:4])) + (", …" if len(divergences) > 4 else "")
        message = (
            f"non-finite: {shown} ({len(divergences)} in all; the others are unaffected and in .samples, .sample_ids). "
            "Lower step_lr, or check the model's weights and precision"
        )
        super().__init__(message, divergences, sample_ids, samples)


class DeadlineExceeded(_Unfinished, TimeoutError):
    """A request to a service was not finished by its deadline; what is finished is attached."""


class QueueFull(EngineError):
    """A service has accepted as many samples as it may: try again later, or let submit wait."""


class ServiceClosed(EngineError):
    """The service has been shut down: it takes no more requests, and those that it dropped say so."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one behind it, says that a device or the host has no memory left."""
    import torch

    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
