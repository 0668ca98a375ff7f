"""Triton kernels: on CUDA tensors if there is a GPU, else under Triton's interpreter (interpreter.py)."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from sgm_engine.kernels import cpu, noise, reference
from sgm_engine.kernels.arguments import Norm, Update
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import update as triton_update
from tests.interpreter import DEVICE, run_interpreted

NO_BAD_ROW = 2**63 - 1
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SEED = [0, -1, 2**63 - 1, 0x299F31D0A4093822, -(2**63)]
SAMPLE_ID = [0, 2**56 - 1, 2**32 - 1, 2**32, 12345678901]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def on_device(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def poisoned(x):
    return torch.full_like(x, float("nan"))


def bits(x):
    """float32 values as integers: NaN equals itself, and −0 is not +0."""
    return torch.as_tensor(x).cpu().contiguous().view(torch.int32)


# The generator -------------------------------------------------------------------------------------------------------


def block(n):
    """Of n elements, those of one program: a GPU's compiler unrolls them, the interpreter likes them all at once."""
    return min(n, 1024) if DEVICE == "cuda" else n


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
    config = triton_noise.NoiseConfig() if DEVICE == "cuda" else triton_noise.NoiseConfig(quads=32768)
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


# The update ----------------------------------------------------------------------------------------------------------

COEF = np.array(
    [[1, 0.02, 0.2, 0], [0.99, 0.5, 0, 0], [1.01, 0.1, 0.3, 0.7], [1, 0.25, 0, -0.4], [-1, -0.1, 1e-3, 0]], np.float32
)
DRAW = np.array([1, 2**32 - 1, 3, 4, 2**31], np.uint32)


def update_arguments(shape, dtype=torch.float32, layouts=(NCHW,) * 4, previous=True, seed=0):
    """Slots at rows 0 … 4 of COEF, the last one idle; the tensors of langevin_update by name."""
    random = torch.Generator().manual_seed(seed)
    x, score, before = (torch.randn(5, *shape, generator=random).to(DEVICE) for _ in range(3))
    return {
        "x": x.to(memory_format=layouts[0]),
        "score": (score * 30).to(dtype).to(memory_format=layouts[1]),
        "coef": on_device(COEF, torch.float32),
        "draw": torch.from_numpy(DRAW.view(np.int32)).to(DEVICE),
        "row": on_device([0, 1, 2, 3, 4]),
        "stop": on_device([5, 2, 3, 4, 4]),
        "seed": on_device(SEED),
        "sample_id": on_device(SAMPLE_ID),
        "bad_row": on_device([NO_BAD_ROW] * 5),
        "previous": before.to(memory_format=layouts[2]) if previous else None,
        "out": torch.full((5, *shape), float("nan"), device=DEVICE).to(memory_format=layouts[3]),
        "advance": True,
    }


def expected_update(x, score, previous, rows, **_):
    """The definition in NumPy: float32 [B, C, H, W], every operation rounded on its own."""
    x, score = x.cpu().numpy(), score.float().cpu().numpy()
    out = np.empty_like(x)
    for i, row in enumerate(rows):
        a, b, c, d = COEF[row]
        t = a * x[i]
        t = t + b * score[i]
        if c:
            t = t + c * noise.fill(x[i : i + 1].shape, SEED[i], SAMPLE_ID[i], int(DRAW[row]))[0]
        if d and previous is not None:
            t = t + d * previous[i].cpu().numpy()
        out[i] = t
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("layouts", ["CC", "CL", "LC", "LL"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 28, 28), (3, 16, 32)], ids=str)
def test_update_is_the_definition(shape, layouts, dtype):
    x_layout, score_layout = ({"C": NCHW, "L": NHWC}[letter] for letter in layouts)
    arguments = update_arguments(shape, dtype, (x_layout, score_layout, score_layout, x_layout))
    triton_update.langevin_update(Update(**arguments))
    expected = expected_update(**arguments, rows=range(5))
    assert torch.equal(bits(arguments["out"][:4]), bits(expected[:4]))
    assert arguments["out"][4].isnan().all()  # idle: not written
    assert arguments["row"].tolist() == [1, 2, 3, 4, 4]
    assert arguments["bad_row"].tolist() == [NO_BAD_ROW] * 5


