"""``sgm train --out s3://…``, on a real S3 server of this machine."""

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")
from safetensors.torch import load

from sgm_engine.cli.main import main
from sgm_engine.files.storage import Prefix
from sgm_engine.training import run
from sgm_engine.training.far import Mirror, mirrored
from tests.jobs.object_server import objects, storage, url  # noqa: F401 - fixtures
from tests.training.runs import data  # noqa: F401 - fixture

RUN = ("train", "--config", "tiny.yaml", "--data", "images.npy", "--accelerator", "cpu", "--set", "steps=20", "--out")


class Killed(Exception):
    """As if the machine were gone."""


@pytest.fixture
def here(data, monkeypatch):
    monkeypatch.chdir(data)


def test_a_run_whose_machine_is_lost_goes_on_elsewhere(here, data, url, storage, monkeypatch, capsys):
    main([*RUN, "disk"])
    append = run.append_line

    def until(path, line):
        append(path, line)
        if line.startswith("13,"):
            raise Killed

    monkeypatch.setattr(run, "append_line", until)
    with pytest.raises(Killed):
        main([*RUN, url])
    first = objects(url)
    kept = sorted(name for name in first if name.endswith(".ckpt"))
    assert kept and "model.safetensors" not in first and not any(name.startswith(".") for name in first)
    monkeypatch.undo()
    storage.faults = {".ckpt": ["busy", "cut"]}
    monkeypatch.chdir(data)
    capsys.readouterr()
    main([*RUN, url])
    said = capsys.readouterr().out
    assert "resumed at step" in said and f"written: {url}/model.safetensors" in said
    found = objects(url)
    with open(data / "disk" / "model.safetensors", "rb") as file:
        expected = load(file.read())
    weights = load(found["model.safetensors"])
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in expected)
    on_disk = {path.name for path in (data / "disk" / "checkpoints").glob("*.ckpt")}
    assert {name.rpartition("/")[2] for name in found if name.endswith(".ckpt")} == on_disk


def test_another_run_has_the_prefix(here, data, url, capsys):
    main([*RUN, url])
    before = objects(url)
    assert main([*RUN, url, "--set", "steps=20", "ngf=8"]) == 2
    assert f"{url} holds a run with ngf=" in capsys.readouterr().err and objects(url) == before


def test_of_two_that_begin_together_the_first_has_the_prefix(url):
    with mirrored(url) as one, mirrored(url) as same, mirrored(url) as other:
        for mirror, text in ((one, "a"), (same, "a"), (other, "b")):
            (mirror.folder / "config.yaml").write_text(text)
        one.begin()
        same.begin()
        with pytest.raises(ValueError, match="another run has just begun there: name another"):
            other.begin()
    assert objects(url) == {"config.yaml": b"a"}


def test_what_is_not_a_run_is_left_alone(here, url, capsys):
    with mirrored(url) as mirror:
        mirror._far.write("mine.txt", b"mine")
    assert main([*RUN, url]) == 2
    assert f"--out {url}: holds something else than a run" in capsys.readouterr().err
    assert objects(url) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("name", ["checkpoints/../../out.ckpt", "csv//x", "tensorboard/./x"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path, monkeypatch):
    """Written by somebody else; fsspec hands such names on as they are."""
    objects = {"config.yaml": b"x: 1", name: b"x"}
    monkeypatch.setattr(Prefix, "tree", lambda self: list(objects))
    monkeypatch.setattr(Prefix, "read", lambda self, name: objects[name])
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="names no file of a run: name another"):
        Mirror("s3://samples/run", tmp_path / "run")
    assert not (tmp_path / "out.ckpt").exists()
