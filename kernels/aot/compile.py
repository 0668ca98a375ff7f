"""Compile what the Triton launchers launch for every supported GPU, with none at hand, and read what came out.

`python -m sgm_engine.kernels.aot [sm_90 …]` prints a line a kernel and exits 1 if one spills, needs a stack frame,
misses its 16-byte accesses, or contracts a product and a sum that the definition rounds separately.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from sgm_engine.kernels.aot.cases import Case, cases
from sgm_engine.kernels.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. fused: float32 multiply-adds, those of a rounded square root included."""

    registers: int
    spills: int
    stack: int  # bytes
    shared: int  # bytes
    loads: dict[int, int]  # global loads by width in bytes
    stores: dict[int, int]
    fused: int
    flushes: bool  # some operation flushes subnormals
    contracts: bool  # the compiler was free to fuse, or did before the last stage
    threads: int

    def wide(self, accesses: dict[int, int]) -> int:
        """Bytes that a program moves by accesses of 16 bytes or more, loops counted once."""
        return self.threads * sum(width * count for width, count in accesses.items() if width >= 16)


def targets(case: Case) -> tuple[str, ...]:
    """The GPUs that a case is for."""
    return case.targets or tuple(TARGETS)


def problems(case: Case, report: Report) -> list[str]:
    """What is wrong with a compiled case; empty if nothing."""
    limits = {"spills": 0, "stack": 0, "shared": case.shared}
    found = [f"{what} {getattr(report, what)}" for what, limit in limits.items() if getattr(report, what) > limit]
    for what, wanted in (("loads", case.loads), ("stores", case.stores)):
        accesses = getattr(report, what)
        if report.wide(accesses) < wanted:
            found.append(f"{what} by width {accesses}: fewer than {wanted} bytes a program in 16-byte accesses")
    if case.exact and (report.contracts or report.flushes):
        found.append("multiply-adds are fused" if report.contracts else "subnormals are flushed")
    return found


def compile_launch(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """The launch as Triton would compile it on that GPU: the same types, constants and alignment hints."""
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = {**launch.constants, **launch.arguments}[name]
        hinted, aligned = not parameter.do_not_specialize, False
        if isinstance(value, Tensor):
            signature[name], aligned = POINTERS[value.dtype], value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif name in launch.constants or value is None or (hinted and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name], aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        else:
            signature[name] = "fp32"
        if hinted and aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=target, options=launch.settings)


def report(case: Case, target: str) -> Report:
    compiled = compile_launch(case.launch, TARGETS[target])
    read = _read_nvidia if TARGETS[target].backend == "cuda" else _read_amd
    return read(compiled, compiled.metadata.num_warps * TARGETS[target].warp_size)


def _read_nvidia(compiled: triton.compiler.CompiledKernel, threads: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    return Report(
        registers=registers,
        spills=local + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        stack=stack,
        shared=compiled.metadata.shared,
        loads=_widths(r"\bLDG\.E([.\w]*)", sass),
        stores=_widths(r"\bSTG\.E([.\w]*)", sass),
        fused=len(re.findall(r"\bFFMA2?\b", sass)),
        flushes=".ftz" in ptx,
        contracts=compiled.metadata.enable_fp_fusion or bool(re.search(r"\b(?:fma|mad)\.\S*f32", ptx)),
        threads=threads,
    )


def _read_amd(compiled: triton.compiler.CompiledKernel, threads: int) -> Report:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"{re.escape(key)}:?\s+(\d+)", text)[1])

    return Report(
        registers=number(".vgpr_count"),
        spills=number(".vgpr_spill_count") + number(".sgpr_spill_count"),
        stack=number(".private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        loads=_dwords(r"\b(?:global|buffer|flat)_load_(\w+)", text),
        stores=_dwords(r"\b(?:global|buffer|flat)_store_(\w+)", text),
        fused=len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f32", text)),
        flushes=number(".amdhsa_float_denorm_mode_32") != 3,
        contracts=compiled.metadata.enable_fp_fusion or "llvm.fmuladd" in compiled.asm["llir"],
        threads=threads,
    )


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _widths(pattern: str, sass: str) -> dict[int, int]:
    """Accesses by width in bytes: LDG.E.128 → 16, LDG.E.U16 → 2, LDG.E → 4."""
    sizes = [re.search(r"\.[US]?(8|16|64|128|256)\b", suffix) for suffix in re.findall(pattern, sass)]
    return dict(Counter(int(size[1]) // 8 if size else 4 for size in sizes))


def _dwords(pattern: str, text: str) -> dict[int, int]:
    """Accesses by width in bytes: dwordx4 → 16, dword → 4, ushort or short_d16 → 2."""
    names = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    return dict(Counter(names.get(name, 2 if "short" in name else 1) for name in re.findall(pattern, text)))


def main(wanted: list[str]) -> int:
    failed = 0
    for name, case in cases().items():
        for target in (t for t in targets(case) if t in (wanted or TARGETS)):
            found = report(case, target)
            wrong = problems(case, found)
            failed += bool(wrong)
            print(
                f"{name:48} {target:7} {found.registers:4} registers {found.shared:6} B shared  "
                f"loads {found.loads} stores {found.stores}  {'; '.join(wrong) or 'ok'}",
                flush=True,
            )
    return 1 if failed else 0
