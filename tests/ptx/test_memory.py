"""Loads, stores, barriers and exchange between threads: what is right runs, and each planted fault is found."""

import numpy as np
import pytest

from tests.ptx.program import Fault, parse
from tests.ptx.snippets import HEAD, machine, result

U32, U64 = np.uint32, np.uint64
# %r3: 4·thread; %r4: 4·(thread ^ 32), of the other warp; %r5: 4·(thread ^ 1), of the same
PLACES = """
    mov.u32 %r1, %tid.x;  shl.b32 %r3, %r1, 2;
    xor.b32 %r4, %r3, 128; xor.b32 %r5, %r3, 4;
"""
WRITE, READ_OTHER, READ_NEXT = "st.shared.b32 [%r3], %r1;", "ld.shared.b32 %r9, [%r4];", "ld.shared.b32 %r9, [%r5];"


def shared(*text, threads=64, size=256, **how):
    return machine(PLACES + "".join(text), threads=threads, shared=size, **how)


def test_shared_memory_behind_a_barrier():
    m = shared(WRITE, "bar.sync 0;", READ_OTHER)
    assert (result(m, "r9", U32) == np.arange(64) ^ 32).all()


def test_several_blocks_have_memories_of_their_own():
    m = shared("mov.u32 %r2, %ctaid.x; mad.lo.s32 %r1, %r2, 100, %r1;", WRITE, "bar.sync 0;", READ_OTHER, blocks=3)
    assert (result(m, "r9", U32).reshape(3, 64) == (np.arange(64) ^ 32) + 100 * np.arange(3)[:, None]).all()


@pytest.mark.parametrize("text, what", [
    ((WRITE, READ_OTHER), "race, .*read after write"),
    ((WRITE, READ_NEXT), "race, .*read after write"),
    ((WRITE, "bar.warp.sync -1;", READ_OTHER), "race, .*read after write"),
    ((WRITE, "bar.sync 0;", READ_OTHER, "st.shared.b32 [%r3], 7;"), "race, .*write after read"),
    ((WRITE, "st.shared.b32 [%r4], %r1;"), "race, .*write after write"),
    (("st.shared.b32 [0], %r1;",), "race: threads of one instruction write different values"),
    ((READ_OTHER,), "read before it is written"),
    ((WRITE, "bar.sync 0;", "ld.shared.b32 %r9, [%r4+128];"), "shared access at 380 out of bounds: the block has 256"),
    (("st.shared.b32 [%r3+-8], %r1;",), "out of bounds"),
    (("st.shared.b32 [%r3+2], %r1;",), "not a multiple of 4"),
    (("st.shared.v2.b32 [%r3], {%r1, %r1};",), "not a multiple of 8"),
])  # fmt: skip
def test_planted_faults_in_shared_memory(text, what):
    with pytest.raises(Fault, match=what):
        shared(*text)


def test_what_is_no_race():
    shared(WRITE, "bar.warp.sync -1;", READ_NEXT)
    shared("st.shared.b32 [0], 5;", "st.shared.b32 [0], 5;")  # the same value
    shared(WRITE, "ld.shared.b32 %r9, [%r3];", "st.shared.b32 [%r3], 9;")  # one's own
    shared("cvt.u16.u32 %h1, %r1; shr.u32 %r6, %r3, 1; st.shared.b16 [%r6], %h1;")  # two to a word, by two threads
    m = shared("st.shared.b32 [%r3], 3;", "bar.sync 0;", "ld.shared.b32 %r9, [0];", "bar.sync 0;", WRITE)
    assert (result(m, "r9", U32) == 3).all()


def test_a_barrier_left_out_of_a_loop_is_found():
    loop = "mov.b32 %r7, 0; again: {} ld.shared.b32 %r9, [%r4]; bar.sync 0; add.s32 %r7, %r7, 1;" + (
        "setp.lt.s32 %p1, %r7, 3; @%p1 bra again;"
    )
    shared(loop.format(WRITE + "bar.sync 0;"))
    with pytest.raises(Fault, match="race"):
        shared(loop.format(WRITE))


