"""Weights of convolutions on a GPU lie as the images do: no convolution copies them at every step."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sgm_engine.executors.network import Network
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.schedule import geometric
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.rewrite import widened

CUDA = torch.device("cuda", 0)  # nothing here reaches it: the weights stay where they are made


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(geometric(1, 0.1, 3), channels=1, ngf=4, image_size=8).eval()


class Seen(TorchFunctionMode):
    """The weights that convolutions are given."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d:
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


def evaluate(network, x, level):
    """The score, and the weights that its convolutions were given."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=network._half is not None)  # in place of a GPU's
    with Seen() as seen, half, network._mode, torch.no_grad():
        return network.forward_module(x, level), seen.weights


@pytest.mark.parametrize("fast", [False, True], ids=["as it is", "accelerated"])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_weights_of_float32_are_channels_last_and_follow_the_module(net, precision, fast):
    model, x, level = accelerate(net) if fast else net, torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        model(x, level)  # traced here: a network would do it on the device
    network = Network(model, precision, CUDA)
    network.sync()
    held = [t.data_ptr() for t in network.tensors()]
    for _ in range(2):
        score, weights = evaluate(network, x, level)
        assert len(weights) > 20 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        torch.testing.assert_close(score, net(x, level), rtol=1e-4, atol=1e-4)
        assert not net.end_conv.weight.is_contiguous(memory_format=torch.channels_last), "the user's keeps its own"
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)
        network.sync()
    assert [t.data_ptr() for t in network.tensors()] == held, "in place: no graph is captured again"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_so_is_the_kernel_that_takes_in_a_mean(net, precision):
    """It is derived from a weight, follows it, and is in 16 bits once, not at every step."""
    model, x, level = accelerate(net), torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        model(x, level)
    network = Network(model, precision, CUDA)
    weight = net.res2[0].conv2.conv.weight
    for _ in range(2):
        network.sync()
        (kernel,) = (w for w in evaluate(network, x, level)[1] if w.shape[-1] == 4)
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(kernel, widened(weight).to(getattr(torch, precision)))
        with torch.no_grad():
            weight.mul_(1.1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.source.res2[0].conv2.conv.weight.mul_(2)
        torch.testing.assert_close(other(x, level), other.source(x, level), rtol=1e-4, atol=1e-4)


def test_a_module_that_lies_so_already_is_read_where_it_lies(net):
    net = net.to(memory_format=torch.channels_last)
    network = Network(net, "float32", CUDA)
    network.sync()
    assert network.forward_module is net and network._casts == []


def test_a_cpu_reads_the_module_itself(net):
    network = Network(net, "float32", torch.device("cpu"))
    network.sync()
    assert network.forward_module is net and network._casts == []
