"""EDM's and EDM2's network pickles: class, arguments and tensors of the network, read as inert data (pickled.py).

Such a file is {"ema": network, …} where every object carries the source of its class. That source is not looked at: the
class's name and arguments say which of our own networks to build, and its tensors fill it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sgm_engine.checkpoints.pickled import Key, Made, Name, interpret
from sgm_engine.checkpoints.torch_file import LEGACY_MAGIC, CheckpointError
from sgm_engine.checkpoints.torch_program import _STORAGES
from sgm_engine.checkpoints.weights_file import State
from sgm_engine.files.reading import open_file
from sgm_engine.models.preconditioning import iddpm_levels

REBUILD = "_reconstruct_persistent_obj"
NETWORKS = {"SongUNet": "SongUNet", "DhariwalUNet": "DhariwalUNet", "UNet": "EDM2UNet"}  # ours, by their name
POSITIONAL = {"UNet": ("img_resolution", "img_channels", "label_dim")}  # what is given without its name, in order
MAX_DEPTH, MAX_MODULES = 12, 20_000


def is_network_pickle(path: Path) -> bool:
    """Whether the file is a pickle that torch.save did not write."""
    with open_file(path) as file:
        head = file.read(20)
    safetensors = head[4:9] == bytes(4) + b"{"
    return head[:1] == b"\x80" and not safetensors and LEGACY_MAGIC.to_bytes(10, "little") not in head


def open_network(path: Path, ema: bool | None) -> tuple[State, dict]:
    """The tensors of the file's network, and the fields of its FamilyConfig."""
    with open_file(path) as file:
        content = _mapping(interpret(file))
    names = [n for n in ("ema", "net") if isinstance(content.get(n), Made)]
    wanted = [n for n in names if n == "ema"] if ema else [n for n in names if n != "ema"] if ema is False else names
    if not wanted:
        held = ", ".join(map(str, list(content)[:6])) or "nothing"
        which = {True: "averaged network (ema)", False: "network beside its average", None: "network"}[ema]
        raise CheckpointError(f"is a pickle that holds no {which}; it holds: {held}. Nothing in it was run")
    chosen = content[wanted[0]]
    fields = _describe(chosen, content.get("encoder"))
    tensors: dict[str, Stored] = {}
    _collect(_network(chosen), "", tensors, [0])
    if fields["architecture"] == "EDM2UNet":
        _check_phases(tensors.get("emb_fourier.phases"))
    return (
        State(
            {name: t.shape for name, t in tensors.items()},
            lambda name: _read(tensors[name]),
            {name: math.prod(t.shape) * 2 for name, t in tensors.items()},
            family="EDM2" if fields["architecture"] == "EDM2UNet" else "EDM",
            averaged=wanted[0] == "ema",
        ),
        fields,
    )


class Stored(NamedTuple):
    """A tensor described, not read: raw is what torch.save made of its storage."""

    raw: bytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _class(value: object) -> str:
    """The name of an object's class."""
    if not isinstance(value, Made):
        return type(value).__name__
    return str(_meta(value).get("class_name", "")) if value.name == REBUILD else value.name


def _meta(value: Made) -> Mapping:
    return _mapping(value.args[0] if value.args else None)


def _attributes(value: object) -> Mapping:
    """An object's __dict__."""
    if not isinstance(value, Made):
        return {}
    state = _meta(value).get("state") if value.name == REBUILD else value.state
    return _mapping(state[0] if isinstance(state, tuple) and state else state)


def _mapping(value: object) -> Mapping:
    if isinstance(value, Made):
        return value.items
    return value if isinstance(value, dict) else {}


def _network(precond: object) -> object:
    modules = _mapping(_attributes(precond).get("_modules"))
    return modules.get("unet", modules.get("model"))


def _arguments(network: object) -> dict[str, object]:
    """What a network was made with, by name."""
    own, kind = _attributes(network), _class(network)
    unnamed, known = own.get("_init_args") or (), POSITIONAL.get(kind, ())
    if not isinstance(unnamed, (tuple, list)) or len(unnamed) > len(known):
        raise CheckpointError(f"made its {kind} with arguments without names, which are not understood")
    arguments = dict(zip(known, unnamed, strict=False)) | _mapping(own.get("_init_kwargs"))
    if not arguments:
        raise CheckpointError(f"does not say with which arguments it made its {kind}")
    return {k: v for k, v in arguments.items() if k not in ("label_dropout", "dropout", "use_fp16")}


def _describe(precond: object, encoder: object) -> dict[str, object]:
    name, own, network = _class(precond), _attributes(precond), _network(precond)
    kind = _class(network)
    if name not in SCHEMES:
        raise CheckpointError(f"holds a network of class {name!r:.60}; {', '.join(SCHEMES)} are supported")
    if kind not in NETWORKS or (name == "Precond") != (kind == "UNet"):
        raise CheckpointError(f"holds a {name} around a {kind!r:.60}; {', '.join(NETWORKS)} are supported")
    if encoder is not None and _class(encoder) != "StandardRGBEncoder":
        raise CheckpointError(
            f"draws latents, which its {_class(encoder):.60} decodes: networks of pixels are supported"
        )
    arguments = _arguments(network)
    plain = (int, float, str, bool, type(None))
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    for key, value in arguments.items():
        if not all(isinstance(v, plain) for v in (value if isinstance(value, list) else [value])):
            raise CheckpointError(f"has {key} of {kind} as {type(value).__name__}, where numbers and names belong")
    given = "img_channels" if kind == "UNet" else "in_channels"
    size, channels = arguments.get("img_resolution"), arguments.get(given)
    if type(size) is not int or type(channels) is not int:
        raise CheckpointError(f"has a {kind} without img_resolution or {given}")
    try:
        scheme, low, high = SCHEMES[name]({**_mapping(own.get("_init_kwargs")), **own})
    except (ValueError, OverflowError, IndexError) as error:
        raise CheckpointError(f"has a {name} whose constants give no noise levels ({error})") from None
    return {
        "architecture": NETWORKS[kind],
        "network": arguments,
        "channels": channels,
        "image_size": size,
        "preconditioning": scheme,
        "data_range": (-1.0, 1.0),
        "sigma_min": low,
        "sigma_max": high,
        "plan": {"name": "heun", "nfe": 63 if kind == "UNet" else 35},
        "family": f"{'EDM2' if kind == 'UNet' else 'EDM'} {kind}, {name}",
    }


