"""All about this machine's GPU by one command: ``python -m bench.gpu [--sanitize] [--out DIR] [--only STAGE …]``.

Stages, in order: build · tests · sanitize · kernels · step · end-to-end. One that fails is recorded with its reason and
the others go on. Writes DATE-GPU.json and .md to the output folder; exit 0 if every stage passed, 1 if not, 2 without a
GPU. Needs a source tree, torch for CUDA, Triton, a C++ compiler and nvcc; no network. About ten minutes.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, object]
DEVICE = "cuda"
TARGET_SHARE = 0.85  # of the copy bandwidth, at batches of 128 and more
NORM_SHAPES = [(128, 32), (256, 16), (64, 28)]  # channels, side: the norms of NCSN on CIFAR-10 and MNIST


@dataclass
class Stage:
    """What a stage came to. failed: a sentence, or None."""

    name: str
    seconds: float = 0.0
    failed: str | None = None
    rows: list[Row] = field(default_factory=list)


def run_stages(stages: dict[str, Callable[[], list[Row]]], say: Callable[[str], None] = print) -> list[Stage]:
    """Run every stage; an exception ends its stage, not the run. A row with "failed" set fails its stage."""
    done = []
    for name, function in stages.items():
        stage, began = Stage(name), time.perf_counter()
        try:
            stage.rows = function()
            bad = [f"{row.get('case', '?')}: {row['failed']}" for row in stage.rows if row.get("failed")]
            stage.failed = "; ".join(bad) or None
        except Exception as error:
            traceback.print_exc()
            stage.failed = f"{type(error).__name__}: {error}"
        stage.seconds = round(time.perf_counter() - began, 1)
        say(f"{name}: {stage.failed or 'passed'} ({stage.seconds} s)")
        done.append(stage)
    return done


def write_results(folder: Path, machine: Row, stages: list[Stage], today: datetime.date) -> Path:
    """DATE-GPU.json and DATE-GPU.md in folder; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{today.isoformat()}-{re.sub('[^a-z0-9]+', '-', str(machine['gpu']).lower()).strip('-')}"
    record = {"date": today.isoformat(), "machine": machine, "stages": [asdict(stage) for stage in stages]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# {machine['gpu']}, {today.isoformat()}", "", *(f"- {k}: {v}" for k, v in machine.items()), ""]
    for stage in stages:
        lines += [f"## {stage.name}: {'failed' if stage.failed else 'passed'} ({stage.seconds} s)", ""]
        lines += [f"**{stage.failed}**", ""] if stage.failed else []
        lines += table(stage.rows)
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def table(rows: list[Row]) -> list[str]:
    """Markdown; the columns are the keys of all rows, in the order in which they come."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v).replace("|", "/")  # noqa: E731
    body = [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *body, ""]


# -- build, tests, sanitizer -------------------------------------------------------------------------------------------


def shell(*command: str, timeout: float = 500) -> str:
    """Output of a command run in the source tree; RuntimeError with its last lines if it fails."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment())
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {run.returncode}: …{(run.stdout + run.stderr)[-1500:]}")
    return run.stdout + run.stderr


def environment() -> dict[str, str]:
    """This process's import path for its children, whose own folder must not come first (PYTHONSAFEPATH)."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTHONSAFEPATH": "1",
        "SGM_WITH_CUDA": "1",
    }


def make_importable() -> None:
    """In a source tree that is not installed nothing maps kernels/ to sgm_engine.kernels: a folder of links does."""
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p) != ROOT)]
    if importlib.util.find_spec("sgm_engine.kernels") is not None:
        return
    overlay = Path(tempfile.mkdtemp(prefix="sgm-bench-"))
    atexit.register(shutil.rmtree, overlay)
    (overlay / "sgm_engine").mkdir()
    for entry in [*(ROOT / "sgm_engine").iterdir(), ROOT / "kernels"]:
        (overlay / "sgm_engine" / entry.name).symlink_to(entry)
    sys.path.insert(0, str(overlay))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sgm_engine"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def build() -> list[Row]:
    shell(sys.executable, "setup.py", "build_ext", "--inplace")
    make_importable()
    from sgm_engine.kernels import cuda

    if cuda.library() is None:
        raise RuntimeError(f"the build left no {cuda.PATH}")
    return []


def tests() -> list[Row]:
    rows: list[Row] = []
    for file in ("tests/test_cuda.py", "tests/test_triton.py", "tests/test_executor.py"):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", file],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=400,
        )
        summary = run.stdout.strip().splitlines()[-1:] or ["no output"]
        rows.append(
            {"case": file, "result": summary[0], "failed": None if run.returncode == 0 else f"…{run.stdout[-1500:]}"}
        )
    return rows


def exercise() -> None:
    """Every CUDA kernel once or twice, small: what the sanitizer watches."""
    from sgm_engine.kernels import cuda

    for shape in ((2, 3, 16, 16), (2, 5, 3, 3)):
        state = slots(shape[0], 3)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, device=DEVICE, memory_format=layout)
            cuda.noise_fill(x, state["seed"], state["sample_id"], 0, 0, "normal")
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                update(cuda.langevin_update, x, x.to(dtype), state)
    for channels, side in ((32, 16), (6, 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                for variant in ("auto", "portable"):
                    norm_case(cuda, 2, channels, side, dtype, layout, residual=True, variant=variant)[0]()
    torch.cuda.synchronize()


def sanitize() -> list[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise RuntimeError("not run: there is no compute-sanitizer")
    rows: list[Row] = []
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-regex", "kns=sgm"]
        run = subprocess.run(
            [*command, sys.executable, "-c", "from bench.gpu import exercise; exercise()"],
            cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=400,
        )  # fmt: skip
        out = run.stdout + run.stderr
        summary = [
            line.strip("= ") for line in out.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
        ]
        clean = run.returncode == 0 and bool(summary)
        rows.append({"case": check, "result": "; ".join(summary), "failed": None if clean else f"…{out[-1500:]}"})
    return rows


# -- kernels -----------------------------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], None]], repeats: int = 20) -> float:
    """Median time of one call, from replays of a graph that makes all of ``calls`` (on different buffers) in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(bytes_a_call: int) -> int:
    """Sets of buffers that together overflow the L2 cache several times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, 4 * cache // max(bytes_a_call, 1) + 1))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    a = torch.randn(2**28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (microseconds([lambda: b.copy_(a)]) * 1e-6)


def slots(batch: int, rows: int) -> dict[str, torch.Tensor]:
    count = torch.arange(batch, device=DEVICE)
    return {
        "coef": torch.tensor([[1, 1e-3, 1e-2, 0.0]] * rows, device=DEVICE),
        "draw": torch.arange(1, rows + 1, dtype=torch.int32, device=DEVICE),
        "row": torch.zeros_like(count),
        "stop": torch.full_like(count, rows),
        "seed": count + 7,
        "sample_id": count,
        "bad_row": torch.full_like(count, 2**63 - 1),
    }


def update(function: Callable[..., None], x: torch.Tensor, score: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    function(
        x, score, *(state[k] for k in ("coef", "draw", "row", "stop", "seed", "sample_id", "bad_row")), None, x, True
    )


def norm_case(module, batch, channels, side, dtype, layout, residual=False, variant=None):
    """(a call of module.norm on buffers of its own, its check against float64 → an error message or None)."""
    from sgm_engine.kernels import reference

    shape = (batch, channels, side, side)
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    other = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout) if residual else None
    out, total = torch.full_like(x, float("nan")), torch.full_like(x, float("nan")) if residual else None
    parameters = torch.randn(10, 3 * channels, device=DEVICE).split(channels, 1)
    level = torch.arange(batch, device=DEVICE) % 10
    workspace = torch.empty(module.norm_workspace_size(x), device=DEVICE)
    extra = () if variant is None else (variant,)

    def call() -> None:
        module.norm(x, *parameters, level, "elu", other, 1e-5, out, total, workspace, *extra)

    def check() -> str | None:
        few = slice(0, 8)
        summed = x[few] + other[few] if residual else x[few]
        want = reference.noise_conditioned_norm(summed.double(), *(p.double() for p in parameters), level[few], "elu")
        eager = reference.noise_conditioned_norm(summed.float(), *parameters, level[few], "elu")
        allowed = 2 * (eager - want).abs().max() + 0.505 * torch.finfo(dtype).eps * want.abs() + 1e-5
        error = (out[few].double() - want).abs()
        return None if bool((error <= allowed).all()) else f"wrong by {float(error.max()):.3g}"

    return call, check


def kernels() -> list[Row]:
    """Time, floor (bytes that must move over the copy's bandwidth) and their ratio, for both GPU backends."""
    from sgm_engine.kernels import cuda, triton_noise, triton_norm, triton_update

    bandwidth = copy_bandwidth()
    rows: list[Row] = [{"case": "copy", "backend": "torch", "GB/s": bandwidth / 1e9}]

    def report(
        case: str, backend: str, batch: int, moved: int, calls: list[Callable[[], None]], failed: str | None
    ) -> None:
        row: Row = {"case": case, "backend": backend, "batch": batch, "failed": failed}
        if failed is None:
            time_us, floor_us = microseconds(calls), moved / bandwidth * 1e6
            row |= {"µs": time_us, "floor µs": floor_us, "share": floor_us / time_us}
            row["goal"] = ("met" if floor_us / time_us >= TARGET_SHARE else "missed") if batch >= 128 else "none"
        rows.append(row)

    for batch in (1, 16, 128, 1024):
        x = torch.randn(batch, 3, 32, 32, device=DEVICE)
        moved = 2 * x.nbytes + x.nbytes // 2  # x read and written, a bf16 score read
        sets = [(x.clone(), x.bfloat16().contiguous(memory_format=torch.channels_last)) for _ in range(copies(moved))]
        results = []
        for backend, function in (("CUDA", cuda.langevin_update), ("Triton", triton_update.langevin_update)):
            state, probe = slots(batch, 1), x.clone()
            update(function, probe, sets[0][1], state)
            results.append(probe)
            failed = None if torch.equal(results[0], probe) else "its bits differ from CUDA's"
            state["row"].zero_()
            calls = [lambda f=function, s=state, b=b: timed_update(f, *b, s) for b in sets]
            report("update 3×32², bf16 NHWC score", backend, batch, moved, calls, failed)
        fills = [torch.empty_like(x) for _ in range(copies(x.nbytes))]
        for backend, module in (("CUDA", cuda), ("Triton", triton_noise)):
            state = slots(batch, 1)
            calls = [
                lambda m=module, o=o, s=state: m.noise_fill(o, s["seed"], s["sample_id"], 1, 0, "normal") for o in fills
            ]
            report("normals 3×32²", backend, batch, x.nbytes, calls, None)

    nhwc = torch.channels_last
    for channels, side in NORM_SHAPES:
        for batch in (1, 64, 128, 256):
            for residual in (False, True):
                moved = (4 if residual else 2) * 2 * batch * channels * side * side
                variants = [
                    ("CUDA cluster", cuda, "cluster"),
                    ("CUDA portable", cuda, "portable"),
                    ("Triton", triton_norm, None),
                ]
                for backend, module, variant in variants:
                    if variant == "cluster" and torch.cuda.get_device_capability()[0] < 9:
                        continue
                    sets = [
                        norm_case(module, batch, channels, side, torch.bfloat16, nhwc, residual, variant)
                        for _ in range(copies(moved))
                    ]
                    sets[0][0]()
                    name = f"{'add + ' if residual else ''}norm + ELU {channels}×{side}², bf16 NHWC"
                    report(name, backend, batch, moved, [call for call, _ in sets], sets[0][1]())
                    del sets
    return rows


def timed_update(
    function: Callable[..., None], x: torch.Tensor, score: torch.Tensor, state: dict[str, torch.Tensor]
) -> None:
    """The update without its advance, so that any number of replays reads the one row of the table."""
    names = ("coef", "draw", "row", "stop", "seed", "sample_id", "bad_row")
    function(x, score, *(state[k] for k in names), None, x, False)


# -- the step and end to end -------------------------------------------------------------------------------------------


def network():
    from sgm_engine.models.ncsn import NCSN

    torch.manual_seed(0)
    sigmas = torch.logspace(0, -2, 10)
    model = NCSN(sigmas, channels=3, ngf=128, image_size=32).eval().to(DEVICE, memory_format=torch.channels_last)
    return model.requires_grad_(False), sigmas


class VarMeanNorm(torch.nn.Module):
    """The peers' norm: torch.var_mean takes channels-last memory without copies and compiles everywhere."""

    def __init__(self, embed: torch.nn.Embedding):
        super().__init__()
        self.embed = embed

    def forward(self, x: torch.Tensor, level: torch.Tensor, activation: str = "none") -> torch.Tensor:
        from sgm_engine.kernels.reference import ACTIVATIONS

        gamma, alpha, beta = self.embed(level)[:, :, None, None].chunk(3, 1)
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        across, m = torch.var_mean(mean, 1, keepdim=True)
        spread = (mean - m) * torch.rsqrt(across + 1e-5)
        return ACTIVATIONS[activation](gamma * ((x - mean) * torch.rsqrt(variance + 1e-5) + alpha * spread) + beta)


def peer_network(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The same network without this project's kernels, in dtype throughout."""
    from sgm_engine.models.blocks import ConditionalInstanceNormPlus

    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ConditionalInstanceNormPlus):
                setattr(module, name, VarMeanNorm(child.embed))
    return plain.to(dtype)


def peer_step(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, level: torch.Tensor
) -> None:
    """A plain PyTorch Langevin step, in place, in float32 round a bf16 network; nothing goes to the host."""
    x.add_(score(x, level).float(), alpha=1e-5).add_(torch.randn_like(x), alpha=1e-3)


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Callable[[], None], budget_s: float = 2.0) -> float:
    """Median wall time of a step, blocks of steps with one synchronisation each: launch gaps count."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    block = max(1, min(100, int(budget_s / 5 / max(time.perf_counter() - began, 1e-5))))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(block):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3 / block)
    return statistics.median(times)


def peers(model: torch.nn.Module, batch: int) -> dict[str, Callable]:
    """Name → maker of (score function, whether the whole step goes into a manual CUDA graph)."""
    network = peer_network(model, torch.bfloat16)

    def plain(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return network(x.bfloat16(), level)

    def compiled(**options: str) -> Callable:
        torch._dynamo.reset()
        return torch.compile(plain, **options)

    makers = {
        "eager": lambda: (plain, False),
        "eager + manual graph": lambda: (plain, True),
        "compile": lambda: (compiled(), False),
        "compile reduce-overhead": lambda: (compiled(mode="reduce-overhead"), False),
        "compile + manual graph": lambda: (compiled(), True),
    }
    if batch == 128:  # its tuning takes minutes
        makers["compile max-autotune"] = lambda: (compiled(mode="max-autotune"), False)
    return makers


def step_times() -> list[Row]:
    """One step of NCSN CIFAR-10 (bf16, channels-last; x float32) by the engine and by each peer, in one run."""
    from sgm_engine.engine import Engine
    from sgm_engine.plan import annealed_langevin

    torch.backends.cudnn.benchmark = True
    model, sigmas = network()
    rows: list[Row] = []
    for batch in (1, 16, 128):
        x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        level = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        want = model(x, level)  # float32: what every bf16 score is checked against
        scale = want.norm()
        engines = {}
        for executor in ("eager", "graph"):
            engine = Engine(model, batch=batch, device=DEVICE, precision="bfloat16", executor=executor)
            plan = annealed_langevin(sigmas, steps_per_level=10)
            engine.sample(batch, plan=plan)
            before, began = engine.stats.steps, time.perf_counter()
            engine.sample(batch, plan=plan)
            torch.cuda.synchronize()
            engines[executor] = (time.perf_counter() - began) * 1e3 / (engine.stats.steps - before)
            rows.append({"case": f"engine {executor}", "batch": batch, "ms a step": engines[executor]})
        for name, make in peers(model, batch).items():
            row: Row = {"case": name, "batch": batch}
            try:
                with torch.no_grad():
                    score, manual = make()
                    row["score error"] = error = float((score(x, level).float() - want).norm() / scale)
                    if not error < 0.1:
                        raise RuntimeError(f"score differs from float32 by {error:.3g}")
                    state = x.clone()
                    step = lambda s=score, x=state, level=level: peer_step(s, x, level)  # noqa: E731
                    row["ms a step"] = time_ms = milliseconds(graphed(step) if manual else step)
                    row["engine graph is faster by"] = time_ms / engines["graph"]
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
    return rows


def end_to_end() -> list[Row]:
    """Images a second of the engine's chains: 1,001 evaluations each (NCSN CIFAR-10), or a stated part of them."""
    from sgm_engine.engine import Engine
    from sgm_engine.plan import annealed_langevin

    model, sigmas = network()
    rows: list[Row] = []
    for batch, steps_per_level in ((1, 100), (16, 100), (128, 20)):
        plan = annealed_langevin(sigmas, steps_per_level=steps_per_level)
        engine = Engine(model, batch=batch, device=DEVICE, precision="bfloat16", executor="graph")
        engine.sample(batch, plan=annealed_langevin(sigmas, steps_per_level=1))
        torch.cuda.synchronize()
        began = time.perf_counter()
        samples = engine.sample(batch, plan=plan)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        again = engine.sample(batch, plan=plan)
        row: Row = {"case": "engine graph bf16", "batch": batch, "NFE an image": plan.nfe, "s": seconds}
        row |= {"NFE/s": batch * plan.nfe / seconds, "images/s of 1,001 NFE": batch * plan.nfe / seconds / 1001}
        row["failed"] = None if torch.equal(samples, again) else "the same seed gave other bytes"
        rows.append(row)
    return rows


# -- the command -------------------------------------------------------------------------------------------------------


def describe_machine() -> Row:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer's four tools")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="default: bench/results"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    return parser.parse_args(arguments)


STAGES: dict[str, Callable[[], list[Row]]] = {
    "build": build,
    "tests": tests,
    "sanitize": sanitize,
    "kernels": kernels,
    "step": step_times,
    "end-to-end": end_to_end,
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: there is no CUDA device on this machine, so there is nothing to measure", file=sys.stderr)
        return 2
    make_importable()
    names = options.only or [name for name in STAGES if name != "sanitize" or options.sanitize]
    machine = describe_machine()
    stages = run_stages({name: STAGES[name] for name in STAGES if name in names})
    path = write_results(options.out, machine, stages, datetime.date.today())
    print(path.read_text())
    print(f"written to {path} and {path.with_suffix('.json').name}")
    return 1 if any(stage.failed for stage in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
