"""Random models, and one random change of what decides their samples: attribute, container, class, closure, hook …"""

import types

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LEVELS = (1.0, 0.4, 0.1)
SHAPE = (2, 8, 8)
GAIN = 1.0  # a global that forwards read
SETTINGS = types.SimpleNamespace(gain=1.0, nested={"shift": [0.0, 0.0]})


def helper(h):
    return h * GAIN + SETTINGS.nested["shift"][1]


class Config:
    """As a user's: fields, one of them a list, one another object."""

    def __init__(self):
        self.scale, self.terms, self.inner = 1.0, [0.5, 1.0], types.SimpleNamespace(power=1)


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 1.0


class Block(nn.Module):
    bend = 1.0  # a class attribute

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width)
        self.mix = 0.5

    def forward(self, x):
        return x + self.mix * self.bend * self.conv(F.silu(self.norm(x)))


class Model(nn.Module):
    """kind "closed" also calls a closure, which is not traced, and reads a NumPy array."""

    shape = SHAPE
    tilt = 0.0

    def __init__(self, seed, kind):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.kind, width = kind, 8 + 4 * (seed % 2)
            self.first, self.last = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
            self.blocks = nn.ModuleList(Block(width) for _ in range(1 + seed % 2))
            self.embed = nn.Embedding(len(LEVELS), width)
            self.register_buffer("sigmas", torch.tensor(LEVELS))
            self.register_buffer("offset", torch.zeros(1))
        self.gain, self.label, self.config, self.table = 1.0, 0, Config(), {"a": 1.0, "b": [0.0, 2.0]}
        self.plain, self.slotted, self.array = torch.ones(1), Slotted(), np.ones(1, np.float32)
        self.closure = closure()[0] if kind == "closed" else None
        self.branch = False

    def forward(self, x, level):
        c = self.config
        h = self.first(x) * c.scale + c.terms[self.label] + self.embed(level)[:, :, None, None] + self.offset
        for block in self.blocks:
            h = block(h)
        h = helper(h) * self.table["a"] + self.table["b"][0] + self.tilt
        if self.kind == "closed":
            h = self.closure(h) * float(self.array[0])
        if self.branch:
            h = -h
        h = h * self.plain * self.slotted.factor * SETTINGS.gain * self.gain * c.inner.power
        return self.last(F.silu(h)) / self.sigmas[level][:, None, None, None]


def closure():
    """A function over a number, and what sets it."""
    strength = 1.0

    def call(h):
        return h * strength

    def put(value):
        nonlocal strength
        strength = value

    call.put = put
    return call, put


def double(module, args, out):
    return out * 1.5


def _replace_forward(module):
    original = module.forward
    module.forward = lambda x: original(x) * 1.5


def _on_class(kind, name, value, undo):
    before = vars(kind)[name]
    setattr(kind, name, value(before))
    undo.append(lambda: setattr(kind, name, before))


def _in(holder, key, value, undo):
    before = holder[key]
    holder[key] = value
    undo.append(lambda: holder.__setitem__(key, before))


def _everywhere(undo):
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: o * 1.5 if isinstance(m, nn.Conv2d) else None
    )
    undo.append(handle.remove)


def _no_grad(action):
    def run(model, undo, value):
        with torch.no_grad():
            action(model, value)

    return run


