"""images.py: the conversion to bytes, grids and pictures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sgm_engine.outputs import images


def test_to_uint8_rounds_to_nearest_and_clamps():
    x = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1.0, 7.0]).reshape(1, 1, 2, 4)
    assert images.to_uint8(x).ravel().tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_to_uint8_inverts_bytes_in_any_float_dtype_and_layout():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(2, 3, 8, 16)
    for dtype in (torch.float32, torch.float64):
        x = (pixels.to(dtype) / 255).to(memory_format=torch.channels_last).requires_grad_()
        assert np.array_equal(images.to_uint8(x), pixels.permute(0, 2, 3, 1).numpy())
    assert images.to_uint8(pixels.numpy() / 255.0).shape == (2, 8, 16, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_to_uint8_refuses_what_a_cast_would_hide(bad):
    x = torch.zeros(5, 1, 4, 4)
    x[3, 0, 2, 1] = bad
    with pytest.raises(ValueError, match="1 of 5 samples hold NaN or infinity, first at index 3"):
        images.to_uint8(x)


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)])
def test_to_uint8_refuses_other_shapes_and_dtypes(x):
    with pytest.raises(ValueError, match="must be floating point"):
        images.to_uint8(x)


@given(
    n=st.integers(1, 12), h=st.integers(1, 5), w=st.integers(1, 5), c=st.sampled_from([1, 3]),
    columns=st.none() | st.integers(1, 14), pad=st.integers(0, 3),
)  # fmt: skip
def test_grid_holds_every_image_once_in_reading_order(n, h, w, c, columns, pad):
    pixels = np.random.default_rng(n).integers(1, 256, (n, h, w, c), dtype=np.uint8)
    sheet = images.grid(pixels, columns, pad)
    across = columns or int(np.ceil(np.sqrt(n)))
    assert sheet.shape == (-(-n // across) * (h + pad) + pad, across * (w + pad) + pad, c)
    for i, image in enumerate(pixels):
        top, left = i // across * (h + pad) + pad, i % across * (w + pad) + pad
        assert np.array_equal(sheet[top : top + h, left : left + w], image)
    assert np.count_nonzero(sheet) == pixels.size  # and nothing else


@pytest.mark.parametrize("call", [{"columns": 0}, {"pad": -1}])
def test_grid_names_a_bad_argument(call):
    with pytest.raises(ValueError, match=r"columns=0|pad=-1"):
        images.grid(np.zeros((2, 4, 4, 1), np.uint8), **call)


def test_pictures_have_one_or_three_channels():
    with pytest.raises(ValueError, match="1 or 3 channels, these samples have 2"):
        images.grid(np.zeros((2, 4, 4, 2), np.uint8))
    with pytest.raises(ValueError, match="0 images"):
        images.grid(np.zeros((0, 4, 4, 1), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (6, 9, channels), dtype=np.uint8)
    images.save_png(tmp_path / "any.tmp", image)
    with Image.open(tmp_path / "any.tmp") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture).reshape(image.shape), image)


def test_gif_plays_every_frame_in_order(tmp_path):
    frames = [np.full((8, 8, 1), level, np.uint8) for level in (0, 80, 160, 255)]
    images.save_gif(tmp_path / "a.gif", frames, seconds=2, hold=1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)
        seen, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            seen.append(int(np.asarray(gif.convert("L"))[0, 0]))
            durations.append(gif.info["duration"])
    assert seen == [0, 80, 160, 255]
    assert durations == [500, 500, 500, 1000]
