"""A Triton launch, as the launchers describe it, compiled for a GPU and run on this machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from sgm_engine.kernels.aot import compile as aot
from sgm_engine.kernels.triton.launch import Launch
from tests.ptx.machine import Grid, TensorMap, run
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import Program, parse


def extent(t: Tensor) -> tuple[int, int]:
    """(address, bytes from its first to its last element)."""
    if t.numel() == 0:
        return t.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size()


@contextmanager
def ptx_alone() -> Iterator[None]:
    """Triton's compilations end with PTX, and are kept apart from whole ones."""

    def stages(*given) -> tuple[str, str] | None:
        if not given:
            return "ptx alone", "ptx alone"
        given[1]["cubin"] = lambda source, metadata: b""
        return None

    before, knobs.runtime.add_stages_inspection_hook = knobs.runtime.add_stages_inspection_hook, stages
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


@dataclass
class Simulator:
    """Runs launches. rough and backwards as of machine.run; compiled: what has been, by what decides on it."""

    target: str = "sm_90"
    rough: bool = False
    backwards: bool = False
    compiled: dict[tuple, tuple[Any, Program]] = field(default_factory=dict)
    launches: int = 0
    instructions: int = 0

    def __call__(self, launch: Launch) -> None:
        if not launch.programs:
            return
        _, (compiled, program) = self.compile(launch)
        parameters, maps, tensors = arguments(launch, compiled.metadata, program)
        grid = Grid(
            parameters, (launch.programs, 1), 32 * compiled.metadata.num_warps, compiled.metadata.shared, maps=maps
        )
        self.instructions += run(program, grid, GlobalMemory(map(extent, tensors)), self.rough, self.backwards)
        self.launches += 1

    def run(self, kernel: triton.JITFunction, *given: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        """In the place of JITFunction.run: what Triton does with a call on a GPU, its own defaults included."""
        names = [p.name for p in kernel.params]
        values = dict(zip(names, given, strict=False)) | {n: named.pop(n) for n in names if n in named}
        values = {p.name: values.get(p.name, p.default) for p in kernel.params}
        constants = {p.name: values.pop(p.name) for p in kernel.params if p.is_constexpr}
        options = {"enable_fp_fusion": True, **named}
        programs, *more = grid(values | constants) if callable(grid) else grid
        assert not any(n > 1 for n in more), "a grid of more than one axis"
        self(Launch(kernel, programs, values, constants, options))

    def compile(self, launch: Launch) -> tuple[tuple, tuple[Any, Program]]:
        """(key in ``compiled``, what is there)"""
        parts = itertools.chain(launch.constants.items(), launch.arguments.items(), launch.settings.items())
        key = launch.kernel.fn.__name__, tuple((name, _kind(value)) for name, value in parts)
        if key not in self.compiled:
            with ptx_alone():
                compiled = aot.compile_launch(launch, aot.TARGETS[self.target])
            self.compiled[key] = compiled, parse(compiled.asm["ptx"])
        return key, self.compiled[key]


def _kind(value: object) -> object:
    """What the compiler sees of an argument or a constant."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    return type(value), value


def arguments(launch: Launch, metadata: Any, program: Program) -> tuple[bytes, dict[int, TensorMap], list[Tensor]]:
    """(parameters as they lie in memory, tensor maps by their offset, tensors that may be touched)."""
    values, tensors = [], []
    boxes = iter(metadata.tensordesc_meta or ())
    for parameter in launch.kernel.params:
        value = {**launch.constants, **launch.arguments}[parameter.name]
        specialised = not parameter.do_not_specialize and type(value) is int and value == 1
        if parameter.name in launch.constants or value is None or specialised:
            continue
        if isinstance(value, TensorDescriptor):
            values += [_map(value, next(boxes)), *value.shape, *value.strides]
            tensors.append(value.base)
        elif isinstance(value, Tensor):
            values.append(value.data_ptr())
            tensors.append(value)
        else:
            values.append(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value))
    values += [0, 0]  # Triton's own scratch memories, of no bytes
    given, maps = bytearray(program.parameter_bytes), {}
    for value, p in zip(values, program.parameters, strict=True):
        if isinstance(value, TensorMap):
            maps[p.offset] = value
        else:
            given[p.offset : p.offset + p.size] = (value & (1 << 8 * p.size) - 1).to_bytes(p.size, "little")
    return bytes(given), maps, tensors


def _map(descriptor: TensorDescriptor, meta: dict[str, Any]) -> TensorMap:
    t = descriptor.base
    shape = tuple(descriptor.shape)
    dense = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    assert list(descriptor.strides) == dense and t.numel() == math.prod(shape), "a tensor map of something not dense"
    return TensorMap(t.data_ptr(), shape, tuple(meta["block_size"]), meta["swizzle"], t.element_size())
