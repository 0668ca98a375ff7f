"""The generator: NumPy's definition against the published vectors, and every C++ build against NumPy, bit for bit."""

import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine import _C
from sgm_engine.kernels import cpu, noise

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "noise_golden.json").read_text())
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    counter, key = (np.ascontiguousarray(a, np.uint32).reshape(len(a), -1) for a in (counter, key))
    out = np.zeros_like(counter)
    _C.philox(counter.ctypes.data, key.ctypes.data, out.ctypes.data, counter.shape[1])
    return out


def fill(shape, seed, sample_id, draw, stream=0, kind="normal", nhwc=False) -> np.ndarray:
    out = torch.full(shape, math.nan).contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    cpu.noise_fill(out, torch.tensor(seed), torch.tensor(sample_id), draw, stream, kind)
    return out.numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("vector", GOLDEN["philox"])
def test_known_answers(vector, isa):
    counter, key, words = (np.array([int(w, 16) for w in vector[k]], np.uint32) for k in ("counter", "key", "words"))
    assert np.array_equal(noise.philox4x32(counter, key)[:, 0], words)
    assert np.array_equal(philox(counter, key)[:, 0], words)


def test_a_million_words(isa):
    rng = np.random.default_rng(1)
    counter, key = (rng.integers(0, 2**32, (k, 1_000_000), np.uint32) for k in (4, 2))
    assert np.array_equal(philox(counter, key), noise.philox4x32(counter, key))


@pytest.mark.parametrize("case", GOLDEN["fill"])
def test_golden_samples(case, isa):
    seed, sample_id = [case["seed"]], [case["sample_id"]]
    rest = case["draw"], case["stream"], case["kind"]
    expected = np.array([float.fromhex(v) for v in case["values"]], np.float32)
    for got in (
        noise.fill((1, *case["shape"]), seed, sample_id, *rest),
        fill((1, *case["shape"]), seed, sample_id, *rest),
    ):
        assert same_bits(got.ravel()[: len(expected)], expected)
        assert hashlib.sha256(np.ascontiguousarray(got).tobytes()).hexdigest() == case["sha256"]


SHAPES = [
    (2, 3, 32, 32),
    (3, 3, 5, 7),
    (2, 64, 14, 14),
    (2, 64, 5, 5),
    (1, 1, 1, 1),
    (1, 300, 2, 2),
    (2, 17, 3, 4),
    (0, 3, 4, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_fill_is_the_definition(shape, nhwc, kind, isa):
    rng = np.random.default_rng(2)
    seed, sample_id = rng.integers(-(2**63), 2**63 - 1, shape[0]), rng.integers(0, 2**56, shape[0])
    for draw, stream in ((0, 0), (1, 0x7F000000), (2**32 - 1, 0x01000000)):
        got = fill(shape, seed.tolist(), sample_id.tolist(), draw, stream, kind, nhwc)
        assert same_bits(got, noise.fill(shape, seed, sample_id, draw, stream, kind))


def test_counter_layout():
    """Every field of the counter and the key lands in its word, over its whole width."""

    def first(seed, sample_id, draw, stream, element):
        return noise.words([seed], [sample_id], draw, stream, element + 4)[0, element]

    def direct(seed, sample_id, draw, stream, element):
        counter = [element // 4, draw, sample_id & 0xFFFFFFFF, (sample_id >> 32) ^ stream]
        return noise.philox4x32(
            np.array(counter, np.uint64).astype(np.uint32),
            np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint64).astype(np.uint32),
        )[element % 4, 0]

    cases = [
        (0, 0, 0, 0, 0),
        (-1, 2**56 - 1, 2**32 - 1, 0x7F000000, 3),
        (2**40 + 5, 2**32, 7, 0x02000000, 1021),
        (1, 2**32 - 1, 0, 0, 4),
    ]
    for case in cases:
        assert first(*case) == direct(*case), case
    assert len({int(first(*c)) for c in cases}) == len(cases)


def test_normals_against_float64():
    """At most 4 units in the last place from float64 arithmetic on the same words."""
    words = noise.words(np.arange(4), np.arange(4), 3, 0, 1_000_000).reshape(-1, 4).T
    z = noise.normals(words).astype(np.float64)
    radius = [np.sqrt(-2 * np.log(((w >> 8) + 1.0) * 2.0**-24)) for w in (words[0], words[2])]
    angle = [2 * np.pi * ((w & ~np.uint32(31)) / 2.0**32) for w in (words[1], words[3])]  # 27 bits of an angle count
    exact = np.stack([f(a) * r for r, a in zip(radius, angle, strict=True) for f in (np.cos, np.sin)])
    error = np.abs(z - exact) / np.spacing(np.maximum(np.abs(exact), 2.0**-60).astype(np.float32))
    assert error.max() <= 4
    n = z.size
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**moment).mean() - expected) < 4.9 * math.sqrt(variance / n), moment  # α = 1e-6


def test_extreme_words():
    words = np.array([[0], [0], [0xFFFFFFFF], [0x20000000]], np.uint32)
    z = noise.normals(words)
    assert np.isfinite(z).all() and z[0] == np.float32(math.sqrt(2 * 24 * math.log(2))) and z[2] == 0
    assert noise.uniforms(words).max() < 1 and noise.uniforms(words).min() == 0


@pytest.fixture(scope="module")
def expected_hash():
    values = noise.fill((1, 1, 1024, 1024), [5], [7], 3)
    return hashlib.sha256(values.tobytes()).hexdigest()


@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-O3"])
@pytest.mark.parametrize("isa_flags", [i for i in FLAGS if i in _C.isas()])
def test_every_build_gives_the_same_bits(level, isa_flags, expected_hash, tmp_path):
    source = tmp_path / "hash.cpp"
    source.write_text("""
        #define SGM_ISA generic
        #include <cstdio>
        #include "cpu/noise_block.h"
        int main() {
          static float z[4 * sgm::kBlock + 16];
          const sgm::Draw d = sgm::make_draw(5, 7, 3, 0);
          for (uint32_t quad = 0; quad < 1 << 18; quad += sgm::kBlock) {
            sgm::SGM_ISA::noise_flat(d, sgm::Kind::normal, quad, sgm::kBlock, z);
            fwrite(z, 4, 4 * sgm::kBlock, stdout);
          }
        }""")
    flags = ["-std=c++17", level, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *FLAGS[isa_flags]]
    program = tmp_path / "hash"
    subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    values = subprocess.run([str(program)], check=True, capture_output=True).stdout
    assert hashlib.sha256(values).hexdigest() == expected_hash


def test_isa_can_be_forced():
    ask = "from sgm_engine import _C; print(_C.isa())"
    run = lambda isa: subprocess.run(  # noqa: E731
        [sys.executable, "-c", ask], env=os.environ | {"SGM_ISA": isa},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run("generic").stdout.strip() == "generic"
    assert "SGM_ISA must be generic" in run("sse9").stderr


def _in_child(connection):
    try:
        fill((64, 16, 16, 16), [0] * 64, [0] * 64, 0)
        connection.send("no error")
    except RuntimeError as error:
        connection.send(str(error))


def test_fork_is_refused_at_once():
    threads = _C.num_threads()
    _C.set_num_threads(2)
    try:
        fill((64, 16, 16, 16), [0] * 64, [0] * 64, 0)  # starts the pool
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(there,))
        child.start()
        assert here.poll(5), "the child hangs"
        assert "spawn" in here.recv()
        child.join(5)
    finally:
        _C.set_num_threads(threads)
