"""What bench/gpu times, without a GPU: the programs themselves on the CPU, with a timer that only counts."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench.gpu import convolutions, exercise, kernels, network, norms, sanitize, timing
from sgm_engine.kernels import cuda, ops, reference
from sgm_engine.kernels.tables import backend as backend_table
from sgm_engine.kernels.tables import conv as conv_table
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import float8 as triton_float8
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import update as triton_update
from sgm_engine.kernels.triton.launch import Launch
from tests.kernels.cuda_kernels import host_library  # noqa: F401 - a fixture


def test_what_the_sanitizer_watches_runs(host_library, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    on_the_cpu(monkeypatch)
    exercise.cuda()


def on_the_cpu(monkeypatch):
    for module in (exercise, kernels, norms, network, convolutions, timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (kernels, network, convolutions):
        monkeypatch.setattr(module, "apart", lambda cases, seconds=60: iter(rows_of(cases())))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_sanitizer_knows_every_triton_kernel_by_its_name(monkeypatch):
    on_the_cpu(monkeypatch)
    launched = set()
    monkeypatch.setattr(Launch, "__call__", lambda launch: launched.add(launch.kernel.__name__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    exercise.triton()
    assert {f"kne={name}" for name in launched} == set(sanitize.KERNELS["triton"])


@pytest.mark.parametrize("what", norms.FORMS)
def test_a_kernel_is_checked_before_it_is_timed(host_library, monkeypatch, what):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setattr(norms, "DEVICE", "cpu")
    call, check = norms.case(cuda, 2, 32, 8, torch.bfloat16, torch.channels_last, what)
    assert check() is not None  # nothing was written yet
    call()
    assert check() is None


def rows_of(cases):
    return [row for _, measure in cases for row in measure()]


@pytest.fixture
def no_gpu(host_library, monkeypatch):
    """Every stage runs on the CPU: the host's build of the library, in place of Triton too, and a fake timer."""
    timed = []

    def microseconds(calls):
        for call in calls:
            call()
        timed.append(len(calls))
        return 10.0

    on_the_cpu(monkeypatch)
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setattr(triton_update, "langevin_update", cuda.langevin_update)
    monkeypatch.setattr(triton_noise, "noise_fill", cuda.noise_fill)
    monkeypatch.setattr(triton_norm, "norm", cuda.norm)
    monkeypatch.setattr(triton_norm, "norm_workspace_size", cuda.norm_workspace_size)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "fake")
    monkeypatch.setattr(timing, "microseconds", microseconds)
    monkeypatch.setattr(timing, "copies", lambda size: 2)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(timing, "peak_flops", lambda: 1e15)
    return timed


def test_the_stage_of_kernels(no_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "BATCHES", (2,))
    monkeypatch.setattr(norms, "BATCHES", (2, 128))
    monkeypatch.setattr(norms, "SHAPES", [(32, 2)])
    rows = rows_of(kernels.kernels())
    assert [r for r in rows if r.get("failed")] == []
    assert {r["backend"] for r in rows[1:]} == {"CUDA", "Triton", "CUDA cluster", "CUDA portable"}
    measured = [r for r in rows if "µs" in r]
    assert len(measured) == 4 + 2 * (3 * 3 + 2 * 2) == len(no_gpu) and set(no_gpu) == {2}
    small = next(r for r in measured if r["case"].startswith("add + norm + ELU") and r["batch"] == 128)
    assert small["floor µs"] == 4 * 2 * 128 * 32 * 4 / 1e6 and small["share"] == small["floor µs"] / 10
    assert small["goal"] == "missed" and measured[0]["goal"] == "none"