# Global memory --------------------------------------------------------------------------------------------------------


def on_global(text, array, **how):
    """%d1: the address of the array, %d2: of the thread's 4 bytes."""
    start = "ld.param.b64 %d1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d1, %d2;"
    return machine(start + text, memory=[(array.ctypes.data, array.nbytes)], pointer=array.ctypes.data, **how)


def test_global_loads_and_stores():
    x = np.arange(32, dtype=U32)
    m = on_global("ld.global.b32 %r2, [%d2]; add.s32 %r2, %r2, 5; st.global.b32 [%d2], %r2;", x)
    assert (x == np.arange(32) + 5).all() and (result(m, "r2", U32) == x).all()
    m = on_global("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d1+16];", x)
    assert [int(result(m, f"r{k}", U32)[0]) for k in (2, 3, 4, 5)] == [9, 10, 11, 12]
    on_global("setp.lt.u32 %p1, %r1, 3; @%p1 st.volatile.global.u32 [%d2], 0; @!%p1 st.global.b32 [%d2], 1;", x)
    assert x.tolist() == [0] * 3 + [1] * 29


@pytest.mark.parametrize("text, what", [
    ("ld.global.b32 %r2, [%d2+4];", "1 global accesses out of bounds"),
    ("st.global.b32 [%d2+-4], %r1;", "1 global accesses out of bounds"),
    ("ld.global.b32 %r2, [%d2+2];", "global address not a multiple of 4"),
    ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d1+8];", "global address not a multiple of 16"),
    ("ld.global.b32 %r2, [0];", "out of bounds"),
    ("atom.global.add.u64 %d3, [%d1+128], 1;", "out of bounds"),
    ("ld.param.b64 %d3, [p1+128];", "no such parameter"),
])  # fmt: skip
def test_planted_faults_in_global_memory(text, what):
    x = np.zeros(64, U32)
    x = x[(-x.ctypes.data // 4) % 4 :][:32]  # 16-byte aligned
    with pytest.raises(Fault, match=what):
        on_global(text, x)


def test_atomics():
    x = np.array([5, 2**63 + 1, 7, 0], U64)
    m = on_global(
        "atom.global.gpu.relaxed.add.u64 %d3, [%d1], 2; atom.global.min.s64 %d5, [%d1+8], 3; cvt.u64.u32 %d4, %r1;"
        "atom.global.gpu.relaxed.exch.b64 %d6, [%d1+16], 9; atom.global.add.u64 %d7, [%d1+24], %d4;",
        x,
    )
    assert x.tolist() == [5 + 64, 2**63 + 1, 9, 496]  # the minimum is of signed numbers
    assert sorted(result(m, "d3", U64)) == list(range(5, 69, 2))
    assert sorted(result(m, "d6", U64)) == [7, *[9] * 31]


# Warps and barriers ---------------------------------------------------------------------------------------------------


def test_exchange_within_a_warp():
    m = machine("mov.u32 %r1, %tid.x; shfl.sync.bfly.b32 %r2, %r1, 4, 31, -1;"
                "shfl.sync.idx.b32 %r3|%p1, %r1, 5, 31, -1;"
                "redux.sync.max.s32 %r4, %r1, -1; elect.sync %r5|%p2, -1;", threads=64)  # fmt: skip
    lane = np.arange(64)
    assert (result(m, "r2", U32) == lane ^ 4).all() and (result(m, "r3", U32) == lane // 32 * 32 + 5).all()
    assert (result(m, "r4", U32) == lane // 32 * 32 + 31).all() and result(m, "p2", np.uint8).sum() == 2


@pytest.mark.parametrize("text, what", [
    ("setp.lt.s32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r2, %r1, 4, 31, -1;", "only part of the 32 threads"),
    ("shfl.sync.bfly.b32 %r2, %r1, 4, 31, 255;", "not all of the warp"),
    ("setp.lt.s32 %p1, %r1, 8; @%p1 bra out; bar.sync 0; out: ret;", "8 threads of a block ended before a barrier"),
    ("setp.lt.s32 %p1, %r1, 8; @%p1 bar.warp.sync -1;", "only part"),
    ("bar.sync 1;", "a barrier other than the block's 0"),
    ("barrier.cluster.wait;", "a wait without an arrival"),
    ("mov.u32 %r2, %warpid;", "no special register %warpid"),
])  # fmt: skip
def test_planted_faults_of_barriers_and_warps(text, what):
    with pytest.raises(Fault, match=what):
        machine("mov.u32 %r1, %tid.x;" + text, threads=64)


def test_threads_that_part_meet_again():
    m = machine("mov.u32 %r1, %tid.x; setp.lt.s32 %p1, %r1, 8; @%p1 bra small; add.s32 %r2, %r1, 100; bra.uni done;"
                "small: mov.b32 %r2, 1; done: shfl.sync.bfly.b32 %r3, %r2, 31, 31, -1;")  # fmt: skip
    assert result(m, "r3", U32).tolist() == [*range(131, 107, -1), *[1] * 8]


# Clusters -------------------------------------------------------------------------------------------------------------

CLUSTER = """
    mov.u32 %r1, %tid.x;  mov.u32 %r2, %cluster_ctarank;  shl.b32 %r3, %r1, 2;  add.s32 %r4, %r1, %r2;
    st.shared.b32 [%r3], %r4;
    mov.b64 %d1, shared;  cvta.shared.u64 %d1, %d1;  xor.b32 %r5, %r2, 1;  mapa.u64 %d2, %d1, %r5;
    cvt.u64.u32 %d3, %r3;  add.s64 %d2, %d2, %d3;
"""
ARRIVE, WAIT, READ_PEER = "barrier.cluster.arrive;", "barrier.cluster.wait;", "ld.u32 %r9, [%d2];"


def test_peers_memory():
    m = machine(CLUSTER + ARRIVE + WAIT + READ_PEER + ARRIVE + WAIT, blocks=4, shared=128, cluster=2)
    assert (result(m, "r9", U32).reshape(4, 32) == np.arange(32) + np.array([[1], [0], [1], [0]])).all()


@pytest.mark.parametrize("text, what", [
    ((READ_PEER, ARRIVE, WAIT), "race, .*read after write"),
    ((ARRIVE, READ_PEER, WAIT), "race, .*read after write"),
    (("bar.sync 0;", READ_PEER, ARRIVE, WAIT), "race, .*read after write"),
    ((ARRIVE, WAIT, READ_PEER), "a block ends while others of its cluster may still read"),
    ((ARRIVE, WAIT, READ_PEER, ARRIVE), "a block ends while others of its cluster may still read"),
    ((ARRIVE, WAIT, READ_PEER, "st.shared.b32 [%r3], 0;", ARRIVE, WAIT), "race, .*write after read"),
    (("mapa.u64 %d2, %d1, 2;",), "a rank beyond the cluster's 2 blocks"),
    (("setp.eq.s32 %p1, %r2, 0; @%p1 bra out;", ARRIVE, WAIT, "out: ret;"), "threads wait for ever at .*cluster.wait"),
])  # fmt: skip
def test_planted_faults_of_clusters(text, what):
    with pytest.raises(Fault, match=what):
        machine(CLUSTER + "".join(text), blocks=2, shared=128, cluster=2)


# Reading PTX ----------------------------------------------------------------------------------------------------------


def test_names_hold_in_their_braces():
    m = machine("mov.b32 %r1, 1; { .reg .b32 %r1; mov.b32 %r1, 2; again: { .reg .pred again_too; } } mov.b32 %r2, %r1;")
    assert result(m, "r2", U32)[0] == 1


@pytest.mark.parametrize("text, what", [
    ("bra nowhere;", "no such label"), ("mov.b32 %r1, nothing;", "no such name: nothing"),
    (".local .align 4 .b8 depot[16];", "memory that is neither"), ("mov.b32 %r1, %r2", "not understood"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(text, what):
    with pytest.raises(Fault, match=what):
        parse(HEAD + text + "\n}")
