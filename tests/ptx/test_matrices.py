"""Pieces of matrices and their products, where each value is said by hand or by NumPy."""

import numpy as np
import pytest

from tests.ptx import floats
from tests.ptx.copies import swizzled
from tests.ptx.program import Fault
from tests.ptx.snippets import f32, machine, result

U16, U32, F32 = np.uint16, np.uint32, np.float32
FILL = """
    mov.u32 %r1, %tid.x; shl.b32 %r3, %r1, 4; shl.b32 %r10, %r1, 3;
    mad.lo.s32 %r11, %r10, 65537, 65536; add.s32 %r12, %r11, 131074;
    add.s32 %r13, %r12, 131074; add.s32 %r14, %r13, 131074;
    st.shared.v4.b32 [%r3], {%r11, %r12, %r13, %r14};
    bar.sync 0;
"""  # 16-bit numbers 0, 1, 2 …: four 8×8 pieces, of which thread t writes a row


def test_pieces_from_shared_memory():
    """Thread t holds [t//4, 2·(t % 4)] and its neighbour of each piece."""
    text = FILL + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r3];"
    m = machine(text + "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r3];", shared=512)
    t = np.arange(32)
    for piece in range(4):
        first = 64 * piece + 8 * (t // 4) + 2 * (t % 4)
        assert (result(m, f"r{20 + piece}", U32) == first + (first + 1) * 65536).all()
    for piece in range(2):
        first = 64 * piece + 8 * (2 * (t % 4)) + t // 4  # rows and columns changed over
        assert (result(m, f"r{24 + piece}", U32) == first + (first + 8) * 65536).all()


@pytest.mark.parametrize("how", ["", ".trans"])
def test_pieces_to_shared_memory_and_back(how):
    store, load = (f"{what}matrix.sync.aligned.m8n8.x4{how}.shared.b16" for what in ("st", "ld"))
    text = f"{store} [%r3], {{%r20, %r21, %r22, %r23}}; bar.sync 0; {load} {{%r24, %r25, %r26, %r27}}, [%r3];"
    given = {f"r{20 + k}": np.random.default_rng(k).integers(0, 2**32, 32) for k in range(4)}
    m = machine("mov.u32 %r1, %tid.x; shl.b32 %r3, %r1, 4;" + text, shared=512, **given)
    assert all((result(m, f"r{24 + k}", U32) == given[f"r{20 + k}"]).all() for k in range(4))
    if not how:  # thread 0 gave the first two numbers of the first row
        assert m.shared.bytes[:4].view(U32)[0] == given["r20"][0]


@pytest.mark.parametrize("text, what", [
    ("add.s32 %r3, %r3, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r3];", "not a multiple of 16"),
    ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r3+16];", "out of bounds"),
    ("setp.lt.s32 %p1, %r1, 8; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r3];", "only part of the 32"),
])  # fmt: skip
def test_planted_faults_of_pieces(text, what):
    with pytest.raises(Fault, match=what):
        machine(FILL + text, shared=512)


def test_pieces_without_the_barrier():
    with pytest.raises(Fault, match=r"race, .*read after write"):
        machine(FILL.replace("bar.sync 0;", "") + "xor.b32 %r4, %r3, 16;"
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r4];", shared=512)  # fmt: skip


