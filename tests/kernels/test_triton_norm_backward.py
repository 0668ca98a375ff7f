"""The Triton kernel of GroupNorm's gradient, under Triton's interpreter where there is no GPU."""

import itertools

import torch

from sgm_engine.kernels import reference
from sgm_engine.kernels.triton import norm_backward as triton_norm_backward
from tests.interpreter import DEVICE, run_interpreted
from tests.kernels.test_norm_backward import check, check_nan, launch, tensors


def test_every_variant():
    for (shape, groups), activation in itertools.product(
        [((2, 6, 5, 7), 3), ((1, 4, 80, 70), 1), ((2, 3, 1, 1), 3)], reference.ACTIVATIONS
    ):
        x, dy, gamma, beta = (t.to(DEVICE) for t in tensors(shape, torch.float32))
        found = launch(x, dy, gamma, beta, activation, groups, triton_norm_backward.norm_backward)
        check(found, x, dy, gamma, beta, activation, groups)


def test_without_parameters_and_in_half():
    x, dy, _, _ = (t.to(DEVICE) for t in tensors((2, 8, 6, 6), torch.bfloat16))
    found = launch(x, dy, None, None, "silu", 4, triton_norm_backward.norm_backward)
    check(found, x, dy, None, None, "silu", 4)


def test_nan_is_not_hidden():
    check_nan(triton_norm_backward.norm_backward, DEVICE)


run_interpreted(globals())
