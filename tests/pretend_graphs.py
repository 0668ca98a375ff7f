"""Streams, events and graphs of the pretended device (pretend_cuda.py). A graph is the record of its operations."""

import weakref
from contextlib import contextmanager

import torch

from tests.pretend_tensors import DEVICE, capturing, generator, here, on_device, put, tensors_in
from tests.recorder import Recorder


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


default_stream = Stream()


def refuse_in_capture():
    if capturing():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def current_stream(device=None):
    return getattr(here, "stream", None) or default_stream


@contextmanager
def use_stream(stream):
    before = current_stream()
    here.stream = stream
    try:
        yield
    finally:
        here.stream = before


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
    def __init__(self, keep_graph=False):
        self._recorder = None

    def pool(self):
        if self._recorder is None:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def replay(self):
        refuse_in_capture()
        assert self._recorder is not None, "nothing was captured"
        self._recorder.replay()


_alive: weakref.WeakSet = weakref.WeakSet()
_spoilt: set = set()  # pools in which a capture failed
_handles: list = []  # pools that were handed out
_under_way: list = []  # pools that the allocator thinks a capture fills


def graph_pool_handle():
    _handles.append((0, len(_handles) + 1))
    return _handles[-1]


def end_allocate_to_pool(device, pool):
    _under_way.remove(pool)


def release_pool(device, pool):
    assert pool in _handles


@contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    pool = pool or graph_pool_handle()
    assert not _under_way, "the allocator thinks that a capture is under way"
    used = [other for other in _alive if other.pool() == pool]
    assert pool in _handles and pool not in _spoilt and (used or pool == _handles[-1]), "a pool that is none"
    _under_way.append(pool)
    before = current_stream()
    here.stream, here.recorder = stream or Stream(), Capture()
    generator.in_capture = True
    error = None
    try:
        with here.recorder as recorder:
            yield
    except torch.OutOfMemoryError as raised:  # nothing that a capture does not survive: it ends well
        error = raised
    except BaseException:  # PyTorch's leaves its stream behind too
        _spoilt.add(pool)
        raise
    finally:
        here.recorder = None
    here.stream, generator.in_capture = before, False
    _under_way.remove(pool)
    cuda_graph._pool = pool
    cuda_graph._recorder = recorder
    _alive.add(cuda_graph)
    if error is not None:
        raise error
