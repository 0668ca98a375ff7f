"""Random command lines of ``sgm``, with whole and damaged files: an exit code of the list, one line on stderr."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

from sgm_engine.cli.main import main
from tests.faults import toy_job
from tests.fuzz.readers import make

CODES = {0, 2, 3, 4, 5}
VALUES = (
    *("", "-1", "0", "1", "2", "nan", "1e400", "1e-5", "x", "0-2,1", "1-", "\x1b[31mred", "a" * 3000, "σ", "a\nb", "{"),
    *("/dev/null", ".", "no/where", "../", "/dev/fd", "--", "auto", "cpu", "native", "eager", "float32"),
    *("pixels", "frechet"),
    *("classifier:k.safetensors", "export:m.pth", "torchscript:m.pth", "levels=600000000", "ngf=x", "a=[", "=", "1/0"),
    *("karras", "heun", "png", "npz", "nearest", "good", "ddim", "annealed_langevin"),
)
FIRM = ["--checkpoint", "m.safetensors", "--device", "cpu", "--batch", "2"]
DRAWN = ["--n", "2", "--steps-per-level", "1", "--step-lr", "1e-5"]
OF_SAMPLE = (
    "--ids --seed --checkpoint --config --plan --sampler --nfe --quality --schedule --conditioning --step-lr --eta "
    "--convention --precision --executor --out --gif --format --shard-size --worker --float8 --actors"
)
COMMANDS = (
    (["sample", *FIRM, *DRAWN], OF_SAMPLE.split()),
    (["plans"], ["--config", "--image-size", "--picture"]),
    (["convert"], ["--config", "--image-size", "--sha256"]),
    (["verify"], []),
    (["merge"], ["--out"]),
    (["resample"], ["--id", "--out", "--checkpoint", "--config"]),
    (["eval", "--replicates", "2"], ["--reference", "--training", "--features", "--metrics", "--neighbours", "--json"]),
    (["train", "--out", "run", "--set", "levels=1x"], ["--config", "--data", "--init", "--objective", "--set"]),
    (["train", "--advise"], ["--data", "--set"]),
    ([], ["--version", "--help", "sample", "verify"]),
)


def cases(folder: Path):
    folder.mkdir()
    readers = make(folder)
    toy_job(folder / "whole", 4, 2).run()
    single = {name: r for name, r in readers.items() if len(r.files) == 1}

    def argument(rng: np.random.Generator) -> str:
        kind, names = rng.random(), sorted(single)
        if kind < 0.4:
            return single[names[int(rng.integers(len(names)))]].name
        return str(folder / "whole") if kind < 0.5 else VALUES[int(rng.integers(len(VALUES)))]

    def case(number: int, rng: np.random.Generator, place: Path) -> str | None:
        for name, reader in single.items():
            whole = name == "ours" or rng.random() < 0.3
            content = reader.files[reader.name]
            (place / reader.name).write_bytes(content if whole else reader.mutate(content, rng))
        start, options = COMMANDS[number % len(COMMANDS)]
        words = list(start)
        for _ in range(int(rng.integers(0, 4))):
            named = options and rng.random() < 0.7
            words += [options[int(rng.integers(len(options)))], argument(rng)] if named else [argument(rng)]
        return run(words, place)

    return case


def run(words: list[str], place: Path) -> str | None:
    out, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    here = os.getcwd()
    os.chdir(place)
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            code = main(words)
    except SystemExit as error:  # of --help and --version
        code = error.code
    finally:
        os.chdir(here)
    said = [stream.buffer.getvalue().decode() for stream in (out, errors) if not stream.flush()]
    problem = None
    if code not in CODES:
        problem = f"exit code {code}"
    elif "Traceback" in said[1] or "\x1b" in said[0] + said[1]:
        problem = "a traceback or an escape"
    elif code == 2 and (len(said[1].splitlines()) != 1 or len(said[1]) > 9000):
        problem = f"{len(said[1].splitlines())} lines"
    return problem and f"{problem}: sgm {' '.join(map(repr, words))[:300]} → {said[1][-300:]!r}"
