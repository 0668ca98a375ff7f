"""The programs of ``python -m``: help that names each default, and one line for what cannot be meant."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sgm_engine.programs.arguments import Program, at_least, number, positive

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for room in ("sgm_engine", "bench", "tests")
    for path in (ROOT / room).rglob("*.py")
    if "sgm_engine.programs.arguments import Program" in path.read_text("utf-8")
    and path.name not in ("test_programs.py", "ray_schedule.py")  # which needs Ray
)
WITHOUT_MAIN = ("bench.history", "bench.table", "bench.gpu.counts")  # they parse where the module is the program
PACKAGED = [module for module in MODULES if module.startswith("sgm_engine.")]


class Shown(Exception):
    """The parser of a program, as it parses."""


@pytest.fixture
def parser_of(monkeypatch):
    """module → its Program; nothing of the module's work is done."""

    def parse_args(parser, *words):
        raise Shown(parser)

    def found(module):
        here = importlib.import_module(module)
        if hasattr(here, "__path__"):
            here = importlib.import_module(f"{module}.__main__")
        monkeypatch.setattr(Program, "parse_args", parse_args)
        with pytest.raises(Shown) as shown:
            here.parse([]) if hasattr(here, "parse") else here.main()
        monkeypatch.undo()
        return shown.value.args[0]

    return found


def test_there_are_programs():
    assert len(PACKAGED) == 6 and len(MODULES) > 15


@pytest.mark.parametrize("module", [m for m in MODULES if m not in WITHOUT_MAIN])
def test_help_names_the_program_and_each_default(module, parser_of):
    parser = parser_of(module)
    shown = " ".join(parser.format_help().split())
    assert shown.startswith(f"usage: python -m {module} ")
    for action in parser._actions:
        assert action.help, action.dest
        if type(action.default) in (int, float, str) and action.default != argparse.SUPPRESS:
            said = parser._get_formatter()._get_help_string(action) % vars(action)
            assert f"default: {action.default}" in said, action.dest


@pytest.mark.parametrize(
    "words, says",
    [
        (["training.compare", "--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["training.compare", "--data", "absent"], "absent: there is no such file or folder"),
        (["training.compare_images", "--data", "absent"], "absent: there is no such file or folder"),
        (["training.compare_images", "--data", ".", "--n", "1"], "argument --n: must be at least 2, got 1"),
        (["training.compare_images", "--data", ".", "--methods", "x"], "argument --methods: must be of denoising,"),
        (["cdm.ablation", "--seeds", "x"], "argument --seeds: must be an integer, got 'x'"),
        (["cdm.ablation", "--out", "file"], "File exists: 'file'"),
        (["cdm.report", "--checkpoint", "absent", "--data", "."], "absent: cannot be read"),
        (["cdm.report", "--checkpoint", "mnist", "--data", "."], "mnist.safetensors holds no classification diffusion"),
        (["cdm.baseline", "--ddm", "cdm_mnist", "--data", "."], "argument --ddm: holds a CDM, not a DDM"),
        (["cdm.baseline", "--ddm", "absent", "--data", "."], "absent: cannot be read"),
        (["cdm.baseline", "--ddm", "absent", "--data", ".", "--n", "2"], "argument --n: a Fréchet distance's interval"),
        (["cdm.baseline", "--dd", "absent"], "required: --ddm"),
        (["cdm.guided", "--checkpoint", "mnist", "--data", "."], "mnist.safetensors knows no labels"),
        (["cdm.guided", "--checkpoint", "mnist", "--data", ".", "--guidance", "0,x"], "--guidance: must be a number"),
        (["cdm.guided", "--checkpoint", "mnist", "--data", ".", "--out", "no/x.png"], "there is no folder no"),
    ],
)
def test_one_line(words, says, tmp_path, monkeypatch, capsys):
    from sgm_engine.checkpoints.bundled import bundled_path

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    main = importlib.import_module(f"sgm_engine.{words[0]}").main
    with pytest.raises(SystemExit) as end:
        main([str(bundled_path()) if word == "mnist" else word for word in words[1:]])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and says in printed.err, printed.err
    assert printed.err.startswith(f"python -m sgm_engine.{words[0]}: ") and printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_package_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    from sgm_engine.training import compare

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        compare.main(["--out", str(tmp_path / "out")])
    assert "matplotlib" in (said := capsys.readouterr().err) and "pip install 'sgm-engine[train,plot]'" in said


@pytest.mark.parametrize("module", ["tests.ptx", "tests.isa"])
def test_what_passes_its_words_on_has_help_of_its_own(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python -m {module}" in done.stdout.splitlines()[0]


def test_numbers_are_checked_as_they_are_read():
    parser = Program("x", "What it does.")
    parser.add_argument("--n", type=at_least(2, 2**8), default=3, help="samples")
    parser.add_argument("--x", type=number)
    parser.add_argument("--y", type=positive)
    assert vars(parser.parse_args(["--x", "-1e-5", "--y", ".5"])) == {"n": 3, "x": -1e-5, "y": 0.5}
    assert "samples (default: 3)" in parser.format_help()
    for words in (
        ["--n", "1"],
        ["--n", "256"],
        ["--n", "2.0"],
        ["--y", "0"],
        ["--y", "nan"],
        ["--y", "inf"],
        ["--x", ""],
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        assert end.value.code == 2


COMMAND = re.compile(r"(?:`|^ *)python3? -m ((?:bench|tests|sgm_engine)\.[\w.]+)([^`\n]*)", re.M)
PRINTED = sorted(
    {
        (module, words.partition("#")[0].strip())
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
        for module, words in COMMAND.findall(page.read_text("utf-8"))
        if module in MODULES and words.strip()
    }
)


@pytest.mark.parametrize("module, words", PRINTED, ids=[" ".join(printed) for printed in PRINTED])
def test_what_the_pages_print_is_understood(module, words, parser_of):
    parser_of(module).parse_args([word for word in words.split() if word not in ("…", "...")])
