"""Asynchronous copies: they bring what they should, zeros beyond a tensor's edge, and who does not wait is found."""

import numpy as np
import pytest

from tests.ptx.copies import swizzled
from tests.ptx.machine import TensorMap
from tests.ptx.program import Fault
from tests.ptx.snippets import machine, result

U32 = np.uint32
# %d2: the thread's 16 bytes of the array; %r3: its place in shared memory; %r4: that of the next thread
COPY = """
    mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 16; ld.param.b64 %d1, [p0]; add.s64 %d2, %d1, %d2;
    shl.b32 %r3, %r1, 4; add.s32 %r4, %r3, 16; and.b32 %r4, %r4, 511; mov.b32 %r6, 16;
"""
ISSUE, CLOSE, WAIT = (
    "cp.async.cg.shared.global [%r3+0], [%d2+0], 0x10, %r6;",
    "cp.async.commit_group;",
    "cp.async.wait_group 0;",
)
OWN, NEXT, BARRIER = "ld.shared.b32 %r9, [%r3];", "ld.shared.b32 %r9, [%r4];", "bar.sync 0;"


def aligned(*shape, dtype=U32):
    """Of 128 bytes: some NumPy arrays are not."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128, np.uint8)
    first = -raw.ctypes.data % 128
    return raw[first : first + size].view(dtype).reshape(shape)


def copied(*text, **how):
    x = aligned(128)
    x[:] = np.arange(128)
    m = machine(COPY + "".join(text), memory=[(x.ctypes.data, x.nbytes)], pointer=x.ctypes.data, shared=512, **how)
    return result(m, "r9", U32)


def test_a_copy_that_is_waited_for():
    assert (copied(ISSUE, CLOSE, WAIT, OWN) == 4 * np.arange(32)).all()
    assert (copied(ISSUE, CLOSE, WAIT, BARRIER, NEXT) == 4 * (np.arange(32) + 1) % 128).all()
    found = copied("setp.lt.s32 %p1, %r1, 4; selp.b32 %r6, 16, 0, %p1;", ISSUE, CLOSE, WAIT, OWN)
    assert found.tolist() == [0, 4, 8, 12, *[0] * 28]  # of the others nothing is read: they get zeros


def test_groups_are_waited_for_in_their_order():
    second = ISSUE.replace("%r3+0", "%r3+512")
    text = COPY + ISSUE + CLOSE + second + CLOSE + "cp.async.wait_group {};" + "ld.shared.b32 %r9, [%r3+{}];"
    x = aligned(128)
    how = {"memory": [(x.ctypes.data, x.nbytes)], "pointer": x.ctypes.data, "shared": 1024}
    machine(text.format(1, 0), **how)
    machine(text.format(0, 512), **how)
    with pytest.raises(Fault, match="has not brought yet"):
        machine(text.format(1, 512), **how)


@pytest.mark.parametrize("text, what", [
    ((ISSUE, CLOSE, OWN), "reads what an asynchronous copy has not brought yet"),
    ((ISSUE, WAIT, OWN), "reads what an asynchronous copy has not brought yet"),  # of no group
    ((ISSUE, CLOSE, WAIT, NEXT), "race, .*read after write"),
    ((ISSUE, CLOSE, BARRIER, "st.shared.b32 [%r4], 1;"), "overwrites what an asynchronous copy is writing"),
    (("st.shared.b32 [%r3], 1;", BARRIER, NEXT, ISSUE), "race, .*write after read"),
    (("mov.b32 %r6, 8;", ISSUE), "partly zeros"),
    ((ISSUE.replace("%d2+0", "%d2+16"),), "out of bounds"),
    ((ISSUE.replace("%r3+0", "%r3+4"),), "not a multiple of 16"),
])  # fmt: skip
def test_planted_faults_of_copies(text, what):
    with pytest.raises(Fault, match=what):
        copied(*text)


# Boxes of a tensor ----------------------------------------------------------------------------------------------------

INIT = """
    mov.u32 %r1, %tid.x; setp.eq.s32 %p1, %r1, 0; mov.b64 %d1, p1; cvta.param.u64 %d2, %d1; shl.b32 %r3, %r1, 2;
    @%p1 mbarrier.init.shared::cta.b64 [2048], 1; fence.proxy.async.shared::cta; bar.sync 0;
