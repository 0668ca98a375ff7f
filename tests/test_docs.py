"""What the pages print: their commands are understood, and their programs run, on fewer samples."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from sgm_engine.cli.arguments import BadInput
from sgm_engine.cli.main import parser

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
LINE = re.compile(
    r"^(?:    )?(?:[A-Z_]+=\S+ )*(sgm (?:sample|convert|doctor|plans|verify|merge|resample|train|eval|tune).*)$", re.M
)


def commands(page):
    """Each `sgm …` of a page's blocks, in words."""
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    for line in LINE.findall(text):
        for part in re.split(r"\s(?:&&|\||;)\s", line.partition("  #")[0]):
            if part.startswith("sgm "):
                yield shlex.split(part, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    for words in commands(page):
        try:
            parser().parse_args([word for word in words if word not in ("…", "...")])
        except SystemExit as end:  # after --help
            assert not end.code


def test_a_command_that_is_gone_is_seen():
    assert sum(len(list(commands(page))) for page in PAGES) > 50
    with pytest.raises(BadInput, match="no-such-option"):
        parser().parse_args(["sample", "--no-such-option"])


@pytest.mark.parametrize("page, count", [("cdm", 3), ("jobs", 1), ("samplers", 3), ("service", 1)])
def test_programs_run(page, count, tmp_path, monkeypatch):
    if page == "samplers":
        pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    monkeypatch.chdir(tmp_path)
    Path("cifar").mkdir()
    for split in ("train", "test"):
        np.save(f"cifar/{split}.npy", np.zeros((2, 3, 32, 32), np.uint8))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.S)
    assert len(blocks) == count
    names = {}
    exec("from sgm_engine import load_bundled\nmodel, plan = load_bundled()", names)
    for block in blocks:
        few = re.sub(r"(\.sample\(|\.submit\()\d+", r"\g<1>8", block).replace("50_000", "16")
        few = few.replace("tolerance=0.1", "tolerance=5")
        exec(few, names)
