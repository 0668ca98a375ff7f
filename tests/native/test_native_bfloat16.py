"""bfloat16 in the native executor on every instruction set: the bits of one layer, networks against the originals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine import _C
from sgm_engine.executors.native.executor import NativeNetwork, refusal
from tests.models.test_models import GOLDEN, golden
from tests.native.layers import relative_error, run_layers
from tests.native.test_native_networks import tiny


def exact(*shape):
    """Numbers of 11 bits: bfloat16 keeps 8, so that many are ties. Sums of their products are exact in float64."""
    return torch.randint(-1024, 1025, shape) / 512 * 2.0 ** torch.randint(-4, 5, shape)


def in_order(x, weight):
    """The convolution, padded to keep the size, as vdpbf16ps sums it: taps row by row; of each pair of channels the
    second, then the first; every product exact, every sum rounded to float32."""
    n, c_in, height, width = x.shape
    taps = weight[0, 0].numel()
    patches = F.unfold(x.bfloat16().double(), weight.shape[2:], padding=weight.shape[2] // 2)
    patches = patches.unflatten(1, (c_in, taps))
    w = weight.bfloat16().double().flatten(2)
    total = torch.zeros(n, len(w), height * width)
    for tap in range(taps):
        for c in (c for first in range(0, c_in, 2) for c in (first + 1, first) if c < c_in):
            product = w[None, :, c, tap, None] * patches[:, None, c, tap]
            total = (total.double() + product).float()
    return total.unflatten(2, (height, width))


def one_layer(x, weight):
    conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], padding=weight.shape[2] // 2, bias=False)
    conv.weight.data.copy_(weight)
    return run_layers(lambda g, v: g.conv(g.activate(v, "none"), conv), x, precision="bfloat16")


@pytest.mark.parametrize(("c_in", "c_out", "kernel"), [(19, 37, 1), (6, 64, 5), (1, 5, 1), (33, 16, 7)])
def test_every_bit_of_a_layer(isa, c_in, c_out, kernel):
    """The same on every instruction set, whether it multiplies pairs or expands them. Blocks of 1, 2 and 4 vectors."""
    torch.manual_seed(0)
    x, weight = exact(2, c_in, 5, 7), exact(c_out, c_in, kernel, kernel)
    assert torch.equal(one_layer(x, weight), in_order(x, weight))


def test_what_is_not_finite_stays_so(isa):
    """A NaN whose payload would round away to a number, and what overflows bfloat16, each in one pixel."""
    x = torch.ones(1, 2, 2, 2)
    x[0, 0, 0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x[0, 1, 1, 1] = 3.4e38
    y = one_layer(x, torch.ones(1, 2, 1, 1))[0, 0]
    assert y.isfinite().tolist() == [[False, True], [True, False]]
    assert y[0, 1] == y[1, 0] == 2


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    cls, kwargs = GOLDEN[name]
    model, x, level, want = golden(name, cls, **kwargs)
    assert 1e-4 < relative_error(NativeNetwork(model, len(x), *x.shape[2:], "bfloat16")(x, level), want) < 3e-2


def test_golden_on_every_instruction_set(isa):
    cls, kwargs = GOLDEN["ncsn_28_ngf8"]
    model, x, level, want = golden("ncsn_28_ngf8", cls, **kwargs)
    assert refusal(model, "bfloat16") is None
    assert 1e-4 < relative_error(NativeNetwork(model, 3, 28, 28, "bfloat16")(x, level), want) < 3e-2


@pytest.mark.skipif("avx512_bf16" not in _C.isas(), reason="needs a CPU with AVX512_BF16")
def test_a_network_has_the_same_bits_with_and_without_the_instruction():
    """Of AVX-512: lesser sets differ in the width of a vector, and so in the statistics of a norm."""
    model, before = tiny(ngf=20, size=12), _C.isa()
    x, level = torch.rand(3, 1, 12, 12), torch.arange(3)
    found = []
    try:
        for name in ("avx512", "avx512_bf16"):
            _C.set_isa(name)
            found.append(NativeNetwork(model, 3, 12, 12, "bfloat16")(x, level))
    finally:
        _C.set_isa(before)
    assert torch.equal(*found)
