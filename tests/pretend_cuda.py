"""A CUDA device that is pretended, so that the Python of a GPU can run where there is none. A pytest plugin:

    PYTHONPATH=tests python -m pytest -p pretend_cuda tests/test_gpu.py

Tensors "on it" are CPU tensors whose storage is on a list. PyTorch's functions say that they are on cuda:0, refuse to
mix them with others, and put their results on the list; a graph is the record of its operations (recorder.py), and
refuses what a capture refuses: reads to the host, and copies from it. Our ops go the way they go on a GPU as far as
the launch of a kernel, in whose place the CPU's runs, or the reference: interpreted, a step would take minutes, and the
kernels have tests of their own. What this cannot show: times, races, memory, and what a kernel does.
"""

import functools
import math
import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from recorder import Recorder
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 2**30
CAPABILITY = (9, 0)

_there: dict[int, StorageWeakRef] = {}  # storages on the device, by address, which a reference keeps from serving again
_here = threading.local()  # .stream, .recorder of a capture


def on_device(x: torch.Tensor) -> bool:
    found = _there.get(x.untyped_storage()._cdata)
    return found is not None and not found.expired()


def tensors_in(what):
    if isinstance(what, torch.Tensor):
        yield what
    elif isinstance(what, (tuple, list)):
        for part in what:
            yield from tensors_in(part)
    elif isinstance(what, dict):
        yield from tensors_in(list(what.values()))


def put(x):
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and not isinstance(x, FakeTensor):
        storage = x.untyped_storage()
        if len(_there) > 10_000:
            for key in [key for key, found in list(_there.items()) if found.expired()]:
                _there.pop(key, None)
        _there[storage._cdata] = StorageWeakRef(storage)
    return x


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def capturing() -> bool:
    return getattr(_here, "recorder", None) is not None


# Functions that may be given tensors of both devices, and those that say nothing of a device.
MIXED = {"copy_", "__getitem__", "__setitem__", "index_put_", "type_as", "_has_compatible_shallow_copy_type"}
PLAIN = {"dim", "size", "stride", "numel", "is_contiguous", "is_floating_point", "element_size", "data_ptr", "tolist"}
PLAIN |= {"__set__", "__delete__"}
COPY_IN_CAPTURE = "Cannot copy between CPU and CUDA tensors during CUDA graph capture"


class Pretend(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if name in PLAIN:
            return func(*args, **kwargs)
        if name == "__get__":
            return self.read(func.__self__.__name__, func, args)
        tensors = list(tensors_in((args, kwargs)))
        if any(isinstance(x, FakeTensor) for x in tensors):  # of a trace, which has no memory: all on one side
            return func(*args, **(kwargs | {"device": "cpu"} if is_cuda(kwargs.get("device")) else kwargs))
        sides = {on_device(x) for x in tensors}
        there = True in sides
        if name == "numpy" and there:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first."
            )
        if name == "pin_memory":
            return args[0]
        if name in ("to", "cpu", "cuda"):
            return self.move(func, name, args, kwargs, there)
        if len(sides) == 2:
            if name == "copy_" and capturing():
                raise RuntimeError(COPY_IN_CAPTURE)
            if name not in MIXED and any(x.dim() and not on_device(x) for x in tensors):
                raise RuntimeError(f"Expected all tensors to be on the same device, but got cuda:0 and cpu in {func}")
        if kwargs.get("device") is not None:
            there = is_cuda(kwargs["device"])
            kwargs = kwargs | ({"device": "cpu"} if there else {})
            if there and capturing() and name in ("tensor", "as_tensor"):
                raise RuntimeError(COPY_IN_CAPTURE)
            if there and name == "empty" and math.prod(args[0] if isinstance(args[0], tuple) else args) > MEMORY:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        out = func(*args, **kwargs)
        for x in tensors_in(out) if there else ():
            put(x)
        return out

    def read(self, what, func, args):
        if what not in ("device", "is_cuda", "is_cpu", "grad") or isinstance(args[0], FakeTensor):
            return func(*args)
        there, found = on_device(args[0]), func(*args)
        if what == "grad":  # autograd made it
            return put(found) if there else found
        if not there:
            return found
        return {"device": DEVICE, "is_cuda": True, "is_cpu": False}[what]

    def move(self, func, name, args, kwargs, there):
        x, *rest = args
        other = next((a for a in rest if isinstance(a, torch.Tensor)), None)
        given = [a for a in (*rest, kwargs.get("device")) if isinstance(a, (str, torch.device))]
        target = given[0] if given else name if name != "to" else DEVICE if there else "cpu"
        if other is not None:
            target = DEVICE if on_device(other) else "cpu"
        if torch.device(target).type == "meta":
            return func(*args, **kwargs)
        if name == "to":
            rest = ["cpu" if isinstance(a, (str, torch.device)) else a for a in rest]
            kwargs |= {"device": "cpu"} if kwargs.get("device") is not None else {}
            out = func(x, *rest, **kwargs)
        else:
            out = x
        if is_cuda(target) != there:
            if capturing():
                raise RuntimeError(COPY_IN_CAPTURE)
            if out.untyped_storage()._cdata == x.untyped_storage()._cdata:
                out = x.clone()
        return put(out) if is_cuda(target) else out


