"""Whether a module is what its class says: a fused or packed layer takes its place, and would pass over the rest."""

from __future__ import annotations

import sys
from types import FunctionType

from torch import nn
from torch.nn.modules import module as every
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

OWN = ("torch.nn.", "sgm_engine.")
MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU, _SpectralNorm, SpectralNorm)


def altered(module: nn.Module, classes: dict[type, str | None] | None = None) -> str | None:
    """Why ``module`` does not compute what its class, one of torch.nn or of this package, was written to: None if so.

    Hooks of its own or of all modules; a method put in the place of its class's, on the object or on the class.
    classes: what was found of each class, for one look at many modules.
    """
    if hooked_everywhere() or module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    kind = type(module)
    for name, value in vars(module).items():
        if callable(value) and callable(getattr(kind, name, None)):
            return f"its {name} was replaced"
    classes = {} if classes is None else classes
    if kind not in classes:
        classes[kind] = _altered_class(kind)
    return classes[kind]


def _altered_class(kind: type) -> str | None:
    for base in kind.__mro__[:-1]:
        if base.__module__.startswith(OWN) and (name := _foreign(base)):
            return f"{base.__name__}.{name} was replaced"
    return None


def in_training(module: nn.Module) -> str | None:
    """The name of a part that computes something else in training mode and is in it, whatever its parents are in."""
    for name, part in module.named_modules():
        if part.training and (isinstance(part, MODAL) or any(map(_is_modal, part._forward_pre_hooks.values()))):
            return name or "the model"
        drops = isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) and part.dropout
        if part.training and (drops or (isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats)):
            return name or "the model"
    return None


def _is_modal(hook: object) -> bool:
    return isinstance(hook, MODAL)


def hooked_everywhere() -> bool:
    """Whether there are hooks of all modules (torch.nn.modules.module.register_module_forward_hook)."""
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks)


def _foreign(kind: type) -> str | None:
    """The name of a method of ``kind`` whose code is not in the file that defines it."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    for name in ("forward", "_conv_forward", "__call__", "_call_impl", "_forward_impl"):
        method = vars(kind).get(name)
        if isinstance(method, FunctionType) and file is not None and method.__code__.co_filename != file:
            return name
    return None
