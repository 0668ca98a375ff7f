"""Pictures: read without loss, or refused by the file's name; the same for training and for evaluation."""

import io

import numpy as np
import pytest
from PIL import Image

from sgm_engine.data.images import load_images
from sgm_engine.data.sets import from_array, open_images
from sgm_engine.files.pictures import decode_picture

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
OPAQUE, HALF = np.full((6, 8), 255, np.uint8), np.full((6, 8), 128, np.uint8)


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def palette(colours: np.ndarray, index: np.ndarray) -> Image.Image:
    """index uint8 [H, W] into colours uint8 [k, 3]."""
    picture = Image.fromarray(index, "P")
    picture.putpalette(colours.tobytes())
    return picture


def png16(values: np.ndarray) -> bytes:
    """uint16 [H, W] or [H, W, 3] as a PNG of 16 bits, which Pillow itself writes of greys only."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    h, w = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", w, h, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREYS = np.repeat(np.arange(0, 256, 17, dtype=np.uint8)[:, None], 3, 1)
INDEX = RNG.integers(0, 16, (6, 8), dtype=np.uint8)
EXACT = {
    "grey": (encoded(Image.fromarray(GREY)), GREY[..., None]),
    "RGB": (encoded(Image.fromarray(RGB)), RGB),
    "BMP": (encoded(Image.fromarray(RGB), "BMP"), RGB),
    "WebP": (encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "grey and opaque alpha": (encoded(Image.fromarray(np.dstack([GREY, OPAQUE]), "LA")), GREY[..., None]),
    "RGB and opaque alpha": (encoded(Image.fromarray(np.dstack([RGB, OPAQUE]), "RGBA")), RGB),
    "1 bit": (encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0)[..., None]),
    "palette of greys": (encoded(palette(GREYS, INDEX)), GREYS[INDEX][..., :1]),
    "palette of colours": (encoded(palette(RGB.reshape(-1, 3)[:16], INDEX)), RGB.reshape(-1, 3)[INDEX]),
    "16 bits that are 8": (png16(GREY.astype(np.uint16) * 257), GREY[..., None]),
    "turned by EXIF": (encoded(Image.fromarray(RGB), "PNG", exif=(lambda e: (e.__setitem__(0x0112, 6), e)[1])(
        Image.Exif())), np.rot90(RGB, -1)),
}  # fmt: skip
REFUSED = {
    "16 bits": (png16(GREY.astype(np.uint16) * 257 + 1), "16 bits"),
    "16 bits of RGB": (png16(RGB.astype(np.uint16) * 257 + 1), "16 bits"),
    "half transparent": (encoded(Image.fromarray(np.dstack([RGB, HALF]), "RGBA")), "transparent"),
    "grey, half transparent": (encoded(Image.fromarray(np.dstack([GREY, HALF]), "LA")), "transparent"),
    "a transparent colour": (encoded(palette(GREYS, INDEX), transparency=int(INDEX[0, 0])), "transparent"),
    "CMYK": (encoded(Image.fromarray(np.dstack([RGB, GREY]), "CMYK"), "JPEG"), "CMYK"),
    "TIFF": (encoded(Image.fromarray(RGB), "TIFF"), "not a readable picture of PNG, JPEG, BMP, WEBP"),
    "EPS": (encoded(Image.fromarray(RGB), "EPS"), "not a readable picture of PNG"),
    "frames": (encoded(Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(255 - RGB)]), "2 frames"),
    "half of it": (encoded(Image.fromarray(RGB))[:120], "not a readable picture"),
    "134 megapixels": (encoded(Image.new("1", (16384, 8192))), "16384×8192 pixels, which take 1.07 GB"),
}


@pytest.mark.parametrize("name", EXACT)
def test_read_without_loss(name, tmp_path):
    content, pixels = EXACT[name]
    np.testing.assert_array_equal(decode_picture(content), pixels)
    folder = tmp_path / "classes" / "one"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(content)  # whatever it is: the content says so
    np.testing.assert_array_equal(open_images(tmp_path).all().numpy()[0], pixels.transpose(2, 0, 1))
    if pixels.shape[0] == pixels.shape[1]:
        np.testing.assert_array_equal(load_images(tmp_path, size=6)[0], pixels.transpose(2, 0, 1))
    assert load_images(tmp_path, size=6).shape[1] == pixels.shape[2]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    content, words = REFUSED[name]
    (tmp_path / "a.png").write_bytes(EXACT["RGB"][0])
    (tmp_path / "b.png").write_bytes(content)
    for read in (lambda: open_images(tmp_path).all(), lambda: load_images(tmp_path, size=6)):
        with pytest.raises(ValueError, match=words) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path}/b.png") and "\n" not in str(caught.value)


def test_pictures_of_another_kind_are_not_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(EXACT["RGB"][0])
    (tmp_path / "notes.txt").write_text("no picture")
    assert len(open_images(tmp_path)) == len(load_images(tmp_path, size=6)) == 1
    (tmp_path / "b.tif").write_bytes(encoded(Image.fromarray(RGB), "TIFF"))
    for read in (open_images, lambda path: load_images(path, size=6)):
        with pytest.raises(ValueError, match=r"b\.tif: pictures must be \.png"):
            read(tmp_path)


def test_a_larger_limit_is_the_users(monkeypatch):
    content = encoded(Image.new("1", (2048, 2048), 1))
    monkeypatch.setenv("SGM_FILE_MEMORY", "16M")
    with pytest.raises(ValueError, match="SGM_FILE_MEMORY=1G"):
        decode_picture(content)
    monkeypatch.setenv("SGM_FILE_MEMORY", "1G")
    assert (decode_picture(content) == 255).all()


def test_grey_among_colours_and_the_other_way(tmp_path):
    (tmp_path / "a.png").write_bytes(EXACT["RGB"][0])
    (tmp_path / "b.png").write_bytes(EXACT["grey"][0])
    grey = np.repeat(GREY[None], 3, 0)
    np.testing.assert_array_equal(open_images(tmp_path).all().numpy()[1], grey)
    assert load_images(tmp_path, size=6).shape == (2, 3, 6, 6)
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    for read in (lambda: open_images(tmp_path).all(), lambda: load_images(tmp_path, size=6)):
        with pytest.raises(ValueError, match=r"c\.png: is RGB, and the first picture of its set is grey"):
            read()


@pytest.mark.parametrize("shape", [(5, 4, 6, 8), (5, 6, 8, 4), (5, 3, 6, 3)])
def test_channels_that_cannot_be_told_are_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    for read in (open_images, load_images):
        with pytest.raises(ValueError, match=r"x\.npy: images (must|could) be"):
            read(tmp_path / "x.npy")


@pytest.mark.parametrize("low, high", [(0, 255), (-1, 1)])
def test_floats_of_another_range_are_refused(tmp_path, low, high):
    x = RNG.uniform(low, high, (20, 4, 5, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", arr_0=x)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: floating point images lie in \[0, 1\]"):
            open_images(tmp_path / name).all()
    noisy = RNG.uniform(0, 1, (20, 3, 4, 5)) + RNG.normal(0, 0.05, (20, 3, 4, 5))  # as samples are
    np.testing.assert_array_equal(from_array(noisy).all().numpy(), np.floor(noisy.clip(0, 1) * 255 + 0.5))