def _number(own: Mapping, name: str, default: float) -> float:
    value = own.get(name, default)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else default


def _edm(own: Mapping) -> tuple[dict, float, float]:
    low, high = max(_number(own, "sigma_min", 0), 0.002), min(_number(own, "sigma_max", math.inf), 80.0)
    return {"name": "edm", "sigma_data": _number(own, "sigma_data", 0.5)}, low, high


def _vp(own: Mapping) -> tuple[dict, float, float]:
    beta_d, beta_min, scale = _number(own, "beta_d", 19.9), _number(own, "beta_min", 0.1), _number(own, "M", 1000) - 1
    ends = [math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in (_number(own, "epsilon_t", 1e-5), 1.0)]
    return {"name": "vp", "beta_min": beta_min, "beta_d": beta_d, "scale": scale}, *ends


def _ve(own: Mapping) -> tuple[dict, float, float]:
    return {"name": "ve"}, _number(own, "sigma_min", 0.02), _number(own, "sigma_max", 100.0)


def _iddpm(own: Mapping) -> tuple[dict, float, float]:
    scheme = {"C_1": _number(own, "C_1", 0.001), "C_2": _number(own, "C_2", 0.008), "M": int(_number(own, "M", 1000))}
    u = iddpm_levels(**scheme)
    return {"name": "iddpm"} | scheme, float(u[-2]), float(u[0])


SCHEMES = {"EDMPrecond": _edm, "VPPrecond": _vp, "VEPrecond": _ve, "iDDPMPrecond": _iddpm, "Precond": _edm}


def _check_phases(stored: Stored | None) -> None:
    """The paper counts phases of Fourier features in turns, the files in radians: a file of turns is refused."""
    if stored is not None and not (_read(stored).float() > 1).any():
        raise CheckpointError("has emb_fourier.phases of at most 1, where radians up to 2π belong")


def _collect(module: object, prefix: str, tensors: dict[str, Stored], seen: list[int]) -> None:
    """Parameters and buffers of a module and of those inside it, by name. seen: how many modules so far."""
    seen[0] += 1
    if prefix.count(".") > MAX_DEPTH or seen[0] > MAX_MODULES:
        raise CheckpointError("nests its modules deeper than a network does")
    own = _attributes(module)
    for kind in ("_parameters", "_buffers"):
        for name, value in _mapping(own.get(kind)).items():
            if value is not None:
                tensors[f"{prefix}{name}"] = _described(value, f"{prefix}{name}")
    for name, child in _mapping(own.get("_modules")).items():
        if isinstance(child, Made):
            _collect(child, f"{prefix}{name}.", tensors, seen)


def _described(value: object, name: str) -> Stored:
    if isinstance(value, Made) and value.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        value = value.args[0] if value.args else None
    if isinstance(value, Made) and value.name in ("_rebuild_tensor", "_rebuild_tensor_v2") and len(value.args) >= 4:
        storage, offset, shape, stride = value.args[:4]
        if isinstance(shape, Made) and shape.name == "Size" and len(shape.args) == 1:
            shape = shape.args[0]
        numbers = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
        loads = isinstance(storage, Made) and storage.callable == Name("torch.storage", "_load_from_bytes")
        loads = loads and [type(a) for a in storage.args] == [bytes]
        if loads and len(shape) == len(stride) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            return Stored(storage.args[0], offset, shape, stride)
    raise CheckpointError(f"describes {name} in a way that PyTorch does not")


def _read(stored: Stored) -> Tensor:
    """The tensor, its size checked against the bytes that are there."""
    stream = io.BytesIO(stored.raw)
    if interpret(stream) != LEGACY_MAGIC:
        raise CheckpointError("holds a storage of an unknown layout")
    for _ in range(2):  # version, facts about the machine
        interpret(stream)
    key = interpret(stream)
    interpret(stream)  # the storages' keys: one
    of = key.of if isinstance(key, Key) else None
    kind = of[1] if isinstance(of, tuple) and len(of) >= 5 and of[0] == "storage" else None
    dtype = _STORAGES.get(f"{kind.module} {kind.name}") if isinstance(kind, Name) else None
    if dtype is None:
        raise CheckpointError("holds a storage of an unknown type")
    count = int.from_bytes(stream.read(8), "little")
    raw = stream.read()
    reach = stored.offset + sum((n - 1) * s for n, s in zip(stored.shape, stored.stride, strict=True)) + 1
    if count * dtype.itemsize != len(raw) or reach > count or math.prod(stored.shape) > count:
        raise CheckpointError(f"is truncated or damaged: a storage of {count} values has {len(raw)} bytes")
    if not math.prod(stored.shape):
        return torch.empty(stored.shape, dtype=dtype)
    return (
        torch.frombuffer(bytearray(raw), dtype=dtype)
        .as_strided(stored.shape, stored.stride, stored.offset)
        .contiguous()
    )
