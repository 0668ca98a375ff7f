"""Whether a network of this package is what its configuration builds: the quick answer, which is nearly always yes."""

from __future__ import annotations

import torch
from torch import nn

from sgm_engine.jobs.objects import PLAIN
from sgm_engine.rewriting.altered import MODAL, altered

OF_MODULES = {*vars(nn.Module()), "training"}
NOTES = ("plan", "front", "law", "averaged")  # of networks of this package: recommendations, where they come from
KEPT = 8
_BUILT: dict[tuple[type, str], nn.Module] = {}  # on meta, by configuration: the last few


def as_built(part: nn.Module, config) -> bool:
    """True: each layer has the class, the plain attributes and the methods that ``config`` builds it with, and no more.

    False says nothing: an attribute that is no number or text, say, is not looked at.
    """
    layers, built = dict(part.named_modules()), dict(_built(config).named_modules())
    return layers.keys() == built.keys() and all(
        _same(layer, built[name], part.training) for name, layer in layers.items()
    )


def _built(config) -> nn.Module:
    key = type(config), config.to_json()
    if key not in _BUILT:
        with torch.device("meta"):
            found = config.build()
        for old in list(_BUILT)[: len(_BUILT) - KEPT + 1]:
            _BUILT.pop(old, None)
        _BUILT[key] = found
    return _BUILT[key]


def _same(layer: nn.Module, built: nn.Module, training: bool) -> bool:
    if type(layer) is not type(built) or altered(layer) or (isinstance(layer, MODAL) and layer.training != training):
        return False
    ours, usual = vars(layer), vars(built)
    return all(
        name in ours and name in usual and _equal(ours[name], usual[name])
        for name in (ours.keys() | usual.keys()) - OF_MODULES.union(NOTES)
    )


def _equal(a: object, b: object) -> bool:
    """Of numbers, texts, and lists and tuples of them: whether they are the same ones, of the same types."""
    if type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, PLAIN) and (repr(a) == repr(b) if type(a) is float else a == b)
