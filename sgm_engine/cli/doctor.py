"""What is installed here, which backend will run each op, and why. ``sgm doctor``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sgm_engine
from sgm_engine.cli.arguments import BadInput, at_least, levels
from sgm_engine.cli.console import DONE, bad_input, shown
from sgm_engine.cli.model import described, said
from sgm_engine.whereabouts import NOT_BUILT

OPS = {"noise_fill_": "noise_fill", "langevin_update_": "langevin_update", "noise_conditioned_norm": "norm"}


def register(commands) -> None:
    p = commands.add_parser("doctor", help="say what is installed, what will run, and why; or what a checkpoint holds")
    p.description = "Say what is installed, which backend will run each op, and why; of a checkpoint, what it holds."
    p.add_argument("checkpoint", nargs="?", metavar="FILE", help="a checkpoint of any family: what was recognised")
    p.add_argument("--config", metavar="PATH", help="what came with it")
    p.add_argument("--image-size", type=at_least(1), metavar="N", help="in pixels, where neither says it")
    p.add_argument("--sigmas", type=levels, metavar="A,B,…", help="noise levels, descending, where neither says them")
    p.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    for name in ("config", "image_size", "sigmas", "ema"):
        if args.checkpoint is None and getattr(args, name) is not None:
            raise BadInput(f"argument --{name.replace('_', '-')}: goes with FILE, a checkpoint")
    if args.checkpoint is not None:
        with bad_input():
            from sgm_engine.checkpoints.checkpoint import load_checkpoint

            options = {"image_size": args.image_size, "sigmas": args.sigmas, "ema": args.ema}
            model = load_checkpoint(args.checkpoint, args.config, **options)
            line = said(model)
            text = f"{args.checkpoint}: {line}\n{described(model)}"
        print(json.dumps({args.checkpoint: line}) if args.json else "\n".join(map(shown, text.splitlines())))
        return DONE
    found = facts()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(render(found))
    return DONE


def facts() -> dict[str, Any]:
    """Everything ``sgm doctor`` says, as JSON-ready values: {section: {name: value}}. Nothing missing raises."""
    return {
        "system": _system(),
        "packages": _packages(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "ops": _ops(),
        "executor": _executor(),
        "weights": _weights(),
    }


def render(found: dict[str, Any]) -> str:
    """The facts as text, one aligned line each."""
    lines = []
    for section, values in found.items():
        lines += ["", section]
        width = max(map(len, values), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in values.items()]
    return "\n".join(lines[1:])


def _system() -> dict[str, str]:
    return {
        "sgm-engine": f"{sgm_engine.__version__} in {Path(sgm_engine.__file__).parent}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }


def _packages() -> dict[str, str]:
    found = {name: _version(name) for name in ("torch", "triton", "numpy", "safetensors", "pillow")}
    try:
        import torch

        return found | {"torch": torch.__version__}  # with its build, +cu130 or +cpu, which metadata may leave out
    except ImportError:
        return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "triton":
            return "not installed: a GPU needs it, and brings it with PyTorch (or pip install 'sgm-engine[gpu]')"
        return f"not installed: pip install {package}"


def _native():
    """(module, None), or (None, why there is none)."""
    try:
        return importlib.import_module("sgm_engine._C"), None
    except ModuleNotFoundError:
        return None, NOT_BUILT.format(Path(sgm_engine.__file__).parent)
    except ImportError as error:
        return None, f"built, but cannot be loaded ({error}): build them again with pip install ."


def _cpu() -> dict[str, str]:
    native, why = _native()
    found = {"processor": _processor(), "usable cores": str(_cores())}
    if native is None:
        return found | {"C++ kernels": why}
    try:
        forced, available = os.environ.get("SGM_ISA"), ", ".join(native.isas())
        reason = "forced by SGM_ISA" if forced else "the best of this CPU"
        threads = "SGM_NUM_THREADS" if os.environ.get("SGM_NUM_THREADS") else "the cores this process may use"
        found["C++ kernels"] = native.__file__
        found["instruction set"] = f"{native.isa()}: {reason} (available: {available})"
        found["threads"] = f"{native.num_threads()}: {threads}"
    except (ValueError, RuntimeError) as error:  # SGM_ISA or SGM_NUM_THREADS that cannot be had
        found["C++ kernels"] = f"unusable: {error}"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ops() -> dict[str, str]:
    """op → the backend that runs it on a CPU tensor and on a CUDA tensor, or why none does: asked of ops itself."""
    try:
        from sgm_engine.kernels import ops
    except ImportError as error:
        return dict.fromkeys(OPS, f"none: {error}")
    backends = {}
    for device in ("cpu", "cuda"):
        try:
            found = ops.launchers(device)
            backends[device] = [_backend(getattr(found, launcher)) for launcher in OPS.values()]
        except (ImportError, RuntimeError, ValueError) as error:
            backends[device] = [f"none: {error}"] * len(OPS)
    rows = zip(OPS, backends["cpu"], backends["cuda"], strict=True)
    return {op: f"CPU tensors: {cpu}; CUDA tensors: {cuda}" for op, cpu, cuda in rows}


def _backend(launcher: Callable) -> str:
    if launcher.__module__.endswith(".cpu"):
        native, why = _native()
        return f"C++ ({native.isa()})" if native else f"none: {why}"
    import torch

    from sgm_engine.kernels.tables import backend as backend_table

    if not torch.cuda.is_available():
        return f"Triton {_version('triton')}"
    return backend_table.summary(launcher.__name__, torch.device("cuda", torch.cuda.current_device()))


def _executor() -> dict[str, str]:
    """What executor="auto" comes to for the bundled weights, by precision."""
    try:
        import torch

        from sgm_engine.checkpoints.bundled import load_bundled
        from sgm_engine.executors.native.executor import refusal

        if torch.cuda.is_available():
            return {"auto": "graph: there is a GPU"}
        model, _ = load_bundled()
        refused = {precision: refusal(model, precision) for precision in ("float32", "bfloat16", "direct")}
        return {
            p: "native: no GPU, and it takes this model whole" if why is None else f"eager: {why}"
            for p, why in refused.items()
        }
    except (ImportError, ValueError, RuntimeError) as error:
        return {"auto": f"none: {error}"}


def _gpu() -> dict[str, str]:
    found = {"CUDA library": _cuda_library(), "nvcc": _nvcc()}
    try:
        import torch
    except ImportError as error:
        return {"device": f"none: PyTorch is missing ({error})"} | found
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU or driver" if built else f"PyTorch {torch.__version__} is a CPU build"
        return {"device": f"none: {why}"} | found
    names = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        names.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return {"device": "; ".join(names)} | found


def _nvcc() -> str:
    import shutil

    return shutil.which("nvcc") or "not on PATH: only needed to build the CUDA library"


def _cuda_library() -> str:
    libraries = sorted((Path(sgm_engine.__file__).parent / "_cuda").glob("*.so"))
    if libraries:
        return str(libraries[0])
    return "not built, as where there is no GPU: SGM_WITH_CUDA=1 pip install . builds it with nvcc, in some minutes"


def _weights() -> dict[str, str]:
    files = sorted((Path(sgm_engine.__file__).parent / "weights").glob("*.safetensors"))  # NumPy may be what is missing
    sizes = {file.stem: file.stat().st_size for file in files}
    return {name: f"{size / 2**20:.1f} MiB" for name, size in sizes.items()} or {"bundled": "none in this installation"}
