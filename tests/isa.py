"""The tests that depend on the CPU, once more as on lesser ones: ``python -m tests.isa [PYTEST ARGUMENTS]``.

C++, oneDNN and ATen are held to AVX2, then to SSE2 (oneDNN: SSE4.1, its least). Tests of the C++ kernels, which take
every instruction set in turn, are no part of it. A new test of what PyTorch or the native executor computes on the CPU
belongs into TESTS, unless a file there covers it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from sgm_engine import _C

LIMITS = {"avx2": ("AVX2", "avx2"), "generic": ("SSE41", "default")}  # SGM_ISA → oneDNN's and ATen's limit
TESTS = (
    "tests/native/test_native.py",
    "tests/native/test_native_networks.py",
    "tests/native/test_native_layers.py",
    "tests/native/test_native_families.py",
    "tests/native/test_native_bfloat16.py",
    "tests/native/test_native_cdm.py",
    "tests/native/test_native_cdm_chains.py",
    "tests/native/test_native_traced.py",
    "tests/engine/test_trajectory.py",
    "tests/engine/test_numerics.py",
    "tests/executors/test_executor.py",
    "tests/models/test_models.py",
    "tests/rewriting/test_accelerate.py",
    "tests/training/test_training.py::test_precision_is_lightnings",
    "tests/cli/test_doctor.py::test_facts_are_those_of_this_machine",
)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    best = _C.isas()[-1]
    for isa, (onednn, aten) in LIMITS.items():
        if isa not in _C.isas() or isa == best:  # the best is what an ordinary run takes
            continue
        better = _C.isas()[_C.isas().index(isa) + 1 :]
        print(f"== held to {isa}", flush=True)
        environment = {"SGM_ISA": isa, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}
        command = [sys.executable, "-m", "pytest", *TESTS, "-k", " and ".join(f"not {name}" for name in better)]
        if code := subprocess.run([*command, *arguments], env=os.environ | environment).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
