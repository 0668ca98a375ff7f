"""Whether a network of this package is what its configuration builds: the quick answer, which is nearly always yes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from sgm_engine.jobs.objects import PLAIN
from sgm_engine.rewriting.altered import MODAL, altered

OF_MODULES = {*vars(nn.Module()), "training"}
NOTES = ("plan", "front", "law", "averaged")  # of networks of this package: recommendations, where they come from
IGNORED = frozenset(OF_MODULES.union(NOTES))
KEPT = 8


class _Layer(NamedTuple):
    kind: type
    names: set[str]
    compared: list[tuple[str, object]]


_BUILT: dict[tuple[type, str], dict[str, _Layer]] = {}  # by configuration: the last few


def as_built(part: nn.Module, config) -> bool:
    """True: each layer has the class, the plain attributes and the methods that ``config`` builds it with, and no more.

    False says nothing: an attribute that is no number or text, say, is not looked at.
    """
    layers, built, classes = dict(part.named_modules()), _built(config), {}
    return layers.keys() == built.keys() and all(
        _same(layer, built[name], part.training, classes) for name, layer in layers.items()
    )


def _built(config) -> dict[str, _Layer]:
    key = type(config), config.to_json()
    if key not in _BUILT:
        with torch.device("meta"):
            modules = config.build().named_modules()
        for old in list(_BUILT)[: len(_BUILT) - KEPT + 1]:
            _BUILT.pop(old, None)
        _BUILT[key] = {name: _layer(module) for name, module in modules}
    return _BUILT[key]


def _layer(module: nn.Module) -> _Layer:
    own = vars(module)
    return _Layer(type(module), set(own), [(name, value) for name, value in own.items() if name not in IGNORED])


def _same(layer: nn.Module, built: _Layer, training: bool, classes: dict) -> bool:
    if type(layer) is not built.kind or altered(layer, classes):
        return False
    if isinstance(layer, MODAL) and layer.training != training:
        return False
    ours = vars(layer)
    return ours.keys() ^ built.names <= IGNORED and all(_equal(ours[name], value) for name, value in built.compared)


def _equal(a: object, b: object) -> bool:
    """Of numbers, texts, and lists and tuples of them: whether they are the same ones, of the same types."""
    if type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, PLAIN) and (repr(a) == repr(b) if type(a) is float else a == b)
