"""CUDA C++: order of threads, other backends, the library and its absence."""

import numpy as np
import pytest
import torch

from sgm_engine.kernels import cuda, noise, reference
from sgm_engine.kernels.arguments import Norm, Update
from sgm_engine.kernels.ops import NO_BAD_ROW
from sgm_engine.kernels.tables import backend as backend_table
from tests.kernels import test_cuda
from tests.kernels.cuda_kernels import bits, check_norm, device, gpu, host_library, plan, poisoned  # noqa: F401 - fixtures


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("variant", ["cluster", "portable", "pool"])
def test_norm_does_not_depend_on_the_order_of_threads(host_library, monkeypatch, variant, groups):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    pool = variant == "pool"
    options = {"terms": "gb" if groups else "gab", "groups": groups, "before": "elu", "pool": pool}
    how = ("auto", "none") if pool else (variant, "elu")
    runs = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("SGM_HOST_ORDER", order)
        runs.append(check_norm("cpu", (2, 32, 16, 16), torch.bfloat16, "nhwc", *how, **options))
    assert torch.equal(*runs)


def test_update_does_not_depend_on_the_order_of_threads(host_library, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setenv("SGM_HOST_ORDER", "reverse")
    test_cuda.test_update_runs_a_plan_to_its_end_and_stops("cpu")
    test_cuda.test_update_is_the_definition("cpu", (2, 3, 32, 48), ("nchw",) * 3, "bf16")


@gpu
def test_backends_agree_bit_for_bit_on_a_gpu():
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import update as triton_update

    seed, sample_id = torch.arange(8, device="cuda") - 4, torch.arange(8, device="cuda") * 2**33
    a, b = poisoned((8, 3, 32, 32), "nhwc", device="cuda"), poisoned((8, 3, 32, 32), "nhwc", device="cuda")
    cuda.noise_fill(a, seed, sample_id, 3, 0, "normal")
    triton_noise.noise_fill(b, seed, sample_id, 3, 0, "normal")
    assert (bits(a) == bits(b)).all()
    score = torch.randn(8, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(8, device="cuda") % 4, torch.full((8,), 4, device="cuda")
    for update, x in ((cuda.langevin_update, a), (triton_update.langevin_update, b)):
        slots_of = (rows[0].clone(), rows[1], seed, sample_id, None)
        update(Update(x, score, *plan("cuda"), *slots_of, score.float(), x, True))
    assert (bits(a) == bits(b)).all()


@gpu
def test_a_captured_chain_repeats_250_times_on_a_gpu():
    """Replays of one captured step walk a whole plan; every chain ends in the same bits and at the plan's last row."""
    shape, steps = (16, 3, 32, 32), 20
    coef = torch.tensor([[1, 0.1, 0.2, 0]] * steps, device="cuda")
    draw, seed = torch.arange(1, steps + 1, device="cuda", dtype=torch.int32), torch.arange(16, device="cuda")
    row, stop = torch.zeros(16, dtype=torch.int64, device="cuda"), torch.full((16,), steps, device="cuda")
    bad_row, x = torch.full((16,), NO_BAD_ROW, device="cuda"), torch.zeros(shape, device="cuda")
    score = torch.empty_like(x)

    def step():
        torch.neg(x, out=score)
        cuda.langevin_update(Update(x, score, coef, draw, row, stop, seed, seed, bad_row, None, x, True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first = None
    for _ in range(250):
        x.zero_(), row.zero_()
        for _ in range(steps):
            graph.replay()
        assert (row == steps).all()
        first = x.clone() if first is None else first
        assert torch.equal(x, first)


def test_a_missing_library_is_an_answer(tmp_path):
    assert cuda.library(tmp_path / "libsgm_cuda.so") is None


def test_an_empty_batch_is_nothing_to_do(device):
    empty, none = torch.empty(0, 3, 4, 4, device=device), torch.empty(0, dtype=torch.int64, device=device)
    cuda.noise_fill(empty, none, none, 0, 0, "normal")
    cuda.langevin_update(Update(empty, empty, *plan(device), none, none, none, none, none, None, empty, True))
    cuda.norm(Norm(empty, None, None, None, None, "none", None, 1e-5, empty, None, empty))


def test_the_table_of_backends_leads_here(device, monkeypatch):
    """Nothing but the table decides (test_backends.py), and what the library is given then is what it takes."""
    from sgm_engine.kernels import gpu as launchers
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import norm as triton_norm

    table = {"norm residual float32 NHWC 8×4×4 at 2^1": "CUDA portable", "noise_fill normal NCHW 2^6": "CUDA"}
    monkeypatch.setattr(backend_table, "of_device", lambda _: table)
    for module in (triton_norm, triton_noise):
        monkeypatch.setattr(module, "norm" if module is triton_norm else "noise_fill", lambda *_: pytest.fail("Triton"))
    x, residual, total = (poisoned((2, 8, 4, 4), "nhwc", device=device) for _ in range(3))
    x.normal_()
    out, residual = torch.empty_like(x), torch.ones_like(x)
    workspace = torch.empty(launchers.norm_workspace_size(x), device=device)
    launchers.norm(Norm(x, None, None, None, None, "elu", residual, 1e-5, out, total, workspace))
    want, both = reference.noise_conditioned_norm(x, activation="elu", residual=residual)
    torch.testing.assert_close(out, want)
    assert torch.equal(total, both)
    fill, seed = poisoned((2, 3, 4, 4), "nchw", device=device), torch.tensor([3, 4])
    launchers.noise_fill(fill, seed.to(device), seed.to(device), 1, 0, "normal")
    assert (bits(fill) == noise.fill((2, 3, 4, 4), seed.numpy(), seed.numpy(), 1, 0, "normal").view(np.uint32)).all()
