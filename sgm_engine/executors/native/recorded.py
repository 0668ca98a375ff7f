"""Any module as layers of the native executor: the aten calls of one run of it, walked once.

What depends on the level alone (embeddings, tables of sigmas, networks of the time) is no part of the walk: it is
evaluated for every level when weights are packed, and becomes a table (program.py). Views move nothing (layout.py). The
rest are calls that handlers.py and the files it names know as layers.
"""

from __future__ import annotations

import torch
from torch import nn

from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.handlers import HANDLERS
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.program import Program
from sgm_engine.executors.native.walk import Walk
from sgm_engine.models.score_model import NotAScore
from sgm_engine.rewriting.altered import in_training
from sgm_engine.rewriting.recognise import FusedNorm, recognise
from sgm_engine.rewriting.record import Untraceable, record

BATCH = 3  # images of the recorded run; no size is told from another by it


def lower_recorded(graph: Graph, model: nn.Module, shape: tuple[int, int, int], levels: int) -> Program:
    """Emit the layers of ``model`` for x [*shape], level in [0, levels); what makes its tables.

    Raises Unsupported for what has no layer.
    """
    if reason := _unfit(model):
        raise Unsupported(reason)
    random = torch.Generator("cpu").manual_seed(1)
    x = torch.rand(BATCH, *shape, generator=random, dtype=torch.float32, device="cpu")
    level = torch.arange(BATCH, device="cpu") % levels
    try:
        recording = record(model, own_norms(model), x, level)
    except Untraceable as reason:
        raise Unsupported(str(reason)) from reason
    except NotAScore:
        raise
    except Exception as error:  # whatever the user's forward does that it cannot do in evaluation mode
        raise Unsupported(f"its forward raises {type(error).__name__}: {str(error)[:120]}") from error
    own = {id(p) for p in model.parameters()}
    if any(isinstance(t, nn.Parameter) and id(t) not in own for t in recording.outside([recording.output])):
        raise Unsupported("it reads parameters that are not its own: pass the nn.Module that holds them")
    try:
        walk = Walk(graph, recording, shape, levels, HANDLERS)
        walk.run()
    except Unsupported:
        raise
    except ValueError as reason:  # of the C++: a shape that has no layer
        raise Unsupported(str(reason)) from reason
    return walk.program


def _unfit(model: nn.Module) -> str | None:
    """Why a recorded run would not be what the module computes in float32 on the CPU."""
    if (modal := in_training(model)) is not None:
        return f"{modal} is in training mode: call model.eval() first"
    for p in model.parameters():
        if p.device.type != "cpu" or (p.is_floating_point() and p.dtype != torch.float32):
            return f"its parameters must be float32 on the CPU, and one is {p.dtype} on {p.device}"
    return None


def own_norms(model: nn.Module) -> set[nn.Module]:
    """Norms that ``recognise`` knows and aten has no call for."""
    found = {m: recognise(m) for m in model.modules()}
    return {
        m for m, norm in found.items() if isinstance(norm, FusedNorm) and (norm.conditional or "alpha" in norm.roles)
    }


def has_own_norms(model: nn.Module) -> bool:
    return bool(own_norms(model))
