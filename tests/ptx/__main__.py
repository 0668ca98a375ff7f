"""The tests of the GPU kernels on PTX: ``python -m tests.ptx [--quick] [PYTEST ARGUMENTS]``.

Triton's own compiler makes the PTX, and nvcc that of CUDA C++ where it is installed. --quick: the part that .ci/run
takes. The package says what this shows and what it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.ptx.cuda_library import NVCC

PARTS = ("", "_update", "_norm", "_norm_backward", "_conv", "_float8")
TRITON = ["tests/ptx/whole_kernels.py", *(f"tests/kernels/test_triton{part}.py" for part in PARTS)]
CUDA = [f"tests/kernels/test_cuda{part}.py" for part in ("", "_norm", "_norm_sizes")]
NO_LAUNCH = "not gpu and not no_shape_writes"  # of the device that is not here, or without a kernel
# $SGM_PTX → files, pytest's -k
ALL = {
    "sm_90": (TRITON + CUDA, NO_LAUNCH),
    "sm_90,rough": (TRITON + CUDA, NO_LAUNCH),
    "sm_90,backwards": (CUDA, NO_LAUNCH),
    "sm_80": (TRITON, "not tma and not float8"),  # what an A100 has not
}
QUICK = {
    "sm_90": (TRITON + CUDA, f"{NO_LAUNCH} and not (norm and (nchw or options))"),
    "sm_90,rough": (["tests/kernels/test_triton_norm.py"], "large_mean or activation_before"),
    "sm_80": (TRITON, "(convolution and shape0 and not tma and not float8) or (tuned and 64x128) or one_element"),
}


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    runs = QUICK if "--quick" in arguments else ALL
    arguments = [argument for argument in arguments if argument != "--quick"]
    if NVCC is None:
        print("nvcc is not installed: CUDA C++ is left out, Triton's kernels run", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for how, (files, wanted) in runs.items():
            files = [f for f in files if NVCC or f not in CUDA]
            if not files:
                continue
            print(f"== PTX of {how}", flush=True)
            command = [sys.executable, "-m", "pytest", *files, "-p", "tests.ptx.plugin", "-k", wanted, *arguments]
            environment = os.environ | {"SGM_PTX": how, "SGM_PTX_CACHE": cache, "TRITON_CACHE_DIR": cache}
            if code := subprocess.run(command, env=environment).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
