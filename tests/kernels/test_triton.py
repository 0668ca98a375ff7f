"""Triton kernels: on CUDA tensors if there is a GPU, else under Triton's interpreter (interpreter.py)."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from sgm_engine.kernels import noise
from sgm_engine.kernels.triton import noise as triton_noise
from tests.interpreter import COMPILED, DEVICE, run_interpreted
from tests.kernels.triton_kernels import NCHW, NHWC, SAMPLE_ID, SEED, bits, on_device


def block(n):
    """Of n elements, those of one program: a GPU's compiler unrolls them, the interpreter likes them all at once."""
    return min(n, 1024) if COMPILED else n


@triton.jit
def philox_kernel(counter_ptr, key_ptr, word_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """counter [4, N], key [2, N] → words [4, N], all uint32 bits in int32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + i).to(tl.uint32)
    c1 = tl.load(counter_ptr + N + i).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * N + i).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * N + i).to(tl.uint32)
    k0 = tl.load(key_ptr + i).to(tl.uint32)
    k1 = tl.load(key_ptr + N + i).to(tl.uint32)
    w0, w1, w2, w3 = triton_noise.philox(c0, c1, c2, c3, k0, k1)
    tl.store(word_ptr + i, w0.to(tl.int32))
    tl.store(word_ptr + N + i, w1.to(tl.int32))
    tl.store(word_ptr + 2 * N + i, w2.to(tl.int32))
    tl.store(word_ptr + 3 * N + i, w3.to(tl.int32))


@triton.jit
def normals_kernel(word_ptr, normal_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """words [4, N] → normals [4, N]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w0 = tl.load(word_ptr + i).to(tl.uint32)
    w1 = tl.load(word_ptr + N + i).to(tl.uint32)
    w2 = tl.load(word_ptr + 2 * N + i).to(tl.uint32)
    w3 = tl.load(word_ptr + 3 * N + i).to(tl.uint32)
    z0, z1, z2, z3 = triton_noise.normals(w0, w1, w2, w3)
    tl.store(normal_ptr + i, z0)
    tl.store(normal_ptr + N + i, z1)
    tl.store(normal_ptr + 2 * N + i, z2)
    tl.store(normal_ptr + 3 * N + i, z3)


def philox(counter, key):
    """uint32 [4, N], [2, N] → uint32 [4, N], N a power of two."""
    counter, key = (torch.from_numpy(np.ascontiguousarray(a).view(np.int32)).to(DEVICE) for a in (counter, key))
    word = torch.empty_like(counter)
    n = counter.shape[1]
    philox_kernel[(n // block(n),)](counter, key, word, N=n, BLOCK=block(n), sanitize_overflow=False)
    return word.cpu().numpy().view(np.uint32)


KNOWN = [  # counter, key, words: kat_vectors of Random123
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    found = philox(*(np.array(a, np.uint32)[:, None].repeat(16, 1) for a in (counter, key)))
    assert (found == np.array(words, np.uint32)[:, None]).all()


def test_philox_of_a_million_random_counters_and_keys():
    random = np.random.default_rng(0)
    n = 2**20 if DEVICE == "cuda" else 2**18
    for _ in range(2**20 // n):
        counter, key = (random.integers(0, 2**32, (rows, n), np.uint32) for rows in (4, 2))
        assert (philox(counter, key) == noise.philox4x32(counter, key)).all()


def test_normals_bit_equal_over_a_million_words_and_the_corners():
    corners = [k + j for k in range(0, 2**32, 2**29) for j in (-256, -1, 0, 1, 256)]  # where quadrants and octants meet
    corners += [2**k + j for k in range(32) for j in (-1, 0)]  # every exponent of the logarithm's argument
    corners = np.array([k % 2**32 for k in corners], np.uint32)
    words = np.random.default_rng(1).integers(0, 2**32, (4, 2**18), np.uint32)
    radii, angles = (grid.ravel() for grid in np.meshgrid(corners, corners))
    words[:, : corners.size**2] = [radii, angles, angles, radii]
    device_words = torch.from_numpy(words.view(np.int32)).to(DEVICE)
    found = torch.full(words.shape, float("nan"), device=DEVICE)
    n = words.shape[1]
    normals_kernel[(n // block(n),)](device_words, found, N=n, BLOCK=block(n), **triton_noise.EXACT)
    assert torch.equal(bits(found), bits(noise.normals(words)))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 31, 33), (1, 28, 28), (3, 32, 32)], ids=str)
def test_noise_fill_is_the_definition(shape, layout, kind):
    seed, sample_id = on_device(SEED), on_device(SAMPLE_ID)
    for draw, stream in ((0, 0), (2**32 - 1, noise.STREAM["user"]), (7, noise.STREAM["inpaint"])):
        out = torch.full((len(SEED), *shape), float("nan"), device=DEVICE).to(memory_format=layout)
        triton_noise.noise_fill(out, seed, sample_id, draw, stream, kind)
        assert torch.equal(bits(out), bits(noise.fill(out.shape, SEED, SAMPLE_ID, draw, stream, kind)))


def test_noise_fill_of_a_large_sample():
    out = torch.full((2, 3, 256, 256), float("nan"), device=DEVICE)
    config = triton_noise.NoiseConfig() if COMPILED else triton_noise.NoiseConfig(quads=32768)
    triton_noise.describe(out, on_device(SEED[:2]), on_device(SAMPLE_ID[:2]), 3, 0, "normal", config)()
    assert torch.equal(bits(out), bits(noise.fill(out.shape, SEED[:2], SAMPLE_ID[:2], 3)))


def test_noise_fill_of_an_empty_batch():
    triton_noise.noise_fill(torch.empty(0, 3, 8, 8, device=DEVICE), on_device([]), on_device([]), 0, 0, "normal")


@triton.jit
def offset_kernel(out_ptr, slot_ptr, element_ptr, C: tl.constexpr, HW: tl.constexpr, NHWC: tl.constexpr):
    slot, element = tl.load(slot_ptr), tl.load(element_ptr)
    tl.store(out_ptr, slot * (C * HW) + triton_noise.locate(element, C, HW, NHWC))
    tl.store(out_ptr + 1, (slot * (C * HW) + element).to(tl.int32).to(tl.int64))  # the control: 32 bits are too few


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize(
    ("channels", "pixels", "slot"), [(3, 2**28, 3), (3, 2**30, 1), (5, 2**31 + 1, 2)], ids=["2^31", "2^32", "2^33"]
)
def test_offsets_do_not_wrap(channels, pixels, slot, nhwc):
    for element in (0, pixels - 1, pixels, channels * pixels - 2):
        c, p = divmod(element, pixels)
        expected = slot * channels * pixels + (p * channels + c if nhwc else element)
        found = on_device([-1, -1])
        offset_kernel[(1,)](found, on_device([slot]), on_device([element]), C=channels, HW=pixels, NHWC=nhwc)
        assert found[0] == expected
    assert found[1] != slot * channels * pixels + element


run_interpreted(globals())
