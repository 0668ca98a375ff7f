"""README's commands, run in the order they are printed, on fewer samples, steps and images than they would take."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.evaluation.image_files import write_mnist
from tests.test_docs import commands

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LESS = {
    "--nfe 20": "--n 2 --batch 2",
    "--weights cdm": "--n 1 --batch 1",
    "--checkpoint": "--n 2 --batch 2",
    "--n 50000": "--n 6 --shard-size 4 --batch 4 --quality draft",
    "eval": "--replicates 2",
    "tune": "--budget 2 --candidates 2 --first 2 --last 2 --held-out 3 --batch 3 --families ddim",
    "train": "--set steps=1 batch=2 sample_every=0 ngf=4 image_size=14",
}


def less(words):
    """What is added, or said again: the last one counts."""
    line = " ".join(words)
    return next((more.split() for key, more in LESS.items() if key in line), [])


def test_the_commands_run(sgm, tiny_weights, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    pytest.importorskip("lightning", reason="pip install 'sgm-engine[train]'")
    write_mnist(tmp_path / "mnist", 60, side=28)
    shutil.copy(tiny_weights, tmp_path / "FILE_OR_FOLDER")
    for words in commands("README.md"):
        if words[0] == "train":  # into a folder that the job above has
            words = [word if word != "run" else "trained" for word in words]
        done = sgm(*words, *less(words))
        assert done.returncode == 0, (words, done.stderr)
        for out in (word for before, word in pairwise(words) if before == "--out"):
            assert (tmp_path / out).exists(), words
    assert (tmp_path / "samples.png").exists() and (tmp_path / "trained/model.safetensors").exists()


def test_each_word_of_make_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
    assert named >= {"sample", "test"} and named <= targets


def test_links_lead_somewhere():
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                lost.append((page.name, link))
    assert lost == []