# Streams, events, graphs ---------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, device=None, **_):
        self.device, self.cuda_stream = DEVICE, id(self)

    def wait_stream(self, other):
        assert isinstance(other, Stream)

    def wait_event(self, event):
        assert isinstance(event, Event)

    def synchronize(self):
        refuse_in_capture()


class Event:
    def __init__(self, enable_timing=False, **_):
        self.timed = enable_timing

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        refuse_in_capture()

    def elapsed_time(self, end):
        assert self.timed and end.timed and self.recorded and end.recorded
        return 1.0


_default = Stream()


def refuse_in_capture():
    if capturing():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def current_stream(device=None):
    return getattr(_here, "stream", None) or _default


@contextmanager
def use_stream(stream):
    before = current_stream()
    _here.stream = stream
    try:
        yield
    finally:
        _here.stream = before


class Capture(Recorder):
    inside = False  # of an op, which is recorded as one

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.inside = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.inside = False
        if any(map(on_device, tensors_in((args, kwargs)))):  # in a backward pass nobody else sees to it
            for x in tensors_in(out):
                put(x)
        return out


class CUDAGraph:
    _pools = 0

    def __init__(self, keep_graph=False):
        self._recorder = None

    def pool(self):
        assert self._recorder is not None, "nothing was captured"
        return self._pool

    def replay(self):
        refuse_in_capture()
        assert self._recorder is not None, "nothing was captured"
        self._recorder.replay()


_alive: weakref.WeakSet = weakref.WeakSet()
_spoilt: set = set()  # pools in which a capture failed


@contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    if pool is not None:
        assert pool not in _spoilt and any(other.pool() == pool for other in _alive), "a pool that is none"
    before = current_stream()
    _here.stream, _here.recorder = stream or Stream(), Capture()
    try:
        with _here.recorder as recorder:
            yield
    except BaseException:  # PyTorch's leaves its stream behind too
        _spoilt.add(pool)
        raise
    finally:
        _here.recorder = None
    _here.stream = before
    if pool is None:
        CUDAGraph._pools += 1
    cuda_graph._pool = pool or (0, CUDAGraph._pools)
    cuda_graph._recorder = recorder
    _alive.add(cuda_graph)


# In PyTorch's place --------------------------------------------------------------------------------------------------


def install():
    cuda = torch.cuda
    properties = SimpleNamespace(
        name="Pretended", major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, total_memory=MEMORY,
        L2_cache_size=50 * 2**20, warp_size=32, shared_memory_per_block_optin=232448,
    )  # fmt: skip
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: refuse_in_capture(),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "is_current_stream_capturing": capturing,
        "current_stream": current_stream,
        "default_stream": lambda device=None: _default,
        "stream": use_stream,
        "device_of": lambda x: nullcontext(),
        "device": lambda device: nullcontext(),
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)

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
            with Pretend():
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
        if capturing() and not _here.recorder.inside:
            _here.recorder.calls.append((launch, args, kwargs, None))
        with _disable_current_modes():
            function(*args, **kwargs)

    return launch


def stand_in_for_kernels():
    """A launch is described, as it is on a GPU, and then made here."""
    from sgm_engine.kernels import (
        cpu,
        reference,
        triton_conv,
        triton_float8,
        triton_noise,
        triton_norm,
        triton_norm_backward,
        triton_update,
    )

    def instead(module, name, function):
        describe = module.describe

        def stand_in(*args, **options):
            launches = describe(*args, **options)
            assert all(launch.programs for launch in (launches if isinstance(launches, tuple) else (launches,)))
            function(*args, **options)

        setattr(module, name, recorded(stand_in))

    def norm(x, gamma, alpha, beta, level, activation, residual, eps, out, sum_out, workspace, *rest, **options):
        options |= dict(zip(("groups", "before", "pool"), rest, strict=False))
        inverse = options.pop("inverse", None)
        options.pop("slab", None)  # what was left for it is not read: the statistics are those of x
        parameters = (gamma, alpha, beta, level, activation, None if residual is None else residual.float(), eps)
        y = reference.noise_conditioned_norm(x.float(), *parameters, **options)
        y, total = y if isinstance(y, tuple) else (y, None)
        if sum_out is not None:
            sum_out.copy_(total)
        out.copy_(y if inverse is None else reference.quantised(y.to(x.dtype), inverse))

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
