"""A network recorded as it runs, whatever its forward does on the way: lowered, against float64."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine import _C
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.recorded import lower_recorded
from sgm_engine.models.score_model import as_score
from tests.native.layers import relative_error
from tests.native.recorded_networks import MIDDLES, Around


def recorded(model, levels=4, batch=2):
    """By the recorded run alone: no other front takes over."""
    graph = Graph(batch, "float32")
    program = lower_recorded(graph, model, model.shape, levels)
    graph.plan()
    program.forget()

    def run(x, level):
        return graph.run(x, level, torch.full_like(x, float("nan")))

    def sync():
        graph.sync()
        program.forget()

    return run, sync


@torch.no_grad()
def exact(model, x, level):
    return copy.deepcopy(model).double()(x.double(), level)


def inputs(batch=5):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(batch) % 4


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_however_it_is_written(isa, middle):
    model = Around(middle).eval()
    x, level = inputs()
    want = exact(model, x, level) if middle.__name__ not in MAKES_FLOAT32 else model(x, level).double()
    run, _ = recorded(model)
    assert relative_error(run(x, level), want) < 5e-6


@torch.no_grad()
def test_a_last_layer_that_grows_the_image(isa):
    """A transposed convolution of stride 1 is one with a wider border, and the last layer as any other."""
    model = Around(lambda m, h, level: 0).eval()
    model.first, model.last = nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 3, 3)
    x, level = inputs()
    native = NativeNetwork(model, 2, 8, 8, channels=3, levels=4)
    assert len(native.graph.convs) == 2
    assert relative_error(native(x, level), exact(model, x, level)) < 1e-6


# Casts of their own, so that float64 is none.
MAKES_FLOAT32 = {
    "filtered", "in_place", "sinusoids_in_place", "heads_outside", "heads_interleaved", "channel_norms",
    "told_at_every_pixel", "magnitude_preserving",
}  # fmt: skip


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda f: f.__name__)
def test_every_parameter_is_followed(middle):
    model = Around(middle).eval()
    x, level = inputs()
    run, sync = recorded(model)
    for key, tensor in model.named_parameters():
        before = run(x, level)
        with torch.no_grad():
            tensor.mul_(1.5).add_(0.01)
            want = model(x, level)
        sync()
        after = run(x, level)
        assert relative_error(after, want.double()) < 1e-5, key
        assert relative_error(before, want.double()) < 1e-5 or not torch.equal(before, after), key


def test_the_same_bits_for_any_number_of_threads():
    x, level = inputs(7)
    run, _ = recorded(Around(MIDDLES[0]).eval())
    found = []
    before = _C.num_threads()
    try:
        for threads in (1, 2, 3):
            _C.set_num_threads(threads)
            found.append(run(x, level))
    finally:
        _C.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda f: f.__name__)
def test_memory_goes_with_the_network(middle):
    """What packs weights holds no graph: in a circle, its memory would wait for the garbage collector."""
    NativeNetwork(Around(middle).eval(), 1, 8, 8, channels=3, levels=4)  # what torch imports late keeps frames
    gc.collect()
    gc.disable()
    try:
        native = NativeNetwork(Around(middle).eval(), 1, 8, 8, channels=3, levels=4)
        graph = weakref.ref(native.graph)
        del native
        assert graph() is None
    finally:
        gc.enable()


def writes_a_part(m, h, level):
    out = torch.zeros_like(h)
    out[:, :8] = h[:, :8]
    return out


def asks_for_a_level(m, h, level):
    return h * float(level[0])


def keeps_count(m, h, level):
    m.sigmas += 1
    return h


def draws(m, h, level):
    return F.dropout(h, 0.5)


def by_batch(m, h, level):
    return h * torch.arange(len(h))[:, None, None, None]


def bakes_a_level_in(m, h, level):
    return h * (1 + level.numpy()[0])


def of_pixels(m, h, level):
    return h * torch.linspace(0, 1, 8)


REFUSED = {
    writes_a_part: "a part of an image that was changed in place",
    asks_for_a_level: "asks for values of its levels",
    keeps_count: "changes a tensor of its own in place",
    draws: "draws random numbers",
    by_batch: "differs from image to image",
    of_pixels: "varies within an image",
}


@pytest.mark.parametrize("middle", REFUSED, ids=lambda f: f.__name__)
def test_what_a_run_cannot_say_is_refused(middle):
    with pytest.raises(Unsupported, match=REFUSED[middle]):
        recorded(Around(middle).eval())


def test_a_level_that_was_baked_in_is_noticed():
    """numpy reads a level without a call that could be recorded: the network would be that of the recorded levels."""
    with pytest.raises(Unsupported, match="it would differ by"):
        NativeNetwork(Around(bakes_a_level_in).eval(), 2, 8, 8, channels=3, levels=4)


def test_parameters_of_others_are_refused():
    other = nn.Conv2d(3, 3, 3, padding=1)
    score = as_score(lambda x, sigma: other(x), "denoiser", sigmas=[1.0, 0.5])
    with pytest.raises(Unsupported, match=r"pass the nn\.Module that holds them"):
        NativeNetwork(score, 1, 8, 8, channels=3)


def test_weights_whose_values_chose_layers_are_watched():
    """A filter of equal taps is a mean of 2×2 pixels while its taps are equal."""

    class Pooled(Around):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("taps", torch.full((1, 1, 2, 2), 0.25))

        def forward(self, x, level):
            h = self.first(x)
            return self.last(
                F.interpolate(F.conv2d(h, self.taps.tile(16, 1, 1, 1), stride=2, groups=16), scale_factor=2)
            )

    model = Pooled().eval()
    x, level = inputs(2)
    native = NativeNetwork(model, 2, 8, 8, channels=3, levels=4)
    assert not native.stale() and relative_error(native(x, level), exact(model, x, level)) < 5e-6
    model.taps[0, 0, 0, 0] = 0.5
    assert native.stale()
    native = NativeNetwork(model, 2, 8, 8, channels=3, levels=4)
    assert relative_error(native(x, level), exact(model, x, level)) < 5e-6
