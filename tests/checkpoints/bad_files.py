"""What the tests of bad files share."""

import io
import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save

from sgm_engine.models import NCSNv2

GADGETS = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.__import__",
    "builtins.open",
    "runpy.run_path",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "numpy.load",
    "functools.partial",
    "torch.nn.Linear",
    "sgm_engine.cli.main",
]


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSNv2([1.0, 0.5, 0.25], channels=1, ngf=2, image_size=8)


METADATA = {"format": "sgm-engine", "format_version": "1", "config": model().config.to_json()}


def state():
    return {k: v.clone() for k, v in model().state_dict().items()}


def zipped(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def ours(**changes) -> bytes:
    """Our .safetensors with some of its metadata or config fields replaced (None: left out)."""
    m = model()
    metadata = {"format": "sgm-engine", "format_version": "1", "config": json.loads(m.config.to_json())}
    for name, value in changes.items():
        where = metadata if name in metadata or name == "metadata" else metadata["config"]
        where[name] = value
        if value is None:
            del where[name]
    if isinstance(metadata.get("config"), dict):
        metadata["config"] = json.dumps(metadata["config"])
    return save(m.state_dict(), metadata)


def rezipped(change, compression=zipfile.ZIP_STORED) -> bytes:
    """A torch file whose entries {name: bytes} went through ``change``."""
    with zipfile.ZipFile(io.BytesIO(zipped(state()))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def program(data: bytes, content=b"0" * 64) -> bytes:
    """A torch file with this pickle program and one storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def stream(data: bytes) -> bytes:
    """The same in the layout before zip."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    before = b"".join(pickle.dumps(part, 2) for part in head)
    return before + data + pickle.dumps(["0"], 2) + struct.pack("<q", 16) + b"0" * 64


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def one_tensor(shape=(4,), stride=(1,), offset=0, numel=16, storage="FloatStorage") -> bytes:
    """The pickle of {"begin_conv.weight": tensor}, with the numbers given."""
    counts = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, stride)]
    pid = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text("0") + text("cpu") + integer(numel) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + integer(offset) + b"".join(counts) + b"\x89}tR"
    return b"\x80\x02}" + text("begin_conv.weight") + rebuilt + b"s."


def call(name: str, argument: bytes) -> bytes:
    module, function = name.rsplit(".", 1)
    return f"c{module}\n{function}\n(".encode() + argument + b"tR"


def bombs(canary: Path) -> dict[str, bytes]:
    """Pickles that would leave the canary behind if anything ran them."""
    command = text(f"touch {canary}")
    found = {f"calls {name}": b"\x80\x02" + call(name, command) + b"." for name in GADGETS}
    found["calls os.system beside weights"] = one_tensor()[:-1] + text("x") + call("os.system", command) + b"s."
    found["protocol 0"] = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    found["protocol 4"] = b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + command + b"tR."
    found["INST"] = b"\x80\x02(" + command + b"ios\nsystem\n."
    found["OBJ"] = b"\x80\x02(cos\nsystem\n" + command + b"o."
    found["NEWOBJ"] = b"\x80\x02csubprocess\nPopen\n(" + command + b"t\x81."
    empty = b"\x80\x02ccollections\nOrderedDict\n)R}"
    found["BUILD"] = empty + text("__setstate__") + b"cos\nsystem\nsb" + command + b"b."
    found["EXT1"] = b"\x80\x02\x82\x01."
    return found


def changed(**tensors) -> dict:
    """The good state with tensors replaced, or left out where None."""
    return {k: v for k, v in (state() | {k.replace("__", "."): v for k, v in tensors.items()}).items() if v is not None}


def poisoned(value: float) -> dict:
    bad = state()
    bad["refine2.msf.convs.0.weight"][1, 0, 2, 2] = value
    return bad


def deflated(entries: dict) -> None:
    entries["archive/data/0"] = bytes(1 << 30)


