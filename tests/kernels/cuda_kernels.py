"""What the tests of cuda share."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine.kernels import cuda, reference
from sgm_engine.kernels.arguments import Norm

ROOT = Path(__file__).parents[2]


SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


GUARD = 4096  # floats after a workspace, which must stay as they are


each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """The library built for the CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DSGM_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}"]
    jobs = []
    for source in SOURCES:
        header = ["-include", str(ROOT / "tests" / "cuda_on_host.h"), "-x", "c++", str(source)]
        jobs.append(subprocess.Popen([compiler, *flags, "-c", *header, "-o", str(folder / f"{source.stem}.o")]))
    assert all(job.wait() == 0 for job in jobs)
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    library = folder / "libsgm_cuda.so"
    subprocess.run([compiler, "-shared", "-Wl,-z,defs", *objects, "-o", str(library)], check=True)
    return cuda.library(library)


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


def poisoned(shape, layout, dtype=torch.float32, device="cpu"):
    return torch.full(shape, float("nan"), dtype=dtype, device=device).to(memory_format=LAYOUTS[layout])


def bits(t):
    return t.detach().cpu().contiguous().numpy().view(np.uint32)


COEF = np.array([[1, 0.25, 0.5, 0], [0.75, -0.1, 0, 0.3], [1.5, 2, 0.1, -0.7], [1, 0.1, 0, 0]], np.float32)


DRAW = np.array([1, 7, -1, 9], np.int32)  # the bits of a uint32


def tensors(shape, layouts, score_dtype, device, generator):
    draw = lambda dtype, layout: (  # noqa: E731
        torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    )
    return draw(torch.float32, layouts[0]), draw(score_dtype, layouts[1]), draw(torch.float32, layouts[2])


def plan(device):
    return torch.from_numpy(COEF).to(device), torch.from_numpy(DRAW).to(device)


def check_norm(
    device, shape, dtype, layout, variant, activation="elu", residual=True, terms="gab", levels=3, mean=3.0,
    groups=None, before="none", pool=False, biases="",
):  # fmt: skip
    """Against float64: at most twice the error of PyTorch's float32 formula, then one rounding to the dtype.

    biases: "b", x has one, "r", the residual has.
    """
    generator = torch.Generator().manual_seed(4)
    batch, channels = shape[:2]
    layout = LAYOUTS[layout]
    x = (torch.randn(shape, generator=generator) * 2 + mean).to(dtype).contiguous(memory_format=layout)
    r = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) if residual else None
    embedding = torch.randn(levels, 3 * channels, generator=generator)
    parameters = {k: embedding[:, i * channels : (i + 1) * channels] for i, k in enumerate("gab")}
    level = torch.randint(levels, (batch,), generator=generator)
    if levels == 1:
        parameters, level = {k: p[0] for k, p in parameters.items()}, None
    gamma, alpha, beta = (parameters[k] if k in terms else None for k in "gab")

    on = lambda t: None if t is None else t.to(device)  # noqa: E731
    out, total = torch.full_like(x, float("nan"), device=device), None
    if residual or before != "none":
        total = torch.full_like(out, float("nan"))
    size = cuda.norm_workspace_size(x)
    workspace = torch.full((size + GUARD,), float("nan"), device=device)
    table = on(embedding)
    views = {
        k: table[:, i * channels : (i + 1) * channels] if levels > 1 else table[0, i * channels : (i + 1) * channels]
        for i, k in enumerate("gab")
    }
    views = [views[k] if k in terms else None for k in "gab"]
    b, rb = (3 * torch.randn(channels, generator=generator) if k in biases else None for k in "br")
    tensors = (on(x), *views, on(level), activation, on(r), 1e-5, out, total, workspace)
    cuda.norm(Norm(*tensors, groups, before, pool, None, None, on(b), on(rb)), variant)
    assert workspace[size:].isnan().all(), "written past the end of the workspace"

    summed = x + r if residual else x
    if before != "none" or (biases and residual):
        exact = reference.summed(x.double(), r if r is None else r.double(), b, rb)
        exact = reference.ACTIVATIONS[before](exact if biases else summed.double())
        error = (total.cpu().double() - exact).abs()
        rounded = 3 * 2**-20 if biases else 2**-22  # of three sums up to 16, in float32
        assert (error <= torch.finfo(dtype).eps * exact.abs() + rounded).all(), f"{error.max():.3g}"
        summed, b = total.cpu(), None
    elif residual:
        assert torch.equal(total.cpu(), summed)
    f64 = [None if p is None else p.double() for p in (gamma, alpha, beta)]
    rest = {"groups": groups, "pool": pool, "bias": b}
    want = reference.noise_conditioned_norm(summed.double(), *f64, level, activation, **rest)
    eager = reference.noise_conditioned_norm(summed.float(), gamma, alpha, beta, level, activation, **rest)
    allowed = 2 * (eager.double() - want).abs().max() + 0.505 * torch.finfo(dtype).eps * want.abs() + 1e-5
    error = (out.cpu().double() - want).abs()
    assert (error <= allowed).all(), f"{error.max():.3g}"
    return out


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
