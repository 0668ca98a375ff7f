"""Triton's own front end takes every launch as it is made, on a driver that compiles and runs nothing.

Neither aot/ nor the interpreter has that front end; a GPU does, and it decides on names, types and constants.
"""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sgm_engine.kernels import gpu, rounding
from sgm_engine.kernels.aot import compile as aot
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton.launch import Launch


class NoDriver:
    """An NVIDIA GPU's, as far as a launch asks before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launched(monkeypatch):
    """(kernel, signature, constants) of each launch."""
    seen = []

    def compile(self, key, signature, device, constants, options, attributes, warmup):
        assert options.enable_fp_fusion is False, "the compiler may fuse what it likes: Launch says nothing"
        seen.append((self, signature, {self.arg_names[i]: value for (i,), value in constants.items()}))

    monkeypatch.setattr(driver, "_active", NoDriver())
    monkeypatch.setattr(triton.JITFunction, "_do_compile", compile)
    return seen


@pytest.mark.parametrize("name", aot.cases())
def test_a_launch_is_what_was_compiled_ahead(name, launched, monkeypatch):
    """The same types and constants, by Triton's own rules."""
    launch = aot.cases()[name].launch
    compiled = []
    monkeypatch.setattr(triton, "compile", lambda source, **_: compiled.append(source))
    aot.compile_launch(launch, aot.TARGETS["sm_90"])
    launch()
    (kernel, signature, constants), source = *launched, *compiled
    assert kernel is launch.kernel and signature == source.signature
    assert constants == {kernel.arg_names[i]: value for (i,), value in source.constants.items()}


@triton.jit
def with_a_name_that_is_taken(x_ptr, stream):
    pass


def test_a_launch_that_triton_refuses_would_be_seen(launched):
    x = torch.empty(1, device="meta")
    with pytest.raises(AssertionError, match="stream"):
        Launch(with_a_name_that_is_taken, 1, {"x_ptr": x, "stream": 3}, {})()


def test_one_compilation_serves_every_draw_and_stream(launched):
    out, slot = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for draw, stream in ((0, 0), (1, 1 << 24), (16, 0x7F000000), (2**32 - 1, 0)):
        triton_noise.describe(out, slot, slot, draw, stream, "normal")()
    assert len({str(signature) for _, signature, _ in launched}) == 1 == len({str(c) for *_, c in launched})


@pytest.mark.parametrize("version, capability, wrong", [
    ("12.9", (10, 0), True), ("13.0", (12, 0), True), ("13.1", (12, 0), False), ("12.9", (9, 0), False)
])  # fmt: skip
def test_a_compiler_that_fuses_is_refused(monkeypatch, version, capability, wrong):
    tool = type("Tool", (), {"version": version, "path": "ptxas"})
    monkeypatch.setattr(rounding, "knobs", type("K", (), {"nvidia": type("N", (), {"ptxas_blackwell": tool})}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(triton_noise, "noise_fill", lambda *_: None)
    monkeypatch.setattr(gpu.backend_table, "of_device", lambda device: {})
    rounding.refuse_fusion.cache_clear()
    out = type("OnGpu", (), {"device": torch.device("cuda", 0)})()
    try:
        gpu.noise_fill(out, None, None, 0, 0, "normal")
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    finally:
        rounding.refuse_fusion.cache_clear()
    assert bool(refused) == wrong and (not wrong or f"ptxas {version} (ptxas) fuses" in refused)
