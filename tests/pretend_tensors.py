"""Tensors of the pretended device (pretend_cuda.py): which they are, and what PyTorch's functions make of them."""

import math
import threading
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 2**30

_there: dict[int, StorageWeakRef] = {}  # storages on the device, by address, which a reference keeps from serving again
_PUTTING = threading.Lock()
here = threading.local()  # .stream, .recorder of a capture


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
        with _PUTTING:  # an address that another thread has just taken off the list may be a new storage's
            if len(_there) > 10_000:
                for key in [key for key, found in list(_there.items()) if found.expired()]:
                    _there.pop(key, None)
            _there[storage._cdata] = StorageWeakRef(storage)
    return x


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def capturing() -> bool:
    return getattr(here, "recorder", None) is not None


# Functions that may be given tensors of both devices, and those that say nothing of a device.
MIXED = {"copy_", "__getitem__", "__setitem__", "index_put_", "type_as", "_has_compatible_shallow_copy_type"}
PLAIN = {"dim", "size", "stride", "numel", "is_contiguous", "is_floating_point", "element_size", "data_ptr", "tolist"}
PLAIN |= {"__set__", "__delete__"}
COPY_IN_CAPTURE = "Cannot copy between CPU and CUDA tensors during CUDA graph capture"


generator = SimpleNamespace(in_capture=False)  # PyTorch's, of the device: after a capture that failed it still is
RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "normal_", "uniform_"}


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
        if name in RANDOM and generator.in_capture and not capturing() and (there or is_cuda(kwargs.get("device"))):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
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
