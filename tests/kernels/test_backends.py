"""Which GPU backend runs an op: the measured table, and what goes by it. On the CPU, with fakes for the kernels."""

import pytest
import torch

from bench.gpu import kernels as bench_kernels
from sgm_engine.cli import doctor
from sgm_engine.engine import loop
from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import cuda, gpu
from sgm_engine.kernels.arguments import Norm, Update
from sgm_engine.kernels.dispatch import launchers
from sgm_engine.kernels.tables import backend as backend_table
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import update as triton_update

NHWC = torch.channels_last
DEVICE = torch.device("cuda")


@pytest.fixture
def ran(monkeypatch):
    """Which launchers ran, in order."""
    calls = []
    for module, names in ((cuda, ("noise_fill", "langevin_update", "norm")), (triton_noise, ("noise_fill",)),
                          (triton_update, ("langevin_update",)), (triton_norm, ("norm",))):  # fmt: skip
        for name in names:
            backend = "CUDA" if module is cuda else "Triton"
            called = lambda *a, b=backend, n=name, **options: calls.append((b, n, (*a, *options.values())))  # noqa: E731
            monkeypatch.setattr(module, name, called)
    return calls


@pytest.fixture
def measured(monkeypatch):
    """The table of the device that every tensor is taken to be on: what it holds is the test's to say."""
    table = {}
    monkeypatch.setattr(backend_table, "of_device", lambda device: table)
    return table


def a_norm(shape=(2, 8, 4, 4), dtype=torch.float32, residual=False, **options):
    x = torch.randn(shape).to(dtype, memory_format=NHWC)
    other = torch.ones_like(x) if residual else None
    out, total = torch.empty_like(x), torch.empty_like(x)
    return Norm(x, None, None, None, None, "elu", other, 1e-5, out, total, torch.empty(4096), **options)


def an_update(x, score):
    return Update(x, score, *[None] * 8, x, True)


def test_without_a_measurement_triton_runs_everything(ran, measured):
    x = torch.zeros(2, 3, 4, 4)
    gpu.noise_fill(x, None, None, 0, 0, "normal")
    gpu.langevin_update(an_update(x, x))
    gpu.norm(a_norm())
    assert [call[:2] for call in ran] == [("Triton", n) for n in ("noise_fill", "langevin_update", "norm")]
    assert launchers("cuda")[:4] == (gpu.noise_fill, gpu.langevin_update, gpu.norm, gpu.norm_workspace_size)


def test_each_case_goes_where_it_was_measured_to_be_fastest(ran, measured):
    measured |= {
        "noise_fill normal NCHW 2^6": "CUDA",
        "langevin_update NCHW bfloat16 NHWC 2^6": "CUDA",
        "norm float32 NHWC 8×4×4 at 2^1": "CUDA cluster",
        "norm residual float32 NHWC 8×4×4 at 2^1": "CUDA portable",
        "norm pool float32 NHWC 8×4×4 at 2^1": "Triton",
    }
    x = torch.zeros(2, 3, 4, 4)
    score = x.bfloat16().contiguous(memory_format=NHWC)
    gpu.noise_fill(x, "seed", "id", 5, 6, "normal")
    gpu.noise_fill(x, "seed", "id", 5, 6, "uniform")
    assert [c[0] for c in ran] == ["CUDA", "Triton"] and ran[0][2] == (x, "seed", "id", 5, 6, "normal")
    ran.clear()
    gpu.langevin_update(first := an_update(x, score))
    gpu.langevin_update(an_update(x, score.half()))
    gpu.langevin_update(an_update(x[:1], score[:1]))
    assert [c[0] for c in ran] == ["CUDA", "Triton", "Triton"] and ran[0][2] == (first,)
    ran.clear()
    gpu.norm(a_norm())
    gpu.norm(a_norm((3, 8, 4, 4)))  # between one power of two and the next
    gpu.norm(a_norm(residual=True))
    assert [c[0] for c in ran] == ["CUDA"] * 3 and [c[2][-1] for c in ran] == ["cluster", "cluster", "portable"]
    ran.clear()
    others = [
        a_norm((4, 8, 4, 4)),
        a_norm((2, 8, 2, 8)),
        a_norm(dtype=torch.bfloat16),
        a_norm(groups=2),
        a_norm(before="elu"),
        a_norm(pool=True),
        a_norm(inverse=0.5),  # float8, which the library cannot write
        a_norm(slab=8),  # partials that it did not make
    ]
    for n in others:
        gpu.norm(n)
    assert [(c[0], c[2]) for c in ran] == [("Triton", (n,)) for n in others]