def files(canary: Path) -> dict[str, bytes]:
    good = {"zip": zipped(state()), "legacy": legacy(state()), "safetensors": ours()}
    found = {}
    for kind, content in good.items():
        for part in (0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
            found[f"{kind} truncated to {part}"] = content[: int(part * len(content))]
    for name, data in bombs(canary).items():
        found[f"gadget {name}"] = program(data)
        found[f"gadget {name}, legacy"] = stream(data)
    for i in range(4):  # the zip layout carries checksums; for the others see test_flipped_bits
        flipped = bytearray(good["zip"])
        flipped[flipped.index(struct.pack("<f", 1.0)) if i == 0 else (i * len(flipped)) // 5] ^= 0x10
        found[f"zip flipped {i}"] = bytes(flipped)
    found |= {
        "stride 0, 40 GB": program(one_tensor((10**10,), (0,), 0, 16)),
        "stride 0, 40 GB, legacy": stream(one_tensor((10**10,), (0,), 0, 16)),
        "storage of 40 GB": program(one_tensor((10**10,), (1,), 0, 10**10)),
        "storage of 40 GB, legacy": stream(one_tensor((10**10,), (1,), 0, 10**10)),
        "storage of 2^62 values": program(one_tensor((4,), (1,), 0, 2**62)),
        "shape beyond the storage": program(one_tensor((4, 8), (8, 1))),
        "offset beyond the storage": program(one_tensor((4,), (1,), 13)),
        "negative offset": program(one_tensor((4,), (1,), -4)),
        "negative stride": program(one_tensor((4,), (-1,), 3)),
        "negative shape": program(one_tensor((-4,), (1,))),
        "shape and stride of two lengths": program(one_tensor((4,), (1, 1))),
        "unknown storage": program(one_tensor(storage="QInt8Storage")),
        "no such storage": program(one_tensor().replace(text("0") + text("cpu"), text("1") + text("cpu"))),
        "a million opcodes": program(b"\x80\x02]" + b"N0" * 600_000 + b"."),
        "a memo of 2^31": program(b"\x80\x02]r\xff\xff\xff\x7fj\x00\x00\x00\x70."),
        "a text of 4 GB": program(b"\x80\x02X\xff\xff\xff\xff."),
        "nothing on the stack": program(b"\x80\x02tR."),
        "two values": program(b"\x80\x02NN."),
        "no end": program(b"\x80\x02N"),
        "nested 200,000 deep": program(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
        "deflate bomb": rezipped(deflated, zipfile.ZIP_DEFLATED),
        "compressed": rezipped(lambda entries: None, zipfile.ZIP_DEFLATED),
        "big-endian": rezipped(lambda entries: entries.update({"archive/byteorder": b"big"})),
        "no data.pkl": rezipped(lambda entries: entries.pop("archive/data.pkl")),
        "two data.pkl": rezipped(lambda entries: entries.update({"data.pkl": b"\x80\x02}."})),
        "a storage too short": rezipped(lambda entries: entries.update({"archive/data/3": b"1234"})),
        "a storage missing": rezipped(lambda entries: entries.pop("archive/data/3")),
        "NaN": zipped(poisoned(math.nan)),
        "Inf": zipped(poisoned(math.inf)),
        "NaN, legacy": legacy(poisoned(-math.nan)),
        "NaN, safetensors": save(poisoned(math.nan), METADATA),
        "NaN in the average": zipped([state(), {}, 1, 2, poisoned(math.nan)]),
        "float64 beyond float32": zipped(changed(end_conv__bias=torch.tensor([1e300], dtype=torch.float64))),
        "a key missing": zipped(changed(res3__0__conv1__bias=None)),
        "a key extra": zipped(changed(res9__conv__bias=torch.zeros(1))),
        "half the keys": zipped(dict(list(state().items())[::2])),
        "a shape wrong": zipped(changed(end_conv__bias=torch.zeros(2))),
        "a shape transposed": zipped(changed(res2__0__shortcut__conv__weight=torch.zeros(2, 4, 1, 1))),
        "integers": zipped(changed(end_conv__bias=torch.zeros(1, dtype=torch.int64))),
        "prefix on one key": zipped(changed(end_conv__bias=None) | {"module.end_conv.bias": torch.zeros(1)}),
        "sigmas ascend": zipped(changed(sigmas=torch.tensor([0.25, 0.5, 1.0]))),
        "sigmas of 0": zipped(changed(sigmas=torch.tensor([1.0, 0.5, 0.0]))),
        "sigmas NaN": zipped(changed(sigmas=torch.tensor([1.0, math.nan, 0.1]))),
        "another network": zipped(torch.nn.Linear(2, 2).state_dict()),
        "a list of numbers": zipped([1, 2, 3]),
        "a list of nothing": zipped([]),
        "a number": zipped(7),
        "a tensor": zipped(torch.zeros(3)),
        "a dictionary of texts": zipped({"model": "weights", "epoch": 3}),
        "an optimizer only": zipped({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}),
        "a model object": zipped(torch.nn.Linear(2, 2)),
        "a NumPy scalar": zipped({"model": state(), "loss": torch.zeros(1).numpy()[0]}),
        "empty": b"",
        "zeros": bytes(10_000),
        "text": b"hello, weights\n",
        "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "an old tar": b"sys_info\0" + bytes(248) + b"ustar" + bytes(1000),
        "a NumPy archive": rezipped(lambda entries: (entries.clear(), entries.update({"arr_0.npy": b"\x93NUMPY"}))),
        "safetensors: header of 2^63": struct.pack("<Q", 2**63) + b"{}" + bytes(100),
        "safetensors: header not JSON": struct.pack("<Q", 16) + b"{" * 16,
        "safetensors: 40 GB claimed": _header(
            {"a": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}
        ),
        "safetensors: offsets overlap": _header(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            }
        ),
        "ours: version 2": ours(format_version="2"),
        "ours: no version": ours(format_version=None),
        "ours: another format": ours(format="other"),
        "ours: no config": ours(config=None),
        "ours: config not JSON": ours(config="{'a': 1}"),
        "ours: config nested deep": ours(config="[" * 100_000),
        "ours: config a list": ours(config="[1, 2]"),
        "ours: field missing": ours(ngf=None),
        "ours: field unknown": ours(activation="relu"),
        "ours: string numbers": ours(ngf="2"),
        "ours: string sigmas": ours(sigmas=["1.0", "0.5", "0.25"]),
        "ours: NaN in sigmas": ours(sigmas=[1.0, math.nan, 0.25]),
        "ours: other sigmas": ours(sigmas=[1.0, 0.5, 0.2]),
        "ours: a billion channels": ours(channels=10**9),
        "ours: another width": ours(ngf=4),
        "ours: another architecture": ours(architecture="NCSN", divide_by_sigma=False),
        "ours: no such architecture": ours(architecture="__import__('os')"),
        "ours: plan of lists": ours(plan={"step_lr": [1e-5]}),
        "ours: plan not finite": ours(plan={"step_lr": math.inf}),
    }
    return found


def _header(tensors: dict) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(12)


CANARY = Path(f"canary-{os.getpid()}")


FILES = files(CANARY)
