"""Reading: regular files only, bounded by what they hold; damage is one line. Writing: exclusive, complete or not."""

import errno
import gzip
import io
import os
import secrets
import time
import zipfile

import numpy as np
import pytest

from sgm_engine.data.images import load_images
from sgm_engine.data.sets import open_images
from sgm_engine.files import limits, reading, writing

IDX = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3)) + bytes(18)


def bomb(path, size: int) -> None:
    """An .npz of a few KB whose arr_0 has ``size`` bytes."""
    shape = (size >> 10, 32, 32, 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _ in range(size >> 20):
            entry.write(bytes(1 << 20))


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("SGM_FILE_MEMORY", "8M")
    bomb(tmp_path / "x.npz", 64 << 20)
    with pytest.raises(ValueError, match=r"x\.npz: its content asks for 67\.1 MB"):
        open_images(tmp_path / "x.npz")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(IDX + bytes(64 << 20)))
    for read in (open_images, load_images):
        with pytest.raises(ValueError, match=r"unpacks to more than 8\.39 MB"):
            read(tmp_path if read is load_images else f"{tmp_path}:train")
    monkeypatch.setenv("SGM_FILE_MEMORY", "1G")
    assert len(open_images(tmp_path / "x.npz")) == 65536


def test_the_limit_is_a_size(monkeypatch):
    for text, value in (("512", 512), ("2k", 2048), ("3G", 3 << 30), ("", 256 << 20)):
        monkeypatch.setenv("SGM_FILE_MEMORY", text)
        assert limits.allowance() == value
    monkeypatch.setenv("SGM_FILE_MEMORY", "plenty")
    with pytest.raises(ValueError, match="such as 512M or 4G, got 'plenty'"):
        limits.allowance()


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"dev-{name}").symlink_to("/dev/zero")
    start = time.monotonic()
    for path in (tmp_path / name, tmp_path / f"dev-{name}"):
        with pytest.raises(ValueError, match="is not a regular file"):
            open_images(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "train-images-idx3-ubyte.gz", "data_batch_1.bin.gz"])
def test_damage_is_one_line_that_names_the_file(tmp_path, name):
    whole = io.BytesIO()
    (np.savez_compressed if name == "x.npz" else np.save)(whole, np.zeros((4, 8, 8, 1), np.uint8))
    whole = gzip.compress(IDX) if name.endswith("gz") else whole.getvalue()
    path, rng = tmp_path / name, np.random.default_rng(1)
    what = tmp_path if name.endswith("gz") else path
    for trial in range(60):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content if trial % 2 else whole[: rng.integers(len(whole))])
        try:
            open_images(what).all()
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), error


@pytest.mark.parametrize("header", ["{'descr': '|u1', 'shape': (", "(" * 3000, "lambda: 0", "é"])
def test_a_npy_header_that_is_no_python(tmp_path, header):
    text = header.encode().ljust(60) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(ValueError, match=r"x\.npy.*damaged or no \.npy"):
        open_images(tmp_path / "x.npy")


def test_json_and_yaml_without_end():
    for text in ("[" * 100_000, '{"a":' * 50_000, "NaN", "[1, Infinity]", "{"):
        with pytest.raises(ValueError):
            reading.parse_json(text)
    for text in (
        "[" * 50_000,
        "a: &x [1]\nb: *x",
        "? [1]\n: 2",
        "a: {b",
        "!!python/object/apply:os.system [ls]",
        "x" * 99_999,
    ):
        with pytest.raises(ValueError) as caught:
            reading.parse_yaml(text)
        assert "\n" not in str(caught.value)
    assert reading.parse_yaml("a: [1, 2e-5]") == {"a": [1, "2e-5"]}


# ---- writing


def test_a_planted_link_is_neither_followed_nor_reused(tmp_path, monkeypatch):
    """The name of the temporary file cannot be guessed; and if it were, the file would not be opened."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / f".out.npz.{os.getpid()}.tmp").symlink_to(victim)
    writing.write_file(tmp_path / "out.npz", b"new")
    writing.check_writable(tmp_path / "out.npz")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".out.npz.guessed.tmp").symlink_to(victim)
    with pytest.raises(OSError) as caught:
        writing.write_file(tmp_path / "out.npz", b"newer")
    assert caught.value.errno in (errno.EEXIST, errno.ELOOP)
    assert victim.read_text() == "kept" and (tmp_path / "out.npz").read_bytes() == b"new"


def test_a_link_at_the_target_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "out").symlink_to(tmp_path / "victim")
    writing.write_file(tmp_path / "out", "new")
    assert (tmp_path / "victim").read_text() == "kept" and not (tmp_path / "out").is_symlink()


def test_a_fault_leaves_nothing(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(KeyboardInterrupt), writing.staged(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "before"


def test_an_interrupt_while_a_file_is_opened_stays_one(tmp_path, monkeypatch):
    """The file that was opened by then is closed once: no bad descriptor takes the place of the Ctrl-C."""
    (tmp_path / "x").write_bytes(b"content")
    real = io.open

    def interrupt():
        raise KeyboardInterrupt

    def interrupted(*args, **kwargs):
        return real(*args, **kwargs), interrupt()

    monkeypatch.setattr(io, "open", interrupted)
    monkeypatch.setattr(reading, "open", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        reading.read_bytes(tmp_path / "x")