@pytest.mark.parametrize("kind, encode", [("bf16", floats.to_bf16), ("f16", floats.to_f16)])
def test_product_of_a_warp(kind, encode):
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, shape).astype(F32) / 4 for shape in ((16, 16), (16, 8), (16, 8)))
    t = np.arange(32)
    g, q = t // 4, 2 * (t % 4)
    word = lambda low, high: encode(low).astype(U32) | encode(high).astype(U32) << U32(16)  # noqa: E731
    given = {f"r{20 + k}": word(*(a[g + 8 * (k % 2), q + 8 * (k // 2) + d] for d in (0, 1))) for k in range(4)}
    given |= {f"r{24 + k}": word(*(b[q + 8 * k + d, g] for d in (0, 1))) for k in range(2)}
    given |= {f"r{30 + k}": c[g + 8 * (k // 2), q + k % 2] for k in range(4)}
    opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    registers = "{%r30, %r31, %r32, %r33}"
    m = machine(f"{opcode} {registers}, {{%r20, %r21, %r22, %r23}}, {{%r24, %r25}}, {registers};", **given)
    exact = a.astype(np.float64) @ b + c
    for k in range(4):
        assert (result(m, f"r{30 + k}", F32) == exact[g + 8 * (k // 2), q + k % 2]).all()


# Products of a warpgroup ----------------------------------------------------------------------------------------------

K_BYTES, N = 32, 64


def put(memory, at, matrix, mode):
    """A matrix [rows, bytes] as a descriptor says: eight rows after the other, of a swizzle's width."""
    width = {1: 128, 2: 64, 3: 32}[mode]
    row, byte = np.indices(matrix.shape)
    memory[swizzled(at + row // 8 * 8 * width + row % 8 * width + byte, {1: 3, 2: 2, 3: 1}[mode])] = matrix


def descriptor(at, mode):
    stride = 8 * {1: 128, 2: 64, 3: 32}[mode]
    return at >> 4 | stride >> 4 << 32 | mode << 62


LOAD = """
    mov.u32 %r1, %tid.x; ld.param.b64 %d1, [p0]; mov.b32 %r2, 0;
    fill: mad.lo.s32 %r3, %r2, 128, %r1; shl.b32 %r3, %r3, 2; cvt.u64.u32 %d2, %r3; add.s64 %d2, %d1, %d2;
    ld.global.b32 %r4, [%d2]; st.shared.b32 [%r3], %r4; add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, 32; @%p1 bra fill;
    bar.sync 0;
"""
REGISTERS = "{" + ", ".join(f"%r{100 + k}" for k in range(N // 2)) + "}"
FENCE, COMMIT, WAIT = (
    "wgmma.fence.sync.aligned;",
    "wgmma.commit_group.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
)


def product(kind, add):
    more = "" if kind == "e4m3" else ", 0, 0"
    k = 32 if kind == "e4m3" else 16
    return f"wgmma.mma_async.sync.aligned.m64n{N}k{k}.f32.{kind}.{kind} {REGISTERS}, %d10, %d11, {add}, 1, 1{more};"


def warpgroup(text, kind="bf16", mode=1, start=LOAD):
    """(machine, exact product) with A [64, K] at 0 and B [N, K] at 8192 of shared memory."""
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, (rows, 32 if kind == "e4m3" else 16)).astype(F32) / 4 for rows in (64, N))
    encode = {"bf16": floats.to_bf16, "e4m3": floats.to_e4m3}[kind]
    memory = np.zeros(4096, U32)
    for at, matrix in ((0, a), (8192, b)):
        put(memory.view(np.uint8), at, encode(matrix).view(np.uint8).reshape(len(matrix), K_BYTES), mode)
    m = machine(start + text, threads=128, shared=16384, memory=[(memory.ctypes.data, memory.nbytes)],
                pointer=memory.ctypes.data, d10=np.array([descriptor(0, mode)], np.uint64),
                d11=np.array([descriptor(8192, mode)], np.uint64), r200=[64])  # fmt: skip
    return m, a.astype(np.float64) @ b.T


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_product_of_a_warpgroup(kind, mode):
    m, exact = warpgroup(FENCE + product(kind, 0) + product(kind, 1) + COMMIT + WAIT, kind, mode)
    t = np.arange(128)
    for k in range(N // 2):
        row, column = 16 * (t // 32) + t % 32 // 4 + 8 * (k // 2 % 2), 8 * (k // 4) + 2 * (t % 4) + k % 2
        assert (result(m, f"r{100 + k}", F32) == 2 * exact[row, column]).all()


@pytest.mark.parametrize("text, what", [
    (product("bf16", 0) + COMMIT + "bar.sync 0; st.shared.b32 [%r3], 0;",
     "overwrites what a matrix product still reads"),
    (product("bf16", 0) + COMMIT + WAIT + "shl.b32 %r3, %r1, 2; xor.b32 %r3, %r3, 128; st.shared.b32 [%r3], 0;",
     "race, .*write after read"),
    ("mov.b64 %d10, 0;" + product("bf16", 0), "a matrix without a swizzle"),
    ("add.s64 %d11, %d11, 1024;" + product("bf16", 0), "out of bounds"),
    ("cvt.u64.u32 %d12, %r1; add.s64 %d10, %d10, %d12;" + product("bf16", 0), "do not agree on a descriptor"),
    (product("bf16", 0).replace("1, 1, 0, 0", "-1, 1, 0, 0"), "signs, transposes or registers"),
    ("setp.lt.s32 %p2, %r1, 96; @%p2 " + product("bf16", 0), "only part of the 128"),
])  # fmt: skip
def test_planted_faults_of_a_warpgroup(text, what):
    with pytest.raises(Fault, match=what):
        warpgroup(text)


def test_a_product_without_the_barrier_before_it():
    with pytest.raises(Fault, match=r"race, .*read after write"):
        warpgroup(product("bf16", 0), start=LOAD.replace("bar.sync 0;", ""))


def test_formats_of_8_bits():
    """Every value there and back; between two, to nearest even."""
    values = floats.E4M3[:127]
    assert (floats.to_e4m3(values) == np.arange(127)).all() and (
        floats.to_e4m3(-values[1:]) == np.arange(129, 255)
    ).all()
    assert floats.to_e4m3(f32(449, 1e30, -np.inf)).tolist() == [126, 126, 254]
    middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(F32)
    assert (floats.to_e4m3(middle) == (np.arange(126) + 1) // 2 * 2).all()
