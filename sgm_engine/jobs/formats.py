"""A shard as files, and back. Equal samples give equal bytes: no dates, no names of machines, one order.

npz          shard-000000.npz           arr_0 uint8 [n, H, W, C], what FID tools read; sample_id int64 [n]
safetensors  shard-000000.safetensors   samples float32 [n, C, H, W], as they were drawn; sample_id int64 [n]
png          000000.png, 000001.png, …  one file a sample, by its id
webdataset   shard-000000.tar           ID.png and ID.json a sample; id with 9 digits
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from sgm_engine.files.pictures import decode_picture
from sgm_engine.files.reading import parse_npz, parse_tar
from sgm_engine.outputs import images
from sgm_engine.outputs.images import Range
from sgm_engine.outputs.output import npz_bytes, safetensors_bytes
from sgm_engine.outputs.sample_ids import SampleIds

Contents = Mapping[str, bytes]  # file name → its bytes


class Format(Protocol):
    """lossless: floats as they were drawn, [n, C, H, W]; otherwise uint8 [n, H, W, C], of the data range."""

    name: str
    lossless: bool

    def names(self, shard: int, ids: Iterable[int]) -> list[str]:
        """The files that hold the samples ``ids`` of a shard."""

    def owns(self, name: str, shards: int, ids: SampleIds) -> bool:
        """Whether a job of so many shards and these ids may have a file of that name."""

    def encode(self, shard: int, ids: np.ndarray, samples: np.ndarray, data_range: Range) -> Contents:
        """ids int64 [n], samples float32 [n, C, H, W], finite, of data in data_range."""

    def decode(self, contents: Contents) -> tuple[np.ndarray, np.ndarray]:
        """(ids, samples), as far as the format keeps them."""


class _OneFile:
    """One file a shard."""

    suffix: str

    def names(self, shard: int, ids: Iterable[int]) -> list[str]:
        return [f"shard-{shard:06d}.{self.suffix}"]

    def owns(self, name: str, shards: int, ids: SampleIds) -> bool:
        number = name.removeprefix("shard-").removesuffix(f".{self.suffix}")
        return number.isdecimal() and int(number) < shards and self.names(int(number), ids) == [name]


class Npz(_OneFile):
    name, suffix, lossless = "npz", "npz", False

    def encode(self, shard: int, ids: np.ndarray, samples: np.ndarray, data_range: Range) -> Contents:
        return {self.names(shard, ids)[0]: npz_bytes(samples, ids, data_range)}

    def decode(self, contents: Contents) -> tuple[np.ndarray, np.ndarray]:
        (content,) = contents.values()
        arrays = parse_npz(content)
        return arrays["sample_id"], arrays["arr_0"]


class Safetensors(_OneFile):
    name, suffix, lossless = "safetensors", "safetensors", True

    def encode(self, shard: int, ids: np.ndarray, samples: np.ndarray, data_range: Range) -> Contents:
        return {self.names(shard, ids)[0]: safetensors_bytes(samples, ids, data_range=data_range)}

    def decode(self, contents: Contents) -> tuple[np.ndarray, np.ndarray]:
        from safetensors.numpy import load

        (content,) = contents.values()
        tensors = load(content)
        return tensors["sample_id"], tensors["samples"]


class Png:
    name, lossless = "png", False

    def names(self, shard: int, ids: Iterable[int]) -> list[str]:
        return [f"{i:06d}.png" for i in ids]

    def owns(self, name: str, shards: int, ids: SampleIds) -> bool:
        number = name.removesuffix(".png")
        return number.isdecimal() and int(number) in ids and self.names(0, [int(number)]) == [name]

    def encode(self, shard: int, ids: np.ndarray, samples: np.ndarray, data_range: Range) -> Contents:
        pixels = images.to_uint8(samples, data_range)
        return {name: images.png_bytes(image) for name, image in zip(self.names(shard, ids), pixels, strict=True)}

    def decode(self, contents: Contents) -> tuple[np.ndarray, np.ndarray]:
        ids = [int(name.removesuffix(".png")) for name in contents]
        pictures = [decode_picture(content) for content in contents.values()]
        return np.array(ids, np.int64), np.stack(pictures) if pictures else np.zeros((0, 0, 0, 0), np.uint8)


class WebDataset(_OneFile):
    name, suffix, lossless = "webdataset", "tar", False

    def encode(self, shard: int, ids: np.ndarray, samples: np.ndarray, data_range: Range) -> Contents:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, image in zip(ids.tolist(), images.to_uint8(samples, data_range), strict=True):
                about = json.dumps({"sample_id": i}).encode()
                for suffix, content in (("png", images.png_bytes(image)), ("json", about)):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")  # its date is 1970, its owner root
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return {self.names(shard, ids)[0]: buffer.getvalue()}

    def decode(self, contents: Contents) -> tuple[np.ndarray, np.ndarray]:
        (content,) = contents.values()
        return Png().decode({name: c for name, c in parse_tar(content).items() if name.endswith(".png")})


FORMATS: dict[str, Format] = {f.name: f for f in (Png(), Npz(), Safetensors(), WebDataset())}
