"""What the pages print: their commands are understood, and their programs run, on fewer samples."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from sgm_engine.cli.arguments import BadInput
from sgm_engine.cli.main import parser

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("sgm_engine/**/*.py"), *ROOT.glob("sgm_engine/training/configs/*.yaml")]
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


@pytest.mark.parametrize("page, count", [("cdm", 3), ("jobs", 1), ("samplers", 4), ("service", 1)])
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


def anchors(page):
    """Where a link into a page may lead: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "mailto:")):
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def claims():
    """The rows of docs/papers.md: claim, where, test, here, there."""
    for line in (ROOT / "docs/papers.md").read_text("utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| claim |"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def missing(row):
    """What a row names and the repository does not hold: files, and names, options and configs of its second cell."""
    for name in re.findall(r"[\w/.]*\w\.(?:py|md)\b", " ".join(row)):
        if not any(
            any(ROOT.glob(folder + name.lstrip("./"))) for folder in ("", "docs/", "sgm_engine/**/", "tests/**/")
        ):
            yield name
    known = "\n".join(source.read_text("utf-8") for source in SOURCES)
    files = {source.stem for source in SOURCES} | {"sgm", "python", "FILE", "PNG", "M", "n"}
    for name in re.findall(r"(?<![\w-])(?:--[\w-]+|[A-Za-z_]\w+(?:\.\w+)*)", " ".join(re.findall(r"`(.*?)`", row[1]))):
        last = name.removesuffix(".py").rpartition(".")[2]
        if last not in files and not re.search(rf"(?:def|class) {last}\b|\b{last}\b[:=]|\"{last}\"", known):
            yield name


def test_every_claim_of_the_papers_is_somewhere():
    rows = list(claims())
    assert len(rows) > 50
    for row in rows:
        claim, where, test, here, _ = row
        assert where or test or here, claim
        assert test or here or "not here" in where, claim
        assert not list(missing(row)), claim


@pytest.mark.parametrize("gone", ["tests/test_gone.py", "`objectives.is_gone`", "`sgm eval --gone`", "test_gone.py"])
def test_a_claim_whose_place_is_gone_is_seen(gone):
    assert list(missing(["a claim", gone, "test_docs.py", "", ""]))
