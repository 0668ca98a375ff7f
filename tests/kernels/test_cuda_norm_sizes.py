"""The CUDA C++ norm, whatever the device and the shape: how it is cut into blocks, and what that writes."""

import itertools
import random

import pytest
import torch

from sgm_engine.kernels import cuda
from tests.kernels.cuda_kernels import check_norm, device, host_library  # noqa: F401 - fixtures


@pytest.mark.parametrize("multiprocessors", [1, 7])
@pytest.mark.parametrize("shape", [(1, 512, 7, 7), (3, 256, 16, 16), (1, 1152, 6, 7)])
def test_norm_in_one_pass_whatever_the_device(host_library, monkeypatch, shape, multiprocessors):
    """(1, 1152, 6, 7) takes eight blocks everywhere, for its registers, and the last one has no pixel."""
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setenv("SGM_HOST_MULTIPROCESSORS", str(multiprocessors))
    check_norm("cpu", shape, torch.bfloat16, "nhwc", "cluster")


def test_a_workspace_that_wide_packs_fill_more_of(device):
    """Narrow packs make 59 slabs of these pixels, those of 8 channels 62."""
    check_norm(device, (1, 96, 72, 144), torch.bfloat16, "nhwc", "portable")


def test_no_shape_writes_past_its_workspace(host_library, monkeypatch):
    """Of what the library would launch, aligned or not: a block of the first kernel writes 2·C floats."""
    monkeypatch.setenv("SGM_HOST_DRY", "1")
    draw = random.Random(0)
    shapes = [(c, p) for c in range(8, 260, 8) for p in (49, 1024, 10368)]
    shapes += [(draw.randint(1, 1300), draw.randint(1, 2 ** draw.randint(1, 17))) for _ in range(1500)]
    shapes += [(draw.randint(1, 160) * 8, draw.randint(1, 2 ** draw.randint(1, 14)) * 8) for _ in range(1500)]
    for (channels, pixels), (dtype, nhwc, address) in itertools.product(
        shapes, itertools.product((0, 1), (0, 1), (1 << 20, (1 << 20) + 4))
    ):
        reserved = host_library.sgm_cuda_norm_workspace(3, channels, pixels, nhwc)
        sizes = (1e-5, 3, channels, pixels, pixels, 0, 0)
        images, none = (address, None, address, None, None, None), (None, None, None, 0, 0, 0, None, 0, 0)
        error = host_library.sgm_cuda_norm(*images, dtype, nhwc, *none, *sizes, 1 << 20, 1, None)
        assert error == 0
        written = host_library.sgm_host_blocks() * 2 * channels
        assert written <= reserved, (channels, pixels, dtype, nhwc, address)
