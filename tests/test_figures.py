"""The examples that draw the papers' figures, each run with fewer chains, images and steps than it has."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def numbers(pattern, printed):
    return [float(value) for value in re.findall(pattern, printed)]


def right_where_data_are(printed):
    clean, noisy = (numbers(r" (\d+\.\d\d)(?= |$)", line.partition("emptiest")[2]) for line in printed.splitlines())
    assert len(clean) == len(noisy) == 4 and max(noisy) < clean[0] < 0.7 * min(clean[1:])


def steadier(printed):
    clean, noisy = numbers(r"at the end +(-?\d+)", printed)
    assert clean == noisy == 0  # sixty steps: little is learnt


def of_one_size(printed):
    sizes = numbers(r"√D (\S+)", printed)
    assert len(sizes) == 12 and all(0.85 < size < 1.15 for size in sizes)


def no_copies(printed):
    pixels, features = printed.splitlines()
    assert pixels.startswith("pixels: ") and features.startswith("features: ")
    assert all(value > 1 for value in numbers(r" (\d+\.\d\d)", pixels))  # noise is no neighbour of a digit


def slower_and_slower(printed):
    alike = numbers(r"image (\S+)", printed)
    assert len(alike) == 6 and alike[0] < 0.8 < 0.95 < alike[-1]


def the_denoiser_misses_less(printed):
    classifier, denoiser = numbers(r"\(CDM\) (\S+)", printed), numbers(r"\(NCSN\) (\S+)", printed)
    assert len(classifier) == len(denoiser) == 7 and classifier[-1] > denoiser[-1] > denoiser[0]
    assert all(0 < missed < 0.4 for missed in classifier + denoiser)


CASES = {
    "22_low_density": ("STEPS, BATCH = 1500, 256", "STEPS, BATCH = 400, 64", right_where_data_are),
    "25_a_little_noise": ("N, STEPS, BATCH = 256, 2500, 64", "N, STEPS, BATCH = 4, 60, 4", steadier),
    "26_along_the_levels": ("N = 6", "N = 1", of_one_size),
    "27_nearest": ("N = 6", "N = 2", no_copies),
    "28_inpainting": ("COMPLETIONS = 6", "COMPLETIONS = 2", lambda printed: None),  # it asserts by itself
    "29_mixing": ("N, STEPS, EVERY = 24, 60, 4", "N, STEPS, EVERY = 2, 21, 20", slower_and_slower),
    "30_classifier_by_level": ("N = 50", "N = 2", the_denoiser_misses_less),
}


@pytest.mark.parametrize("name", CASES)
def test_figure(name, tmp_path, monkeypatch, capsys):
    written, smaller, check = CASES[name]
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert source.count(written) == 1
    for split, n in (("train", 40), ("t10k", 2)):
        head = b"\0\0\x08\x03" + np.array([n, 28, 28], ">u4").tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(head + digits(n).tobytes())
    monkeypatch.setattr("sys.argv", [name, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        exec(compile(source.replace(written, smaller), name, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)
    check(capsys.readouterr().out)
    (picture,) = tmp_path.glob("*.png")
    assert np.asarray(Image.open(picture)).std() > 10, "an empty picture"


def digits(n):
    """Strokes that are a little like ones: uint8 [n, 28, 28]."""
    images = np.zeros((n, 28, 28), np.uint8)
    for i in range(n):
        images[i, 5:23, 12 + i % 3 : 15 + i % 3] = 250
    return images