def test_the_stage_that_writes_the_table_of_backends(no_gpu, monkeypatch, tmp_path):
    """CUDA C++ is put down where it is right and faster; other devices' entries stay."""
    monkeypatch.setattr(kernels, "BATCHES", (2,))
    monkeypatch.setattr(norms, "BATCHES", (2,))
    monkeypatch.setattr(norms, "SHAPES", [(32, 2)])
    monkeypatch.setattr(backend_table, "PATH", tmp_path / "table.json")
    (tmp_path / "table.json").write_text('{"sm_80": {"x": "CUDA"}, "sm_90": {"old": "CUDA"}}')
    times = iter([3.0, 9.0] + [5.0] * 99)
    monkeypatch.setattr(timing, "microseconds", lambda calls: next(times))
    rows = list(kernels.backends())
    written = backend_table.read(tmp_path / "table.json")
    assert written["sm_80"] == {"x": "CUDA"} and len(written["sm_90"]) == 2 + len(norms.FORMS)
    assert written["sm_90"].pop("langevin_update NHWC bfloat16 NHWC 2^12") == "CUDA"
    assert set(written["sm_90"].values()) == {"Triton"}, "a tie is Triton's"
    assert rows[-1]["case"] == f"{2 + len(norms.FORMS)} cases to table.json, CUDA C++ in 1 of them"


def test_a_kernel_that_is_wrong_is_not_timed(no_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "BATCHES", ())
    monkeypatch.setattr(norms, "BATCHES", (2,))
    monkeypatch.setattr(norms, "SHAPES", [(32, 2)])
    monkeypatch.setattr(triton_norm, "norm", lambda n: n.out.zero_())
    wrong = [r for r in rows_of(kernels.kernels()) if r.get("failed")]
    assert len(wrong) == len(norms.FORMS) and all(r["backend"] == "Triton" and "µs" not in r for r in wrong)


@pytest.fixture
def tuning(no_gpu, monkeypatch, tmp_path):
    """Of one convolution, whose kernel is PyTorch here; the second tile of each kind is wrong. Returns a setter."""

    def convolution(x, weight, bias, residual, dilation, out, partial, tile, scale=None):
        if scale is None:
            y = torch.nn.functional.conv2d(x.float(), weight.float(), bias.float(), 1, dilation, dilation)
        else:
            y = reference.float8_convolution(x, weight, scale, 1.0, bias, None, dilation)
        out.copy_(y if residual is None else y + residual.float())
        if tile in (triton_conv.TILES[1], triton_conv.FLOAT8_TILES[1]):
            out.zero_()
        if tile == triton_conv.LARGE_TILES[0]:
            raise OutOfResources(2**18, 2**17, "shared memory")

    def norm(x, *rest, partials):
        assert partials.shape in ((1, 2, 2, 256), (1, 4, 2, 256), (1, 1, 2, 256))  # 256 pixels in tiles of 128, 64, 256
        return ops.noise_conditioned_norm(x, *rest)

    (tmp_path / "table.json").write_text('{"another": {"shape": {}}, "fake": {"of before": {}}}')
    monkeypatch.setattr(conv_table, "PATH", tmp_path / "table.json")
    monkeypatch.setattr(convolutions, "SHAPES", [(128, 256, 16, 2)])
    monkeypatch.setattr(convolutions, "BATCHES", (1,))
    monkeypatch.setattr(triton_conv, "convolution", convolution)
    monkeypatch.setattr(triton_float8, "quantise", lambda x, s, out: out.copy_(reference.quantised(x, s)))
    monkeypatch.setattr(ops, "inference_norm", norm)

    def run(capability, times):
        times = iter(times)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(timing, "microseconds", lambda calls: (calls[0](), next(times))[1])
        rows = list(convolutions.convolutions())
        assert next(times, None) is None
        table = conv_table.read(tmp_path / "table.json")
        assert table.pop("another") == {"shape": triton_conv.ConvTile()}
        return rows, table["fake"]

    return run


SHAPE = "128×16×16 128→256 3×3 d2 at 1"


@pytest.mark.parametrize("faster", [True, False])
def test_tuning_writes_what_is_faster_and_right(tuning, faster):
    """cuDNN, two tiles that are right, then the norm after it and with it, without and with a sum."""
    (product, *rows), table = tuning((8, 0), [10.0, 8.0 if faster else 9.9, 9.95, 20.0, 19.0, 30.0, 29.9])
    tile = triton_conv.TILES[0]
    assert product == {"case": "matrix product", "TFLOP/s": 1e3}
    assert table == ({f"bfloat16 {SHAPE}": tile} if faster else {}) | {f"bfloat16 {SHAPE}, then norm": tile}
    assert ["wrong by" in r["failed"] for r in rows if r.get("failed")] == [True]
    assert ["shared memory" in r["not run"] for r in rows if r.get("not run")] == [True]
    assert rows[0]["backend"] == "cuDNN" and rows[0]["share"] == 2 * 9 * 128 * 256 * 256 / 1e15 * 1e6 / 10
    assert [r["apart / it"] for r in rows if "apart / it" in r] == [20 / 19, 30 / 29.9]