def test_the_workspace_serves_either(measured, monkeypatch):
    monkeypatch.setattr(cuda, "norm_workspace_size", lambda x: 10**9)
    x = torch.zeros(2, 8, 4, 4)
    assert gpu.norm_workspace_size(x) == triton_norm.norm_workspace_size(x)
    measured["norm float32 NHWC 8×4×4 at 2^1"] = "CUDA"
    assert gpu.norm_workspace_size(x) == 10**9


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_of_the_package():
    assert all(case.split()[0] in ("noise_fill", "langevin_update", "norm") and device.startswith("sm_")
               for device, cases in backend_table.read().items() for case in cases)  # fmt: skip


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = {"sm_90": {"b": "CUDA", "a": "Triton"}}
    backend_table.write(table, tmp_path / "t.json")
    assert backend_table.read(tmp_path / "t.json") == table
    (tmp_path / "t.json").write_text('{"sm_90": {"a": "cuDNN"}}')
    with pytest.raises(ValueError, match=r"t\.json is not a table of backends \('cuDNN' is none of Triton, CUDA"):
        backend_table.read(tmp_path / "t.json")


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table = {"sm_90": {"norm float32 x": "CUDA cluster", "norm float32 y": "Triton", "langevin_update z": "CUDA"}}
    monkeypatch.setattr(backend_table, "table", lambda: table)
    backend_table.of_device.cache_clear()
    yield table
    backend_table.of_device.cache_clear()


@pytest.mark.parametrize("built", [True, False])
def test_what_is_said_of_an_op(a_gpu, monkeypatch, built):
    monkeypatch.setattr(cuda, "library", lambda: object() if built else None)
    assert backend_table.of_device(DEVICE) == (a_gpu["sm_90"] if built else {})
    norm, update, noise = (backend_table.summary(op, DEVICE) for op in ("norm", "langevin_update", "noise_fill"))
    if not built:
        assert norm == update == noise == "Triton (the CUDA library is not built)"
        return
    assert norm == "CUDA cluster in 1 measured cases, Triton in all others"
    assert update == "CUDA in 1 measured cases, Triton in all others"
    assert noise == "Triton (nothing was measured on sm_90)"
    assert loop.backends(DEVICE) == f"update by {update}; norm by {norm}" and loop.backends(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert doctor._ops()["noise_conditioned_norm"].endswith(f"CUDA tensors: {norm}")


def test_of_another_device_nothing_is_known(a_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "library", object)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend_table.of_device(DEVICE) == {}


# The stage that measures it -------------------------------------------------------------------------------------------


def test_what_is_fastest():
    rows = [("a", "CUDA", 9.9), ("a", "Triton", 10.0), ("b", "CUDA cluster", 5.0), ("b", "CUDA portable", 4.0),
            ("b", "Triton", 6.0), ("c", "Triton", 1.0), ("", "torch", 0.1)]  # fmt: skip
    rows = [{"key": key, "backend": backend, "µs": time} for key, backend, time in rows]
    rows += [{"key": "c", "backend": "CUDA", "failed": "wrong"}, {"case": "copy"}]
    assert bench_kernels.fastest(rows) == {"a": "Triton", "b": "CUDA portable", "c": "Triton"}


def test_the_update_that_is_measured_is_the_one_of_an_engine(monkeypatch):
    """Its layouts and dtypes: a table of other cases would never be asked."""
    rows = []
    monkeypatch.setattr(bench_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernels, "report", lambda *a: rows.append(a[-1]))
    monkeypatch.setattr(bench_kernels.timing, "copies", lambda moved: 1)
    monkeypatch.setattr(bench_kernels, "update", lambda *a: None)
    list(bench_kernels.updates(4))
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    conv.forward = lambda x, level: torch.nn.functional.conv2d(x, conv.weight, padding=1)
    engine = Engine(conv, 4, precision="bfloat16", executor="eager", sigmas=[1.0, 0.1], shape=(3, 32, 32))
    engine._executor.sync_weights()
    engine._executor.run(1)
    assert backend_table.update_case(engine._slots.x, engine._executor.score) == rows[0] == rows[1]