"""
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [2048], 512;"
BOX = """
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r8], [%d2, {%r6, %r7}], [2048];
"""
LOOK = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [2048], %r5; @!done bra.uni again; }"
GET = "ld.shared.b32 %r9, [%r3];"


def box(*text, swizzle=0, x=0, y=0, to=0, shape=(6, 40), start=INIT):
    """Of a tensor [6, 40] of its own indices a box [4, 32] with its corner at (y, x)."""
    tensor = aligned(*shape)
    tensor[:] = np.arange(tensor.size).reshape(shape)
    maps = {64: TensorMap(tensor.ctypes.data, shape, (4, 32), swizzle, 4)}
    return machine(start + "".join(text), threads=128, shared=2064, maps=maps, r6=[x], r7=[y], r8=[to],
                   memory=[(tensor.ctypes.data, tensor.nbytes)])  # fmt: skip


@pytest.mark.parametrize("y, x", [(0, 0), (1, 8), (3, 20), (-2, -5), (7, 0)])
def test_a_box_with_zeros_beyond_the_edge(y, x):
    found = result(box(EXPECT, BOX, LOOK, GET, y=y, x=x), "r9", U32).reshape(4, 32)
    rows, columns = y + np.arange(4)[:, None], x + np.arange(32)
    inside = (rows >= 0) & (rows < 6) & (columns >= 0) & (columns < 40)
    assert (found == np.where(inside, rows * 40 + columns, 0)).all()


def test_swizzles():
    """Of 128 bytes: row r of eight keeps its 16-byte pieces in the order k ^ r."""
    m = box(EXPECT, BOX, LOOK, GET, swizzle=3)
    pieces = result(m, "r9", U32).reshape(4, 8, 4)[:, :, 0] % 40 // 4
    assert (pieces == np.arange(8) ^ np.arange(4)[:, None]).all()
    assert swizzled(np.array([0, 128, 256, 512]), 2).tolist() == [0, 144, 288, 512]
    assert swizzled(np.array([0, 128, 256, 384]), 1).tolist() == [0, 144, 256, 400]


def test_a_second_round_through_the_same_barrier():
    again = "bar.sync 0; mov.b32 %r5, 1; mov.b32 %r7, 1;"
    found = result(box(EXPECT, BOX, LOOK, GET, again, EXPECT, BOX, LOOK, GET), "r9", U32).reshape(4, 32)
    assert (found == (np.arange(4)[:, None] + 1) * 40 + np.arange(32)).all()


@pytest.mark.parametrize("text, what, how", [
    ((EXPECT, BOX, GET), "has not brought yet", {}),
    ((EXPECT, BOX, "setp.lt.s32 %p2, %r1, 32; @!%p2 bra on;", LOOK, "on:", GET),  # one warp waits and another does not
     "mbarrier the thread has not waited for", {}),
    ((EXPECT, BOX, LOOK, GET, EXPECT, BOX), "race, .*write after read", {}),
    (("st.shared.b32 [%r3], 0;", EXPECT, BOX), "race, .*write after write", {}),
    ((EXPECT, LOOK), "threads wait for ever at .*try_wait", {}),
    ((BOX, LOOK), "threads wait for ever at .*try_wait", {}),
    ((EXPECT.replace("512", "256"), BOX, LOOK), "threads wait for ever at .*try_wait", {}),
    ((EXPECT, EXPECT), "more arrivals than", {}),
    ((EXPECT, BOX), "not a multiple of 128", {"to": 64}),
    ((EXPECT, BOX), "not a multiple of 1024", {"to": 512, "swizzle": 3}),
    ((EXPECT, BOX), "a row of 128 bytes for a swizzle of 64", {"swizzle": 2}),
    ((EXPECT, BOX), "out of bounds", {"to": 1920}),
    ((EXPECT.replace("2048", "1024"),), "read before it is written", {}),
    ((EXPECT, BOX, "@%p1 mbarrier.inval.shared::cta.b64 [2048];"), "a copy has not come yet", {}),
])  # fmt: skip
def test_planted_faults_of_boxes(text, what, how):
    with pytest.raises(Fault, match=what):
        box(*text, **how)


def test_an_mbarrier_that_others_may_not_see_yet():
    with pytest.raises(Fault, match=r"race, .*read after write"):
        box(LOOK, start=INIT.replace("bar.sync 0;", ""))