def test_tuning_in_float8(tuning):
    """Beside bfloat16 where the device has it: with what makes its input, and the fastest tile that is right."""
    bfloat16 = [10.0, 11.0, 12.0, *[13.0] * (len(triton_conv.LARGE_TILES) - 1), *[5.0] * 4]
    rows, table = tuning((9, 0), [*bfloat16, 1.0, 7.0, 4.0, 9.0, 20.0, 20.0, 30.0, 15.0])
    assert sum(" TMA" in r.get("backend", "") for r in rows) == len(triton_conv.LARGE_TILES)
    rows = [r for r in rows if r["case"].startswith("float8")]
    key, tile = f"float8_e4m3fn {SHAPE}", triton_conv.FLOAT8_TILES[2]
    assert table == {key: tile, f"{key}, then sum and norm": tile}
    assert [r.get("µs") for r in rows] == [1.0, 7.0, None, 4.0, 9.0, 20.0, 15.0] and "wrong by" in rows[2]["failed"]
    assert rows[3]["cuDNN bfloat16 / it"] == 2.5 and rows[3]["cuDNN bfloat16 / it and quantise"] == 2.0
    assert all(r["error"] < 4e-3 for r in (rows[1], rows[3]))


@pytest.fixture
def small(monkeypatch):
    """The network of a process, small."""
    cached = (network.network, network.accelerated, network.problem)
    monkeypatch.setattr(network, "NGF", 4)
    monkeypatch.setattr(network, "SIDE", 8)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_the_stages_of_a_step_and_of_chains(no_gpu, small, monkeypatch):
    monkeypatch.setattr(network, "BATCHES", (2,))
    monkeypatch.setattr(network, "CHAINS", ((2, 1),))
    monkeypatch.setattr(
        network, "checked", lambda score, want, most=0.1: 0.01
    )  # so small a network is no measure of bfloat16
    monkeypatch.setattr(network, "ENGINES", {
        "eager bfloat16": {"precision": "bfloat16", "executor": "eager"},
        "graph bfloat16": {"precision": "bfloat16", "executor": "graph", "graph": {"unroll": 8}},
    })  # fmt: skip
    monkeypatch.setattr(network, "PEERS", ("eager",))
    monkeypatch.setattr(timing, "kernels_of", lambda step: step() or {"a": (3, 0.001), "b": (4, 0.002)})
    monkeypatch.setattr(timing, "milliseconds", lambda step: (step(), 5.0)[1])
    ours, refused, peer = network.step_times()
    assert [kernel["kernel"] for kernel in ours["by kernel name"]] == ["b", "a"] and peer["kernels a step"] == 7
    assert ours["kernels a step"] == 7 and 0 < ours["gaps"] < 1 and ours["score error"] == 0.01
    floor = 1e3 * (network.BYTES * 2 + network.WEIGHTS) / 1e12
    assert ours["share of roofline"] * ours["ms a step"] == pytest.approx(floor)
    assert "executor='graph' needs a CUDA device" in refused["failed"]
    assert peer["images/s"] == 2 / (0.005 * 1001) and peer["cuDNN timed"] and not ours["cuDNN timed"]
    (chain,) = rows_of(network.end_to_end())
    assert chain["failed"] is None and chain["images/s of 1,001 NFE"] > 0


def test_a_score_that_is_wrong_is_not_timed():
    want = torch.ones(2, 3)
    assert network.checked(want.bfloat16() * 1.01, want) < 0.1
    for wrong in (want * 1.2, want * float("nan")):
        with pytest.raises(RuntimeError, match="score differs from float32"):
            network.checked(wrong, want)
