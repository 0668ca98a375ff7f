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


def make_executor(name: str, network: Network, batch: int, graph: GraphConfig | None = None) -> Executor:
    """The executor called ``name``. "auto": "graph" on a GPU; on a CPU the first that can of native, hybrid and eager.

    batch: of the slots that it is bound to first. "auto" warns if a network of convolutions is not native on a CPU.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {EXECUTORS}, got {name!r}")
    device = network.device
    native = None  # the executor, or why it is not native
    if name == "auto" and device.type == "cuda":
        name = "graph"
    elif name == "auto":
        native = _native(network, batch)
        name = _beside_native(network, native) if isinstance(native, str) else "native"
    if network.precision == "direct" and name != "native":
        why = native or _native(network, batch)
        why = f"which cannot run this model: {why}" if isinstance(why, str) else f"not {name!r}"
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

        return native or NativeExecutor()
    if name == "hybrid":
        from sgm_engine.executors.hybrid import HybridExecutor

        return HybridExecutor(native)
    return EagerExecutor()


def next_best(name: str, network: Network, reason: str) -> Iterator[Executor]:
    """What may run the network where executor ``name`` cannot, for ``reason``: best first."""
    if name == "native" and network.precision == "float32" and network.module is not None:
        from sgm_engine.executors.hybrid import HybridExecutor

        yield HybridExecutor(reason)
    if name != "eager" and network.precision != "direct":
        yield EagerExecutor()


def _beside_native(network: Network, reason: str) -> str:
    """The name of the executor that runs, on a CPU, what "native" cannot for ``reason``."""
    if network.precision == "direct" or network.module is None:
        return "eager"
    if not any(isinstance(m, torch.nn.Conv2d) for m in network.module.modules()):
        return "eager"
    from sgm_engine.executors.hybrid import hybrid_refusal

    name = "hybrid" if hybrid_refusal(network) is None else "eager"
    warnings.warn(f"executor='native' cannot run this model: {reason}; executor={name!r} runs it", stacklevel=4)
    return name


def _native(network: Network, batch: int) -> Executor | str:
    """The native executor, or why it cannot run the network."""
    from sgm_engine.executors.native.executor import NativeExecutor

    if network.device.type != "cpu":
        return f"it is on {network.device}"
    network.observed  # noqa: B018 - from before anything is made of it
    return NativeExecutor.of(network, batch)
