"""Which executor runs a network: the one that is named, or the best that can."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.protocol import Executor

if TYPE_CHECKING:
    from sgm_engine.executors.graphs import GraphConfig

EXECUTORS = ("auto", "eager", "native", "hybrid", "graph")


def make_executor(name: str, network: Network, graph: GraphConfig | None = None) -> Executor:
    """The executor called ``name``. "auto": "graph" on a GPU; on a CPU the first that can of native, hybrid and eager.

    "auto" warns if a network of convolutions is not native on a CPU.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {EXECUTORS}, got {name!r}")
    device = network.device
    reason = None  # why it is not native
    if name == "auto":
        name, reason = ("graph", None) if device.type == "cuda" else _best_on_cpu(network)
    if network.precision == "direct" and name != "native":
        why = f"which cannot run this model: {why}" if (why := _native_refusal(network)) else f"not {name!r}"
        raise ValueError(
            f"precision='direct', float32 without Winograd, needs executor='native', {why}; use precision='float32'"
        )
    if name == "graph":
        if device.type != "cuda":
            raise ValueError(
                f"executor='graph' needs a CUDA device, got {device}: use executor='eager' or device='cuda'"
            )
        from sgm_engine.executors.graphs import CudaGraphs, GraphConfig, GraphExecutor

        graph = graph or GraphConfig()
        return GraphExecutor(CudaGraphs(device, graph.benchmark), graph.unroll)
    if graph is not None:
        raise ValueError(f"graph={graph} is for executor='graph', and this engine runs {name!r}: leave it out")
    if name == "native":
        from sgm_engine.executors.native.executor import NativeExecutor

        return NativeExecutor()
    if name == "hybrid":
        from sgm_engine.executors.hybrid import HybridExecutor

        return HybridExecutor(reason)
    return EagerExecutor()


def next_best(name: str, network: Network, reason: str) -> Iterator[Executor]:
    """What may run the network where executor ``name`` cannot, for ``reason``: best first."""
    if name == "native" and network.precision == "float32" and network.module is not None:
        from sgm_engine.executors.hybrid import HybridExecutor

        yield HybridExecutor(reason)
    if name != "eager" and network.precision != "direct":
        yield EagerExecutor()


def _best_on_cpu(network: Network) -> tuple[str, str | None]:
    """The name of an executor, and why it is not "native"."""
    reason = _native_refusal(network)
    if reason is None or network.precision == "direct":
        return ("native" if reason is None else "eager"), reason
    name = "eager"
    if network.module is not None and any(isinstance(m, torch.nn.Conv2d) for m in network.module.modules()):
        from sgm_engine.executors.hybrid import hybrid_refusal

        name = "hybrid" if hybrid_refusal(network) is None else "eager"
        warnings.warn(f"executor='native' cannot run this model: {reason}; executor={name!r} runs it", stacklevel=4)
    return name, reason


def _native_refusal(network: Network) -> str | None:
    """Why the native executor cannot run it, None if it can."""
    from sgm_engine.executors.native.executor import refusal

    if network.device.type != "cpu":
        return f"it is on {network.device}"
    return refusal(network.model, network.precision, network.shape, network.levels)
