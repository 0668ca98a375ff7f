"""Instructions that work on registers alone, each against cases worked by hand from the PTX manual."""

import numpy as np
import pytest

from tests.ptx.machine import handler
from tests.ptx.program import Fault
from tests.ptx.snippets import f32, machine, result

NAN, INF = float("nan"), float("inf")
I32, I64, U16, U32, U64, F32, S16 = np.int32, np.int64, np.uint16, np.uint32, np.uint64, np.float32, np.int16

CASES = [  # opcode and what follows the result, inputs, the kind of the result, what it is
    ("add.s32 R, %r1, %r2", {"r1": [2**31 - 1, -5], "r2": [1, 3]}, I32, [-(2**31), -2]),
    ("add.s16 R, %h1, %h2", {"h1": [32767], "h2": [1]}, S16, [-32768]),
    ("add.s64 R, %d1, -8", {"d1": [2**40]}, I64, [2**40 - 8]),
    ("sub.s32 R, %r1, 7", {"r1": [3]}, I32, [-4]),
    ("sub.s64 R, %d1, %d2", {"d1": [0], "d2": [1]}, I64, [-1]),
    ("mul.lo.s32 R, %r1, %r2", {"r1": [65536, -3], "r2": [65537, 5]}, I32, [65536, -15]),
    ("mul.lo.s16 R, %h1, 3", {"h1": [21846]}, U16, [2]),
    ("mul.lo.s64 R, %d1, %d2", {"d1": [2**33], "d2": [3]}, I64, [3 * 2**33]),
    ("mul.wide.u32 R, %r1, %r2", {"r1": [2**32 - 1], "r2": [2**32 - 1]}, U64, [(2**32 - 1) ** 2]),
    ("mul.wide.s32 R, %r1, 2", {"r1": [-(2**31)]}, I64, [-(2**32)]),
    ("mul.wide.u16 R, %h1, %h1", {"h1": [65535]}, U32, [65535**2]),
    ("mul.hi.u32 R, %r1, %r1", {"r1": [2**32 - 1]}, U32, [2**32 - 2]),
    ("mul.hi.s32 R, %r1, %r2", {"r1": [-1], "r2": [1]}, I32, [-1]),
    ("mul.hi.u16 R, %h1, %h1", {"h1": [65535]}, U16, [65534]),
    ("mul.hi.u64 R, %d1, %d1", {"d1": [-1]}, U64, [2**64 - 2]),
    ("mul.hi.s64 R, %d1, %d2", {"d1": [-1], "d2": [1]}, I64, [-1]),
    ("mad.lo.s32 R, %r1, %r2, %r3", {"r1": [7], "r2": [-3], "r3": [1]}, I32, [-20]),
    ("mad.lo.s64 R, %d1, 2, %d2", {"d1": [2**40], "d2": [-1]}, I64, [2**41 - 1]),
    ("mad.wide.s32 R, %r1, 4, %d1", {"r1": [-(2**31)], "d1": [1]}, I64, [1 - 2**33]),
    ("mad.wide.u32 R, %r1, 4, %d1", {"r1": [2**31], "d1": [1]}, I64, [1 + 2**33]),
    ("div.s32 R, %r1, 2", {"r1": [-7, 7]}, I32, [-3, 3]),
    ("div.u32 R, %r1, 2", {"r1": [-7]}, U32, [(2**32 - 7) // 2]),
    ("div.s64 R, %d1, %d2", {"d1": [-(2**40) - 1], "d2": [2**20]}, I64, [-(2**20)]),
    ("rem.s32 R, %r1, 4", {"r1": [-7, 7]}, I32, [-3, 3]),
    ("rem.u32 R, %r1, 10", {"r1": [-1]}, U32, [5]),
    ("neg.s32 R, %r1", {"r1": [5, -(2**31)]}, I32, [-5, -(2**31)]),
    ("max.s32 R, %r1, %r2", {"r1": [-1], "r2": [1]}, I32, [1]),
    ("min.s32 R, %r1, %r2", {"r1": [-1], "r2": [1]}, I32, [-1]),
    ("max.relu.s32 R, %r1, %r2", {"r1": [-3, -3], "r2": [-1, 2]}, I32, [0, 2]),
    ("add.rn.f32 R, %r1, %r2", {"r1": f32(1, 2**24), "r2": f32(2**-24, 1)}, F32, [1, 2**24]),  # ties to even
    ("add.f32 R, %r1, 0fBF800000", {"r1": f32(1.5)}, F32, [0.5]),
    ("sub.rn.f32 R, %r1, %r2", {"r1": f32(1), "r2": f32(2**-25)}, F32, [1]),  # a tie below 1, to even
    ("mul.rn.f32 R, %r1, %r1", {"r1": f32(1 + 2**-23)}, F32, [1 + 2**-22]),
    ("fma.rn.f32 R, %r1, %r1, %r2", {"r1": f32(1 + 2**-23), "r2": f32(-1 - 2**-22)}, F32, [2**-46]),
    # 1 + 2⁻²³ + 2⁻²⁴ − 2⁻⁷⁰ is below a tie, to which float64 would round it, and float32 then up
    ("fma.rn.f32 R, %r1, %r2, %r3", {"r1": f32(2**-12 + 2**-35), "r2": f32(2**-12 - 2**-35), "r3": f32(1 + 2**-23)},
     F32, [1 + 2**-23]),
    ("fma.rm.f32 R, %r1, %r2, %r3", {"r1": f32(1, 1), "r2": f32(1, -(2**-30)), "r3": f32(2**-30, 1)},
     F32, [1, 1 - 2**-24]),
    ("div.rn.f32 R, %r1, %r2", {"r1": f32(1, 1), "r2": f32(3, 0)}, F32, [np.float32(1) / np.float32(3), INF]),
    ("div.full.f32 R, %r1, %r2", {"r1": f32(6), "r2": f32(3)}, F32, [2]),
    ("div.approx.f32 R, %r1, %r2", {"r1": f32(6), "r2": f32(3)}, F32, [2]),
    ("rcp.rn.f32 R, %r1", {"r1": f32(4)}, F32, [0.25]),
    ("sqrt.rn.f32 R, %r1", {"r1": f32(2, 9)}, F32, [1.41421354, 3]),
    ("rsqrt.approx.ftz.f32 R, %r1", {"r1": f32(4, 1e-40)}, F32, [0.5, INF]),
    ("ex2.approx.ftz.f32 R, %r1", {"r1": f32(-1, 3, -130)}, F32, [0.5, 8, 0]),
    ("ex2.approx.f32 R, %r1", {"r1": f32(-130)}, F32, [2.0**-130]),
    ("neg.f32 R, %r1", {"r1": f32(0)}, F32, [-0.0]),
    ("abs.f32 R, %r1", {"r1": f32(-2, -0.0)}, F32, [2, 0]),
    ("max.NaN.f32 R, %r1, %r2", {"r1": f32(NAN, 1), "r2": f32(1, 2)}, F32, [NAN, 2]),
    ("min.NaN.f32 R, %r1, %r2", {"r1": f32(NAN, 1), "r2": f32(1, 2)}, F32, [NAN, 1]),
    ("max.f32 R, %r1, %r2", {"r1": f32(NAN), "r2": f32(1)}, F32, [1]),
    ("min.NaN.xorsign.abs.f32 R, %r1, %r2", {"r1": f32(-3, -3, 5), "r2": f32(2, -2, 448)}, F32, [-2, 2, 5]),
    ("add.rn.bf16x2 R, %r1, %r2", {"r1": [0x3F804000], "r2": [0x3B803F80]}, U32, [0x3F804040]),  # 1 + 2⁻⁸ ties to 1
    ("add.rn.f16x2 R, %r1, %r2", {"r1": [0x3C003C00], "r2": [0x10004000]}, U32, [0x3C004200]),  # 1 + 2⁻¹¹ ties to 1
    ("fma.rn.bf16x2 R, %r1, %r2, %r3", {"r1": [0x3F813F81], "r2": [0x3F81BF81], "r3": [0x00003F82]}, U32, [0x3F82B880]),
    ("add.rn.bf16 R, %h1, %h2", {"h1": [0x3F80], "h2": [0x3B80]}, U16, [0x3F80]),
    ("add.rn.f16 R, %h1, %h2", {"h1": [0x3C00], "h2": [0x4000]}, U16, [0x4200]),
    ("mad.lo.s16 R, %h1, %h2, %h3", {"h1": [300], "h2": [300], "h3": [-1]}, U16, [300 * 300 - 65536 - 1]),
    ("prmt.b32 R, %r1, %r2, %r3", {"r1": [0x33228100], "r2": [0x77665544], "r3": [0x7604, 0x9190]},
     U32, [0x77660044, 0xFF81FF00]),
    ("and.b32 R, %r1, 12", {"r1": [10]}, U32, [8]),
    ("or.b16 R, %h1, %h2", {"h1": [1], "h2": [6]}, U16, [7]),
    ("xor.b64 R, %d1, -1", {"d1": [0]}, I64, [-1]),
    ("not.b32 R, %r1", {"r1": [0]}, I32, [-1]),
    ("shl.b32 R, %r1, %r2", {"r1": [1, 1], "r2": [31, 32]}, U32, [2**31, 0]),
    ("shl.b64 R, %d1, 40", {"d1": [3]}, U64, [3 * 2**40]),
    ("shr.u32 R, %r1, %r2", {"r1": [-1, -1], "r2": [28, 32]}, U32, [15, 0]),
    ("shr.s32 R, %r1, %r2", {"r1": [-16, -1], "r2": [2, 99]}, I32, [-4, -1]),
    ("shr.u64 R, %d1, 60", {"d1": [-1]}, U64, [15]),
    ("bfe.u32 R, %r1, 8, 4", {"r1": [0xABCDE]}, U32, [0xC]),
    ("bfe.s32 R, %r1, 4, 1", {"r1": [16, 15]}, I32, [-1, 0]),
    ("selp.b32 R, %r1, %r2, %p1", {"r1": [1], "r2": [2], "p1": [1, 0]}, U32, [1, 2]),
    ("selp.f32 R, 0f3F800000, %r2, %p1", {"r2": f32(2), "p1": [1, 0]}, F32, [1, 2]),
    ("mov.b32 R, {%h1, %h2}", {"h1": [0x1234], "h2": [0xABCD]}, U32, [0xABCD1234]),
    ("mov.b64 R, {%r1, %r2}", {"r1": [1], "r2": [2]}, U64, [2**33 + 1]),
    ("mov.u32 R, %tid.x", {}, U32, [0, 1, 2]),
    ("cvt.u32.u64 R, %d1", {"d1": [2**32 + 5]}, U32, [5]),
    ("cvt.s64.s32 R, %r1", {"r1": [-2]}, I64, [-2]),
    ("cvt.u64.u32 R, %r1", {"r1": [-2]}, U64, [2**32 - 2]),
    ("cvt.u16.u32 R, %r1", {"r1": [65537]}, U16, [1]),
    ("cvt.rn.f32.s32 R, %r1", {"r1": [-(2**24) - 1]}, F32, [-(2**24)]),
    ("cvt.rn.f32.u32 R, %r1", {"r1": [-1]}, F32, [2**32]),
    ("cvt.f32.bf16 R, %h1", {"h1": [0x4049]}, F32, [3.140625]),
    ("cvt.f32.f16 R, %h1", {"h1": [0x3555, 0x0001]}, F32, [0.333251953125, 2**-24]),
    ("cvt.rn.bf16.f32 R, %r1", {"r1": f32(1 + 2**-8, 1 + 3 * 2**-8, NAN, 3.4e38)},
     U16, [0x3F80, 0x3F82, 0x7FFF, 0x7F80]),
    ("cvt.rn.bf16x2.f32 R, %r1, %r2", {"r1": f32(2), "r2": f32(1)}, U32, [0x40003F80]),
    ("cvt.rn.f16x2.f32 R, %r1, %r2", {"r1": f32(70000), "r2": f32(1)}, U32, [0x7C003C00]),
    ("cvt.sat.f32.f32 R, %r1", {"r1": f32(-1, 0.5, 2, NAN)}, F32, [0, 0.5, 1, 0]),
    ("cvt.rni.f32.f32 R, %r1", {"r1": f32(0.5, 1.5, -2.5)}, F32, [0, 2, -2]),
    # 448 is the largest; 17 ties to 16; 2⁻¹⁰ ties to 0 and 3·2⁻¹⁰ to 2⁻⁸, among the subnormals 2⁻⁹ apart
    ("cvt.rn.satfinite.e4m3x2.f32 R, %r1, %r2", {"r1": f32(1e9, 17, 2**-10), "r2": f32(-1, NAN, 3 * 2**-10)},
     U16, [0x7EB8, 0x587F, 0x0002]),
    ("cvt.rn.f16x2.e4m3x2 R, %h1", {"h1": [0x7E01]}, U32, [0x5F001800]),
]  # fmt: skip


@pytest.mark.parametrize("text, inputs, kind, expected", CASES, ids=[c[0] for c in CASES])
def test_of_registers(text, inputs, kind, expected):
    to = {1: "p9", 2: "h9", 4: "r9", 8: "d9"}[np.dtype(kind).itemsize]
    found = result(machine(text.replace("R,", f"%{to},") + ";", **inputs), to, kind)[: len(expected)]
    np.testing.assert_array_equal(found, np.array(expected).astype(kind))
    if kind is F32:
        assert (np.signbit(found) == np.signbit(f32(*expected)))[~np.isnan(found)].all()


@pytest.mark.parametrize("how, expected", [
    ("eq.s32", [0, 1, 0]), ("ne.b32", [1, 0, 1]), ("lt.s32", [1, 0, 0]), ("le.s32", [1, 1, 0]), ("gt.s32", [0, 0, 1]),
    ("ge.s32", [0, 1, 1]), ("lt.u32", [0, 0, 1]), ("gt.u32", [1, 0, 0]),
])  # fmt: skip
def test_comparisons_of_integers(how, expected):
    m = machine(f"setp.{how} %p1, %r1, %r2;", r1=[-1, 4, 4], r2=[3, 4, -1])
    assert result(m, "p1", np.uint8)[:3].tolist() == expected


@pytest.mark.parametrize("how, expected", [
    ("eq", [0, 1, 0]), ("neu", [1, 0, 1]), ("equ", [0, 1, 1]), ("lt", [1, 0, 0]), ("leu", [1, 1, 1]), ("gt", [0, 0, 0]),
    ("num", [1, 1, 0]), ("nan", [0, 0, 1]),
])  # fmt: skip
def test_comparisons_of_floats(how, expected):
    m = machine(f"setp.{how}.f32 %p1, %r1, %r2;", r1=f32(1, 2, NAN), r2=f32(2, 2, 0))
    assert result(m, "p1", np.uint8)[:3].tolist() == expected


def test_comparison_of_two_halves():
    m = machine("setp.gt.bf16x2 %p1|%p2, %r1, %r2;", r1=[0x3F804000], r2=[0x3F803F80])  # (1, 2) > (1, 1), upper first
    assert result(m, "p1", np.uint8)[0] == 1 and result(m, "p2", np.uint8)[0] == 0
    assert result(machine("setp.gt.bf16 %p1, %h1, 0;", h1=[0x3F80, 0xBF80]), "p1", np.uint8)[:2].tolist() == [1, 0]


def test_predicates():
    m = machine("and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2; xor.pred %p5, %p1, %p2; not.pred %p6, %p1;"
                "mov.pred %p7, -1;", p1=[0, 1, 1], p2=[1, 0, 1])  # fmt: skip
    found = {k: result(m, f"p{k}", np.uint8)[:3].tolist() for k in range(3, 8)}
    assert found == {3: [0, 0, 1], 4: [1, 1, 1], 5: [1, 1, 0], 6: [1, 0, 0], 7: [1, 1, 1]}


def test_unpacking_and_what_is_not_wanted():
    m = machine("mov.b64 {_, %r2}, %d1; mov.b32 {%h1, _}, %r2;", d1=[0x1234567890ABCDEF])
    assert result(m, "r2", U32)[0] == 0x12345678 and result(m, "h1", U16)[0] == 0x5678


def test_what_is_signed_is_extended_by_its_sign():
    value = np.array([-2], np.int16)
    memory = [(value.ctypes.data, 2)]
    m = machine("ld.param.b64 %d1, [p0]; ld.global.s16 %r1, [%d1]; ld.global.u16 %r2, [%d1];",
                memory=memory, pointer=value.ctypes.data)  # fmt: skip
    assert result(m, "r1", I32)[0] == -2 and result(m, "r2", I32)[0] == 65534


@pytest.mark.parametrize("text, ulps, relative", [
    ("ex2.approx.ftz.f32 %r9, %r1;", 2, None), ("div.full.f32 %r9, %r2, %r1;", 2, None),
    ("div.approx.f32 %r9, %r2, %r1;", 2, None), ("rsqrt.approx.ftz.f32 %r9, %r1;", None, 2.0**-22.9),
])  # fmt: skip
def test_approximations_go_to_their_limits_and_not_beyond(text, ulps, relative):
    x, y = np.random.default_rng(0).uniform(0.1, 9, (2, 4096)).astype(F32)
    exact = {"ex2": np.exp2, "div": lambda v: y / v, "rsq": lambda v: 1 / np.sqrt(v)}[text[:3]](x.astype(np.float64))
    near, rough = (result(machine(text, 1024, 4, rough=r, r1=x, r2=y), "r9", F32).astype(np.float64) for r in (0, 1))
    unit = np.spacing(np.abs(exact).astype(F32)).astype(np.float64) if ulps else np.abs(exact) * relative
    assert (np.abs(near - exact) <= unit * (0.5 if ulps else 1)).all()
    off = np.abs(rough - exact) / unit
    assert off.max() <= (ulps or 1) and off.max() > 0.7 * (ulps or 1)


def test_exact_instructions_stay_exact():
    x = np.random.default_rng(0).uniform(0.1, 9, 32).astype(F32)
    for text in ("div.rn.f32 %r9, %r1, %r1;", "sqrt.rn.f32 %r9, %r1;", "rcp.rn.f32 %r9, %r1;"):
        assert (result(machine(text, r1=x), "r9", U32) == result(machine(text, r1=x, rough=True), "r9", U32)).all()


@pytest.mark.parametrize(
    "opcode", ["add.f64", "fma.rz.f32", "sin.approx.f32", "mul.lo.u8", "cvt.rz.f32.f64", "tanh.approx.f32"]
)
def test_what_is_not_known_is_refused_by_name(opcode):
    with pytest.raises(Fault, match=f"no instruction {opcode}"):
        handler(opcode)


def test_division_by_zero():
    with pytest.raises(Fault, match=r"div.s32 %r1, %r2, 0: a division by 0"):
        machine("div.s32 %r1, %r2, 0;")