@pytest.mark.parametrize("layouts", ["CCC", "LCL", "LLC"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 16, 16)], ids=str)
def test_history_and_gain_equal_cpp(shape, layouts):
    """tests/kernels/test_update.py holds the C++ to the definition."""
    x, score, previous = ({"C": NCHW, "L": NHWC}[letter] for letter in layouts)
    arguments = update_arguments(shape, torch.bfloat16, (x, score, previous, x))
    keep, gain = np.array([[1, 0.3], [0, 0], [0, 1], [-0.7, 2], [1, 1]]), np.array([0.5, 1, 2, 3, 4])
    arguments |= {"keep": on_device(keep, torch.float32), "gain": on_device(gain, torch.float32)}
    there = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    there = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in there.items()}
    before = there["previous"].clone()
    triton_update.langevin_update(Update(**arguments))
    cpu.langevin_update(Update(**there))
    for name in ("out", "previous"):
        assert torch.equal(bits(arguments[name][:4]), bits(there[name][:4])), name
    assert [torch.equal(a, b) for a, b in zip(there["previous"], before, strict=True)] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("plain", [True, False], ids=["", "history, gain"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 28, 28), (3, 32, 32)], ids=str)
def test_known_pixels_equal_cpp(shape, layout, plain):
    """Here and there, the first half, all, none; rows with and without noise of their own and of known pixels."""
    arguments = update_arguments(shape, torch.bfloat16, (layout, NHWC, NCHW, layout), previous=not plain)
    where = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
    where[1].view(-1)[:] = torch.arange(where[1].numel(), device=DEVICE) < where[1].numel() / 2
    where[2], where[3] = True, False
    known = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    known[4] = -0.0  # no noise there: not even the sign changes
    arguments["known"] = known.where(where, float("nan")).to(memory_format=layout)
    arguments["known_sigma"] = on_device([0.7, 0.1, 2, 1, 0], torch.float32)
    arguments["known_draw"] = torch.tensor([2, -1, 7, 0, 0], dtype=torch.int32, device=DEVICE)
    arguments["row"], arguments["stop"] = on_device([0, 3, 2, 0, 4]), on_device([5] * 5)
    arguments["score"][2], arguments["score"][3, 0, 0, 0] = float("nan"), float("inf")  # of a known slot, and not: bad
    if plain:
        arguments["coef"][:, 3] = 0
    else:
        keep, gain = np.array([[1, 0.3], [0, 0], [0, 1], [-0.7, 2], [1, 1]]), np.array([0.5, 1, 2, 3, 4])
        arguments |= {"keep": on_device(keep, torch.float32), "gain": on_device(gain, torch.float32)}
    there = {k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    triton_update.langevin_update(Update(**arguments))
    cpu.langevin_update(Update(**there))
    for name in ("out", "row", "bad_row") + (() if plain else ("previous",)):
        found, expected = arguments[name].cpu(), there[name]
        assert torch.equal(found.nan_to_num(-9), expected.nan_to_num(-9)), name
    assert there["bad_row"].tolist() == [NO_BAD_ROW] * 3 + [0, NO_BAD_ROW]
    assert torch.equal(bits(arguments["out"][4][where[4]]), bits(known[4][where[4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_update_equals_cpp(dtype):
    arguments = update_arguments((3, 16, 16), dtype, (NCHW, NHWC, NCHW, NHWC))
    there = {k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    triton_update.langevin_update(Update(**arguments))
    cpu.langevin_update(Update(**there))
    for name in ("out", "row", "bad_row"):
        found, expected = arguments[name].cpu(), there[name]
        assert torch.equal(found.nan_to_num(-9), expected.nan_to_num(-9)), name


def test_update_in_place_of_a_chain():
    arguments = update_arguments((3, 8, 8), previous=False)
    arguments |= {"out": arguments["x"], "row": on_device([0, 0, 1, 4, 5]), "stop": on_device([5] * 5)}
    expected = arguments["x"].clone()
    for step in range(5):
        rows = [min(first + step, 5) for first in (0, 0, 1, 4, 5)]
        live = [i for i in range(5) if rows[i] < 5]
        new = expected_update(expected, arguments["score"], None, [min(row, 4) for row in rows])
        expected[live] = new[live].to(DEVICE)
        triton_update.langevin_update(Update(**arguments))
        assert torch.equal(bits(arguments["x"]), bits(expected)), step
        assert arguments["row"].tolist() == [min(row + 1, 5) for row in rows]


def test_pure_update_changes_nothing_else():
    arguments = update_arguments((2, 5, 5)) | {"stop": None, "bad_row": None, "advance": False}
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v) and k != "out"}
    triton_update.langevin_update(Update(**arguments))
    assert torch.equal(bits(arguments["out"]), bits(expected_update(**arguments, rows=range(5))))
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


@pytest.mark.parametrize("quads", [16, 256])
def test_a_row_advances_once_however_many_programs_share_the_slot(quads):
    arguments = update_arguments((3, 12, 12), previous=False) | {"stop": on_device([5, 5, 5, 0, 4])}
    launch = triton_update.describe(Update(**arguments), config=triton_noise.NoiseConfig(quads=quads))
    assert launch.programs == 5 * triton.cdiv(3 * 12 * 12, 4 * quads)
    for step in range(1, 3):
        launch()
        assert arguments["row"].tolist() == [step, 1 + step, 2 + step, 3, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_the_first_bad_row_is_kept(value, layout):
    arguments = update_arguments((3, 9, 9), layouts=(layout,) * 4) | {"coef": on_device(COEF * 2, torch.float32)}
    arguments["bad_row"][3] = 1  # was bad at row 1 already
    arguments["bad_row"][2] = 4  # cannot happen in order, but the minimum is what is promised
    for slot in (2, 3, 4):
        arguments["x"][slot, 2, 8, 8] = value
    triton_update.langevin_update(Update(**arguments))
    assert arguments["bad_row"].tolist() == [NO_BAD_ROW, NO_BAD_ROW, 2, 1, NO_BAD_ROW]  # slot 4 is idle


def test_update_of_an_empty_batch():
    arguments = update_arguments((3, 4, 4))
    batched = ("x", "score", "previous", "out", "row", "stop", "seed", "sample_id", "bad_row")
    triton_update.langevin_update(Update(**(arguments | {name: arguments[name][:0] for name in batched})))


@needs_gpu
def test_a_captured_update_replays_the_chain():
    arguments = update_arguments((3, 64, 64), torch.bfloat16, previous=False)
    arguments |= {"out": arguments["x"], "row": on_device([0] * 5), "stop": on_device([5] * 5)}
    eager = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    eager["out"] = eager["x"]
    triton_update.langevin_update(
        Update(**(arguments | {"out": poisoned(arguments["x"]), "advance": False}))
    )  # compiles
    triton_update.langevin_update(Update(**(arguments | {"stop": on_device([0] * 5)})))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_update.langevin_update(Update(**arguments))
    for _ in range(5):
        graph.replay()
        triton_update.langevin_update(Update(**eager))
    assert torch.equal(bits(arguments["x"]), bits(eager["x"]))
    assert arguments["row"].tolist() == eager["row"].tolist() == [5] * 5


# The norm ------------------------------------------------------------------------------------------------------------

# The interpreter truncates where a GPU rounds float32 to bfloat16; there, bfloat16 is only read.
NORM_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def norm_inputs(shape, dtype, layout, offset=1.0, seed=0):
    """x, residual; γ, α, β as views [L, C] of one embedding [L, 3C]; level."""
    random = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=random) * 2 + offset for _ in range(2))
    gamma, alpha, beta = torch.randn(10, 3 * shape[1], generator=random).to(DEVICE).chunk(3, 1)
    level = torch.randint(0, 10, shape[:1], generator=random).to(DEVICE)
    x, residual = (t.to(DEVICE, dtype).to(memory_format=layout) for t in (x, residual))
    return x, residual, gamma, alpha, beta, level


def run_norm(
    x, gamma=None, alpha=None, beta=None, level=None, activation="none", residual=None, eps=1e-5, out=None, groups=None,
    before="none", pool=False,
):  # fmt: skip
    out = poisoned(x) if out is None else out
    total = None if residual is None and before == "none" else poisoned(x)
    workspace = torch.full((triton_norm.norm_workspace_size(x),), float("nan"), device=DEVICE)
    tensors = (x, gamma, alpha, beta, level, activation, residual, eps, out, total, workspace)
    triton_norm.norm(Norm(*tensors, groups, before, pool))
    return out if total is None else (out, total)


# What is allowed beside the formula's error. A GPU's division, exponential and 1/√ are off by up to two ulps each
# (PTX ISA: div.full, ex2.approx, rsqrt.approx), where the interpreter's are rounded.
ULPS = 4 if DEVICE == "cuda" else 2


def assert_as_accurate(found, x, *arguments, **options):
    """Error against float64 ≤ 2 × that of the float32 formula, rounded to the same dtype, + ULPS (float32) of max."""
    expected = reference.noise_conditioned_norm(x.double(), *arguments, **options)
    formula = reference.noise_conditioned_norm(x.float(), *arguments, **options).to(found.dtype)
    error, allowed = ((t.double() - expected).abs().max().item() for t in (found, formula))
    atol = ULPS * torch.finfo(torch.float32).eps * expected.abs().max().item()
    assert error <= 2 * allowed + atol, f"error {error:.3g}, of the formula {allowed:.3g}"


NORM_SHAPES = [(1, 128, 32, 32), (1, 256, 16, 16), (1, 64, 28, 28), (3, 32, 14, 14), (2, 5, 7, 3), (1, 2, 1, 1)]
NORM_SHAPES += [(1, 3, 160, 160), (1, 1024, 12, 12)]  # several tiles a slab; the most partials


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm(shape, layout, dtype):
    x, _, *parameters = norm_inputs(shape, dtype, layout)
    assert_as_accurate(run_norm(x, *parameters, "elu"), x, *parameters, "elu")


@pytest.mark.parametrize("shape", [(1, 384, 11, 67), (1, 131, 34, 66)], ids=str)
def test_a_last_slab_of_fewer_tiles(shape):
    """Its last tile begins where it ends, and after it."""
    x, _, *parameters = norm_inputs(shape, torch.float32, NHWC)
    tiling = triton_norm.Tiling.of(shape[1], shape[2] * shape[3], True)
    tiles = triton.cdiv(tiling.slab, tiling.pixels)
    assert shape[2] * shape[3] - (tiling.slabs - 1) * tiling.slab <= (tiles - 1) * tiling.pixels
    assert_as_accurate(run_norm(x, *parameters, "elu"), x, *parameters, "elu")


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", NORM_SHAPES[2:5], ids=str)
def test_norm_of_a_sum(shape, layout, dtype):
    x, residual, *parameters = norm_inputs(shape, dtype, layout)
    found, total = run_norm(x, *parameters, "elu", residual)
    assert torch.equal(total, x + residual)
    assert total.stride() == found.stride() == x.stride()
    assert_as_accurate(found, total, *parameters, "elu")


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "shape, groups",
    [((2, 128, 16, 16), 32), ((2, 12, 7, 5), 1), ((2, 12, 7, 5), 4), ((2, 12, 7, 5), 12), ((1, 6, 96, 96), 2)],
    ids=str,
)
def test_norm_of_groups(shape, groups, layout):
    """Groups of 4, 12, 3, 1 channels, and of 3 in several slabs."""
    for dtype in NORM_DTYPES:
        x, residual, gamma, _, beta, level = norm_inputs(shape, dtype, layout)
        x += torch.arange(shape[1], device=DEVICE, dtype=dtype)[:, None, None] % 5  # the channels' means differ
        arguments = (gamma, None, beta, level, "silu")
        assert_as_accurate(run_norm(x, *arguments, groups=groups), x, *arguments, groups=groups)
        found, total = run_norm(x, *arguments, residual, groups=groups)
        assert torch.equal(total, x + residual)
        assert_as_accurate(found, total, *arguments, groups=groups)
        assert_as_accurate(run_norm(x, groups=groups, eps=1e-2), x, groups=groups, eps=1e-2)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("before, summed", [("none", False), ("none", True), ("elu", False), ("silu", True)])
def test_chained_pooling(before, summed, groups, layout):
    """before(x + residual) → (5×5 mean of its norm, itself): edges, several tiles, a tile that ends in a row."""
    for shape, dtype in (
        ((2, 12, 7, 5), NORM_DTYPES[-1]),
        ((1, 64, 12, 14), NORM_DTYPES[0]),
        ((1, 4, 3, 2), NORM_DTYPES[1]),
    ):
        x, residual, gamma, alpha, beta, level = norm_inputs(shape, dtype, layout)
        arguments = (gamma, alpha if groups is None else None, beta, level)
        residual = residual if summed else None
        found = run_norm(x, *arguments, residual=residual, groups=groups, before=before, pool=True)
        s = x if residual is None else x + residual
        if before != "none" or summed:
            found, total = found
            exact = reference.ACTIVATIONS[before](s.double())
            spacing = torch.finfo(dtype).eps + (ULPS - 2) * torch.finfo(torch.float32).eps
            assert (total.double() - exact).abs().max() <= spacing * exact.abs().max()
            s = total
        assert_as_accurate(found, s, *arguments, groups=groups, pool=True)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_activation_before_a_norm(layout):
    x, residual, *arguments = norm_inputs((2, 32, 9, 9), torch.float32, layout)
    for extra in (None, residual):
        found, total = run_norm(x, *arguments, "elu", residual=extra, before="elu")
        torch.testing.assert_close(total, reference.ACTIVATIONS["elu"](x if extra is None else x + extra))
        assert_as_accurate(found, total, *arguments, "elu")


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_a_large_mean_in_a_pool(layout):
    x, _, gamma, _, beta, level = norm_inputs((1, 64, 28, 28), torch.float32, layout, 1e3)
    assert_as_accurate(run_norm(x, gamma, None, beta, level, pool=True), x, gamma, None, beta, level, pool=True)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_large_means_in_groups(layout):
    x, _, gamma, _, beta, level = norm_inputs((2, 64, 28, 28), torch.float32, layout, 1e3)
    assert_as_accurate(run_norm(x, gamma, None, beta, level, groups=8), x, gamma, None, beta, level, groups=8)


@pytest.mark.parametrize("activation", ["none", "elu", "relu", "silu"])
@pytest.mark.parametrize("terms", ["", "g", "b", "a", "gb", "ab", "gab"])
def test_norm_options(terms, activation):
    x, _, *parameters, level = norm_inputs((3, 12, 6, 6), torch.float32, NHWC)
    parameters = [p if name in terms else None for name, p in zip("gab", parameters, strict=True)]
    rows = [None if p is None else p[4].contiguous() for p in parameters]  # [C]: one row for all levels
    for arguments in ((*parameters, level if terms else None), (*rows, None)):
        assert_as_accurate(run_norm(x, *arguments, activation), x, *arguments, activation)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_norm_of_bfloat16_reads_it_right(layout):
    x, _, *arguments = norm_inputs((2, 16, 8, 8), torch.bfloat16, layout)
    assert_as_accurate(run_norm(x, *arguments, out=poisoned(x.float())), x, *arguments)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("offset", [1e3, -1e5])
def test_a_large_mean_costs_no_more_than_in_the_formula(offset, layout):
    x, _, gamma, _, beta, level = norm_inputs((2, 64, 28, 28), torch.float32, layout, offset)
    assert_as_accurate(run_norm(x, gamma, None, beta, level), x, gamma, None, beta, level)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_constant_channels_give_beta(layout):
    x, _, gamma, _, beta, level = norm_inputs((2, 8, 9, 9), torch.float32, layout)
    x[:] = 3.7
    found = run_norm(x, gamma, None, beta, level)
    assert torch.equal(found, beta[level][:, :, None, None].expand_as(x))


def test_norm_in_place_and_of_each_sample_alone():
    x, residual, *arguments = norm_inputs((4, 64, 12, 12), torch.float32, NHWC)
    together, _ = run_norm(x, *arguments, "silu", residual)
    for i in range(4):
        *rows, level = arguments
        alone, _ = run_norm(x[i : i + 1], *rows, level[i : i + 1], "silu", residual[i : i + 1])
        assert torch.equal(bits(alone[0]), bits(together[i]))
    expected = run_norm(x, *arguments, "elu")
    assert torch.equal(bits(run_norm(x, *arguments, "elu", out=x)), bits(expected))


def test_norm_propagates_nan_in_its_sample_only():
    x, _, *arguments = norm_inputs((2, 8, 8, 8), torch.float32, NHWC)
    x[1, 3, 2, 2] = float("nan")
    for activation in ("elu", "relu", "silu"):
        found = run_norm(x, *arguments, activation)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()  # one mean is NaN, and ms spreads it over the channels


def test_norm_of_an_empty_batch():
    run_norm(torch.empty(0, 8, 4, 4, device=DEVICE))


@needs_gpu
def test_250_norms_are_equal():
    x, residual, *arguments = norm_inputs((16, 128, 32, 32), torch.bfloat16, NHWC)
    first, _ = run_norm(x, *arguments, "elu", residual)
    for _ in range(250):
        assert torch.equal(run_norm(x, *arguments, "elu", residual)[0], first)


run_interpreted(globals())
