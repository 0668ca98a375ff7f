"""64 bits a tensor: any other content, order, shape or dtype has others, the same on every instruction set."""

import pytest
import torch
from torch import nn

from sgm_engine import _C
from sgm_engine.kernels.digest import digests


def one(t):
    return digests([t])[0]


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 1000, 65536 + 5, 700_000])
def test_every_word_counts(isa, size):
    x = torch.arange(size, dtype=torch.float32).sin()
    before, places = one(x), {0, size // 2, size - 1, min(size - 1, 64), min(size - 1, 65536)}
    for place in places:
        for change in (lambda v: -v - 1e-30, lambda v: v * (1 + 2**-23) + 1e-40):
            y = x.clone()
            y[place] = change(y[place])
            assert one(y) != before, place
    assert one(x.clone()) == before


def test_order_counts(isa):
    """Also for values that differ in their sign alone, and for words that meet in one lane of the digest."""
    x = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x[0, 0] = torch.tensor([1.0, -1.0, 1.0]).expand(3, 3)
    variants = [
        x,
        x.flip(0),
        x.flip(2, 3),
        x.flip(3),
        x.transpose(0, 1).contiguous(),
        -x,
        x.flatten().roll(64).view_as(x),
    ]
    assert len({one(v) for v in variants}) == len(variants)
    y = torch.zeros(256)
    y[0], y[64] = 1.0, -1.0
    assert one(y) != one(y.roll(64)) and one(y) != one(-y) and one(y) != one(torch.zeros(256))


def test_the_same_on_every_instruction_set_and_number_of_threads():
    x, before, found = (
        torch.randn(700_000, generator=torch.Generator().manual_seed(0)),
        (_C.isa(), _C.num_threads()),
        set(),
    )
    try:
        for name in _C.isas():
            for threads in (1, 3):
                _C.set_isa(name), _C.set_num_threads(threads)
                found.add(one(x))
    finally:
        _C.set_isa(before[0]), _C.set_num_threads(before[1])
    assert len(found) == 1


def test_shape_strides_and_dtype_count():
    x = torch.randn(2, 4, 4, 4)
    variants = [x, x.view(2, 4, 2, 8), x.to(memory_format=torch.channels_last), x.view(torch.int32), x.double(), x[:1]]
    assert len({one(v) for v in variants}) == len(variants)
    assert one(x[:, ::2]) == one(x.clone()[:, ::2]) and one(x[:, ::2]) != one(x[:, 1::2])  # with gaps
    assert one(torch.ones(()).expand(3)) == one(torch.ones(()).expand(3))
    assert one(nn.Parameter(x)) == one(x) and one(torch.empty(0)) is not None


def test_what_the_cpu_cannot_read():
    assert digests([torch.empty(3, device="meta"), torch.ones(2).to_sparse()]) == [None, None]
    assert digests([]) == []
