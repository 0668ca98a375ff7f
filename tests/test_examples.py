"""Every example runs as it stands, in under 15 lines, and its pictures are pictures."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sgm_engine
from bench import stand_ins
from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.cli import jobs
from sgm_engine.cli.main import parser
from sgm_engine.jobs.worker import Worker

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "with_diffusers": lambda: pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'"),
    "with_azula": lambda: pytest.importorskip("azula", reason="pip install --no-deps azula, and einops"),
    "with_deepinv": stand_ins.deepinv,
}


@pytest.mark.parametrize(
    "name", ["service", "with_k_diffusion", "with_diffusers", "with_edm", "with_azula", "with_deepinv"]
)
def test_example(name, tmp_path, monkeypatch, capsys):
    NEEDS.get(name, lambda: None)()
    monkeypatch.chdir(tmp_path)
    source = (EXAMPLES / f"{name}.py").read_text()
    code = [line for line in source.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) < 15, f"{name}.py has {len(code)} lines"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{name}.py"))
    pictures, printed = list(tmp_path.glob("*.png")), capsys.readouterr().out
    assert pictures or printed
    for picture in pictures:
        pixels = np.asarray(Image.open(picture)) / 255
        assert pixels.std() > 0.05, "an empty picture"
    if name == "with_deepinv":
        measured, restored = (float(word) for word in printed.split() if word.replace(".", "").isdigit())
        assert restored > measured + 1


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sh", "kubernetes.yaml"])
def test_the_commands_of_many_machines_are_commands(name):
    """Their options are those of sgm; Kubernetes' manifest says the count of its pods twice."""
    text = (EXAMPLES / name).read_text()
    if name.endswith(".yaml"):
        spec = yaml.safe_load(text)["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        words = container["command"]
        told = {e["name"]: e["value"] for e in container["env"]} | {"JOB_COMPLETION_INDEX": "31"}
        assert spec["completionMode"] == "Indexed" and Worker.from_environment(told) == Worker(31, spec["completions"])
    else:
        words = shlex.split(text.splitlines()[-1])
    args = parser().parse_args(words[words.index("sample") :])
    assert args.steal and jobs.wanted(args)


def test_the_readmes_program_runs(tiny_weights, monkeypatch, capsys):
    """As printed, on a smaller network than the bundled one."""
    model = load_checkpoint(tiny_weights)
    monkeypatch.setattr(sgm_engine, "load_bundled", lambda: (model, plan_for(model)), raising=False)
    readme = (EXAMPLES.parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    names = {}
    exec(block, names)
    assert names["pictures"].shape == (64, 8, 8, 1) and "<Engine of NCSN" in capsys.readouterr().out
    assert len(readme.splitlines()) <= 120