# name → (model, undo, value in 1.2 … 2): changes something, puts into ``undo`` what a model does not own
MUTATIONS = {
    "float": lambda m, u, v: setattr(m, "gain", v),
    "int": lambda m, u, v: setattr(m, "label", 1),
    "flag": lambda m, u, v: setattr(m, "branch", True),
    "attribute of a part": lambda m, u, v: setattr(m.blocks[0], "mix", v),
    "config's field": lambda m, u, v: setattr(m.config, "scale", v),
    "config's list": lambda m, u, v: m.config.terms.__setitem__(0, v),
    "config's config": lambda m, u, v: setattr(m.config.inner, "power", v),
    "another config": lambda m, u, v: (setattr(m, "config", Config()), setattr(m.config, "scale", v)),
    "slot": lambda m, u, v: setattr(m.slotted, "factor", v),
    "entry": lambda m, u, v: m.table.__setitem__("a", v),
    "entry of an entry": lambda m, u, v: m.table["b"].__setitem__(0, v),
    "longer list": lambda m, u, v: m.table["b"].insert(0, v),
    "tensor replaced": lambda m, u, v: setattr(m, "plain", torch.full((1,), v)),
    "tensor filled": _no_grad(lambda m, v: m.plain.fill_(v)),
    "tensor through data": lambda m, u, v: m.plain.data.fill_(v),
    "tensor through NumPy": lambda m, u, v: m.plain.numpy().fill(v),
    "array": lambda m, u, v: m.array.fill(v),
    "closure": lambda m, u, v: m.closure and m.closure.put(v),
    "global": lambda m, u, v: _in(globals(), "GAIN", v, u),
    "global function": lambda m, u, v: _in(globals(), "helper", lambda h: h * v, u),
    "global config": lambda m, u, v: (u.append(lambda: setattr(SETTINGS, "gain", 1.0)), setattr(SETTINGS, "gain", v)),
    "global container": lambda m, u, v: _in(SETTINGS.nested["shift"], 1, v, u),
    "class attribute": lambda m, u, v: _on_class(Block, "bend", lambda _: v, u),
    "attribute of the class": lambda m, u, v: _on_class(Model, "tilt", lambda _: v, u),
    "method of the class": lambda m, u, v: _on_class(Block, "forward", lambda f: lambda s, x: f(s, x) * v, u),
    "class of a part": lambda m, u, v: setattr(m.blocks[0], "__class__", type("Other", (Block,), {"bend": v})),
    "Conv2d.forward": lambda m, u, v: _on_class(nn.Conv2d, "forward", lambda f: lambda s, x: f(s, x) * v, u),
    "Conv2d._conv_forward": lambda m, u, v: _on_class(
        nn.Conv2d, "_conv_forward", lambda f: lambda s, *a: f(s, *a) * v, u
    ),
    "hook": lambda m, u, v: m.first.register_forward_hook(double),
    "pre-hook": lambda m, u, v: m.last.register_forward_pre_hook(lambda s, a: (a[0] * v,)),
    "hook of the model": lambda m, u, v: m.register_forward_hook(double),
    "hook of all": lambda m, u, v: _everywhere(u),
    "forward of a part": lambda m, u, v: _replace_forward(m.blocks[0]),
    "forward of a layer": lambda m, u, v: _replace_forward(m.last),
    "padding": lambda m, u, v: (setattr(m.first, "padding_mode", "circular"),
                                setattr(m.first, "_reversed_padding_repeated_twice", [1, 1, 1, 1])),
    "stride and padding": lambda m, u, v: (setattr(m.first, "dilation", (2, 2)), setattr(m.first, "padding", (2, 2))),
    "eps": lambda m, u, v: setattr(m.blocks[0].norm, "eps", v),
    "activation": lambda m, u, v: _in(vars(F), "silu", F.relu, u),
    "layer replaced": lambda m, u, v: setattr(m, "last", nn.Conv2d(m.last.in_channels, 2, 1)),
    "layer added": lambda m, u, v: m.blocks.append(Block(m.last.in_channels)),
    "parameter replaced": lambda m, u, v: setattr(m.first, "weight", nn.Parameter(m.first.weight.detach() * v)),
    "parameter changed": _no_grad(lambda m, v: m.first.weight.mul_(v)),
    "buffer replaced": lambda m, u, v: setattr(m, "offset", torch.full((1,), v)),
    "buffer changed": _no_grad(lambda m, v: m.offset.add_(v)),
    "mode with dropout": lambda m, u, v: setattr(m, "first", nn.Sequential(m.first, nn.Dropout(0.5)).train()),
    "drawing": lambda m, u, v: m.last.register_forward_hook(lambda s, a, o: o + torch.randn_like(o)),
}  # fmt: skip
