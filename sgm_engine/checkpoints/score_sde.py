"""score_sde's checkpoints: the network from its config .py, which is parsed and never run.

A config assigns literals to dotted names inside one function: ``config = get_default_configs()``, ``model =
config.model``, ``model.nf = 128``. Whatever is not a literal is left out; where a field that decides something is left
out, the error names it.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Mapping
from pathlib import Path

from sgm_engine.checkpoints.torch_file import CheckpointError, check_file
from sgm_engine.checkpoints.weights_file import State, read_tensor
from sgm_engine.files.reading import read_bytes
from sgm_engine.models.preconditioning import told
from sgm_engine.models.score_sde import NCSNpp

MAX_CONFIG_BYTES = 1 << 20
FUNCTIONS = ("get_config", "get_default_configs")

# What the files that configs import say, for a config that stands alone: image size, levels, σ_max, dropout.
_COMMON = {"data.centered": False, "data.num_channels": 3, "model.sigma_min": 0.01, "model.beta_min": 0.1,
           "model.beta_max": 20.0, "model.embedding_type": "fourier", "training.continuous": True}  # fmt: skip
DEFAULTS = {
    name: _COMMON
    | {"data.image_size": size, "model.num_scales": scales, "model.sigma_max": sigma, "model.dropout": drop}
    for name, size, scales, sigma, drop in (
        ("default_cifar10_configs", 32, 1000, 50.0, 0.1),
        ("default_celeba_configs", 64, 1000, 90.0, 0.1),
        ("default_lsun_configs", 256, 2000, 378.0, 0.0),
    )
}
NETWORK = [
    name for name in inspect.signature(NCSNpp).parameters if name not in ("image_size", "num_channels", "centered")
]
NEEDED = ("nf", "ch_mult", "num_res_blocks", "attn_resolutions", "skip_rescale", "resblock_type", "embedding_type")
FIXED = {"normalization": "GroupNorm", "nonlinearity": "swish", "conditional": True, "name": "ncsnpp"}


def describe(state: State, config: object) -> dict[str, object]:
    """Fields of FamilyConfig. config: the path of the .py, or its fields by dotted name."""
    if config is None:
        raise CheckpointError(
            "is a score_sde checkpoint, whose tensors do not say which diffusion (VE, VP or sub-VP) it is of: "
            "pass config= (its config .py; on the command line --config)"
        )
    fields = dict(config) if isinstance(config, Mapping) else read_config(Path(config))
    for name, only in FIXED.items():
        if fields.get(f"model.{name}", only) != only:
            raise CheckpointError(
                f"has model.{name} {fields[f'model.{name}']!r} in its config; only {only!r} is supported"
            )
    if missing := [f"model.{n}" for n in NEEDED if f"model.{n}" not in fields]:
        raise CheckpointError(f"has a config that lacks {', '.join(missing)}")
    network = {n: fields[f"model.{n}"] for n in NETWORK if f"model.{n}" in fields}
    network |= {n: _needed(fields, f"data.{n}") for n in ("image_size", "num_channels", "centered")}
    network = {n: list(v) if isinstance(v, tuple) else v for n, v in network.items()}
    scheme, low, high, words = _diffusion(fields)
    if "sigmas" in state.shapes and network["embedding_type"] == "fourier":
        held = read_tensor(state, "sigmas").flatten()
        if not math.isclose(held[0].item(), fields.get("model.sigma_max", math.nan), rel_tol=1e-4):
            raise CheckpointError(
                f"holds sigmas from {held[0].item():g}, but its config says sigma_max {fields.get('model.sigma_max')}"
            )
    return {
        "architecture": "NCSNpp",
        "network": network,
        "channels": network["num_channels"],
        "image_size": network["image_size"],
        "preconditioning": scheme,
        "data_range": (-1.0, 1.0) if network["centered"] else (0.0, 1.0),
        "sigma_min": low,
        "sigma_max": high,
        "plan": {"name": "sde_dpm_solver_2m", "nfe": 30},
        "family": f"score_sde {'NCSN++' if network['embedding_type'] == 'fourier' else 'DDPM++'} ({words})",
    }


def _diffusion(fields: Mapping) -> tuple[dict, float, float, str]:
    """(preconditioning, σ_min, σ_max, in words)."""
    sde, continuous = _needed(fields, "training.sde").lower(), fields.get("training.continuous", True)
    if sde == "vesde":
        if not continuous or fields["model.embedding_type"] != "fourier":
            raise CheckpointError(
                "was trained at discrete noise levels (training.continuous False): not supported for VE"
            )
        return {"name": "score"}, _needed(fields, "model.sigma_min"), _needed(fields, "model.sigma_max"), "VE"
    if sde not in ("vpsde", "subvpsde"):
        raise CheckpointError(f"has training.sde {sde!r} in its config; vesde, vpsde and subvpsde are supported")
    first, last = _needed(fields, "model.beta_min"), _needed(fields, "model.beta_max")
    if not continuous and sde == "vpsde":
        count = _needed(fields, "model.num_scales")
        alphas, product = [], 1.0
        for i in range(count):
            product *= 1 - (first + (last - first) * i / (count - 1)) / count
            alphas.append(product)
        ends = [math.sqrt((1 - a) / a) for a in (alphas[0], alphas[-1])]
        return {"name": "ddpm", "alphas_cumprod": alphas}, *ends, "VP, discrete"
    scheme = {"name": "vp" if sde == "vpsde" else "sub_vp", "beta_min": first, "beta_d": last - first, "scale": 999.0}
    times = (1e-3, 1.0)  # at which its samplers end and begin
    means = [math.exp(-0.25 * t**2 * (last - first) - 0.5 * t * first) for t in times]
    ends = [(math.sqrt(1 - m**2) if sde == "vpsde" else 1 - m**2) / m for m in means]
    told(scheme, ends[::-1])
    return scheme, *ends, "VP" if sde == "vpsde" else "sub-VP"


def _needed(fields: Mapping, name: str):
    if name not in fields:
        raise CheckpointError(f"has a config that lacks {name}: it is not there as a literal")
    return fields[name]


def read_config(path: Path) -> dict[str, object]:
    """The literals that a config .py assigns, by dotted name: {"model.nf": 128, …}. Nothing in it runs."""
    try:
        check_file(path)
        tree = ast.parse(read_bytes(path, MAX_CONFIG_BYTES))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        chosen = next((functions[name] for name in FUNCTIONS if name in functions), None)
        if chosen is None:
            raise CheckpointError(f"is no configuration of score_sde: it defines none of {', '.join(FUNCTIONS)}")
        return _imported(tree, path) | _assigned(chosen.body)
    except CheckpointError as error:
        raise CheckpointError(f"config {path}: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"config {path}: is not Python ({str(error)[:100]})") from None


def _imported(tree: ast.Module, path: Path) -> dict[str, object]:
    """What the defaults say that a config imports: from the file beside it, or as they were published."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name in FUNCTIONS for alias in node.names):
            name = (node.module or "").split(".")[-1]
            for folder in (path.parent, path.parent.parent):
                if (folder / f"{name}.py").is_file() and (folder / f"{name}.py") != path:
                    return read_config(folder / f"{name}.py")
            if name in DEFAULTS:
                return dict(DEFAULTS[name])
            raise CheckpointError(f"imports {name}.py, which is not beside it")
    return {}


def _assigned(body: list[ast.stmt]) -> dict[str, object]:
    """Literals by dotted name without the configuration's own; ``model = config.model`` gives that name another."""
    names: dict[str, tuple[str, ...]] = {}
    found: dict[str, object] = {}
    for statement in body:
        if not isinstance(statement, ast.Assign):
            continue
        dotted = [_dotted(target, names) for target in statement.targets]
        source = _dotted(statement.value, names)
        if isinstance(statement.value, ast.Call) or source is not None:  # a ConfigDict, or another name of one
            path = next(
                (d for d, t in zip(dotted, statement.targets, strict=True) if isinstance(t, ast.Attribute) and d),
                source,
            )
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = path or ()
            continue
        try:
            value = ast.literal_eval(statement.value)
        except ValueError:
            continue
        found |= {".".join(d): value for d in dotted if d}
    return found


def _dotted(node: ast.expr, names: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, names)
        return None if before is None else (*before, node.attr)
    return None
