"""What the tests of triton share."""

import pytest
import torch

from tests.interpreter import DEVICE

NCHW, NHWC = torch.contiguous_format, torch.channels_last


SEED = [0, -1, 2**63 - 1, 0x299F31D0A4093822, -(2**63)]


SAMPLE_ID = [0, 2**56 - 1, 2**32 - 1, 2**32, 12345678901]


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def on_device(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def poisoned(x):
    return torch.full_like(x, float("nan"))


def bits(x):
    """float32 values as integers: NaN equals itself, and −0 is not +0."""
    return torch.as_tensor(x).cpu().contiguous().view(torch.int32)
