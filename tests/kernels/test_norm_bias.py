"""ops.inference_norm with the biases of the convolutions before it, on the CPU, against float64."""

import itertools

import pytest
import torch

from sgm_engine.kernels import ops, reference
from tests.kernels.norms import embedding, images, worst

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def biases(channels):
    return (3 * torch.randn(channels, generator=torch.Generator().manual_seed(i)) for i in (7, 8))


@pytest.mark.parametrize("before", ["none", "elu"])
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases(dtype, groups, before):
    for layout, added, pool in itertools.product(LAYOUTS, (False, True), (False, True)):
        x = images((2, 12, 7, 5), dtype, layout, mean=1.0)
        residual = images(x.shape, dtype, layout, seed=5) if added else None
        gamma, alpha, beta = embedding(4, 12)
        bias, residual_bias = biases(12)
        options = {
            "level": torch.tensor([3, 0]),
            "residual": residual,
            "groups": groups,
            "before": before,
            "pool": pool,
        }
        options |= {"bias": bias, "residual_bias": residual_bias if added else None}
        rows = (gamma, None if groups else alpha, beta)
        found = ops.inference_norm(x, *rows, **options)

        def formula(dtype, rows=rows, x=x, options=options):
            given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k != "level" else v for k, v in options.items()}
            y = reference.noise_conditioned_norm(x.to(dtype), *(p if p is None else p.to(dtype) for p in rows), **given)
            return y if isinstance(y, tuple) else (y,)

        found = found if isinstance(found, tuple) else (found,)
        exact, measure = formula(torch.float64), formula(torch.float32)
        assert len(found) == len(exact) == 1 + (added or before != "none")
        rounded = torch.finfo(dtype).eps * exact[-1].abs().max().item()  # of what is normalised, which is of x's dtype
        for y, e, m in zip(found, exact, measure, strict=True):
            assert y.dtype == dtype and y.stride() == x.stride()
            assert worst(y, e) <= 2 * worst(m.to(dtype), e) + (2e-6 if dtype == torch.float32 else 2 * rounded)


def test_what_is_refused():
    x = images((1, 6, 3, 3))
    with pytest.raises(ValueError, match="residual_bias must be None without residual"):
        ops.inference_norm(x, residual_bias=torch.zeros(6))
    with pytest.raises(ValueError, match=r"bias must have shape \[6\]"):
        ops.inference_norm(x, bias=torch.zeros(5))
    with pytest.raises(TypeError, match="bias must be float32"):
        ops.inference_norm(x, bias=torch.zeros(6, dtype=torch.bfloat16))
