"""A CUDA device that is pretended, so that the Python of a GPU can run where there is none. A pytest plugin:

    python -m pytest -p tests.pretend_cuda tests/executors/test_gpu.py

Tensors "on it" are CPU tensors whose storage is on a list. PyTorch's functions say that they are on cuda:0, refuse to
mix them with others, and put their results on the list; a graph is the record of its operations (recorder.py), and
refuses what a capture refuses: reads to the host, and copies from it. Our ops go the way they go on a GPU as far as
the launch of a kernel, in whose place the CPU's runs, or the reference: interpreted, a step would take minutes, and the
kernels have tests of their own. What this cannot show: times, races, memory, and what a kernel does.
"""

import functools
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from tests.pretend_graphs import (
    CUDAGraph,
    Event,
    Stream,
    current_stream,
    end_allocate_to_pool,
    graph,
    graph_pool_handle,
    refuse_in_capture,
    release_pool,
    use_stream,
)  # fmt: skip
from tests.pretend_tensors import MEMORY, Pretend, capturing, here, on_device, put, tensors_in

CAPABILITY = (9, 0)


def install():
    cuda = torch.cuda
    properties = SimpleNamespace(
        name="Pretended", major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, total_memory=MEMORY,
        L2_cache_size=50 * 2**20, warp_size=32, shared_memory_per_block_optin=232448,
    )  # fmt: skip
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: refuse_in_capture(),
        "is_current_stream_capturing": capturing,
        "current_stream": current_stream,
        "stream": use_stream,
        "device_of": lambda x: nullcontext(),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": graph_pool_handle,
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool = end_allocate_to_pool, release_pool

    class Autocast(torch.autocast):
        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            if device_type == "cuda":
                super().__init__("cpu", dtype or torch.float16, enabled, cache_enabled)
            else:  # a CPU's is not this device's
                super().__init__(device_type, dtype, False, cache_enabled)

    torch.autocast = torch.amp.autocast_mode.autocast = torch.amp.autocast = Autocast

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    torch.Generator = Generator

    run = threading.Thread.run

    def run_pretending(self):
        with Pretend():
            run(self)

    threading.Thread.run = run_pretending
    Pretend().__enter__()
    _reach_the_launchers()


def _reach_the_launchers():
    """An op is called from PyTorch's dispatcher, where no mode is left: its own code pretends again."""
    implement = torch.library.Library.impl

    def impl(library, name, implementation, key="", **options):
        def pretending(*args, **kwargs):
            tensors = list(tensors_in((args, kwargs)))
            if not any(map(on_device, tensors)):
                return implementation(*args, **kwargs)
            for x in tensors:  # what autograd made has no mode to say so
                put(x)
            with nullcontext() if torch._C._len_torch_function_stack() else Pretend():
                return implementation(*args, **kwargs)

        implement(library, name, pretending if library.ns == "sgm_engine" else implementation, key, **options)

    torch.library.Library.impl = impl
    assert "sgm_engine" not in sys.modules
    FakeTensorMode.from_tensor = without_pretence(FakeTensorMode.from_tensor)


def without_pretence(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def recorded(function):
    """A launch: on plain tensors, and in a capture one call, whatever it is made of here."""
    function = without_pretence(function)

    @functools.wraps(function)
    def launch(*args, **kwargs):
        if capturing() and not here.recorder.inside:
            here.recorder.calls.append((launch, args, kwargs, None))
        with _disable_current_modes():
            function(*args, **kwargs)

    return launch


def stand_in_for_kernels():
    """A launch is described, as it is on a GPU, and then made here."""
    from sgm_engine.kernels import cpu, reference
    from sgm_engine.kernels.triton import conv as triton_conv
    from sgm_engine.kernels.triton import float8 as triton_float8
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import norm as triton_norm
    from sgm_engine.kernels.triton import norm_backward as triton_norm_backward
    from sgm_engine.kernels.triton import update as triton_update

    def instead(module, name, function):
        describe = module.describe

        def stand_in(*args, **options):
            launches = describe(*args, **options)
            assert all(launch.programs for launch in (launches if isinstance(launches, tuple) else (launches,)))
            function(*args, **options)

        setattr(module, name, recorded(stand_in))

    def norm(n):  # what was left for a slab is not read: the statistics are those of x
        x, bias = n.x, n.bias
        if n.sum_out is not None:  # rounded at each step, as the kernels do
            x = reference.summed(x.float(), n.residual, bias, n.residual_bias).to(x.dtype)
            x, bias = n.sum_out.copy_(reference.ACTIVATIONS[n.before](x.float())), None
        given = (*n.parameters, n.level, n.activation, None, n.eps, n.groups, "none", n.pool, bias)
        y = reference.noise_conditioned_norm(x.float(), *given)
        n.out.copy_(y if n.inverse is None else reference.quantised(y.to(n.x.dtype), n.inverse))

    def convolution(x, weight, bias, residual, dilation, out, partial=None, tile=triton_conv.TILES[0], scale=None):
        assert triton_conv.refusal(x, weight, tile, partial is not None, residual) is None
        y = functional.conv2d(x.float(), weight.float(), padding=weight.shape[-1] // 2 * dilation, dilation=dilation)
        y = y if scale is None else y * scale[:, None, None]
        y = y if bias is None else y + bias.float()[:, None, None]
        out.copy_(y if residual is None else y + residual.float())

    instead(triton_noise, "noise_fill", cpu.noise_fill)
    instead(triton_update, "langevin_update", cpu.langevin_update)
    instead(triton_norm, "norm", norm)
    instead(triton_norm_backward, "norm_backward", cpu.norm_backward)
    instead(triton_conv, "convolution", convolution)
    instead(triton_float8, "quantise", lambda x, inverse, out: out.copy_(reference.quantised(x, inverse)))


install()
stand_in_for_kernels()
