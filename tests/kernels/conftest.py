"""Where the tests of CUDA C++ run: on a GPU, and on the CPU."""

import pytest
import torch

from sgm_engine.kernels import cuda


@pytest.fixture(params=["host", "gpu"])
def device(request, monkeypatch):
    """Where the tensors go; cuda.library() is then the library that takes them."""
    if request.param == "host":
        library = request.getfixturevalue("host_library")
        monkeypatch.setattr(cuda, "library", lambda: library)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if cuda.library() is None:
        pytest.fail("libsgm_cuda.so is not built: SGM_WITH_CUDA=1 python setup.py build_ext --inplace")
    return "cuda"
