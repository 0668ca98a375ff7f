"""Averages of the weights under every name that people give them; and prefixes, in every format."""

import pytest
import torch
from safetensors.torch import save_file

from sgm_engine import load_checkpoint
from sgm_engine.checkpoints.checkpoint import CheckpointError
from sgm_engine.models import NCSNv2
from tests.family_files import golden, refused

SIGMAS, COUNT = torch.linspace(1.0, 0.1, 5), torch.tensor(3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NCSNv2(SIGMAS, channels=1, ngf=4, image_size=8).eval()


def half(model):
    return {k: v if k == "sigmas" else v / 2 for k, v in model.state_dict().items()}


def shadow(model):
    return [p.detach() / 2 for p in model.parameters()]


LAYOUTS = {
    "ema: state_dict": lambda m: {"model": m.state_dict(), "ema": half(m)},
    "ema: shadow_params": lambda m: {"model": m.state_dict(), "ema": {"decay": 0.9, "shadow_params": shadow(m)}},
    "ema: list": lambda m: {"state_dict": m.state_dict(), "ema": shadow(m)},
    "ema_model": lambda m: {"state_dict": m.state_dict(), "ema_model": half(m)},
    "ema_state_dict": lambda m: {"model": m.state_dict(), "ema_state_dict": half(m)},
    "state_dict_ema": lambda m: {"state_dict": m.state_dict(), "state_dict_ema": half(m), "ema_decay": 0.999},
    "model_ema, module.": lambda m: {"model": m.state_dict(), "model_ema": prefixed("module.", half(m))},
    "ema: {module: …}": lambda m: {"model": m.state_dict(), "ema": {"module": half(m), "updates": 7}},
    "AveragedModel": lambda m: {"model": m.state_dict(), "ema": {"n_averaged": COUNT} | prefixed("module.", half(m))},
    "ema_pytorch": lambda m: {
        "model": m.state_dict(),
        "ema": prefixed("online_model.", m.state_dict()) | prefixed("ema_model.", half(m)) | {"step": COUNT},
    },
    "Lightning, side by side": lambda m: {
        "state_dict": prefixed("network.", m.state_dict()) | prefixed("ema.", half(m)), "loops": {}, "epoch": 3},
    "latent diffusion's": lambda m: {"state_dict": prefixed("model.net.", m.state_dict()) | {"model_ema.decay": COUNT}
        | {f"model_ema.net{n.replace('.', '')}": p.detach() / 2 for n, p in m.named_parameters()}},
    "no sigmas": lambda m: {"model": m.state_dict(), "ema": {k: v for k, v in half(m).items() if k != "sigmas"}},
}  # fmt: skip


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_is_found_and_used(tmp_path, model, layout):
    path = tmp_path / "c.pth"
    torch.save(LAYOUTS[layout](model), path)
    for ema, scale in ((None, 0.5), (True, 0.5), (False, 1.0)):
        loaded = load_checkpoint(path, image_size=8, ema=ema)
        assert loaded.averaged == (ema is not False)
        assert torch.equal(loaded.sigmas, model.sigmas)
        for name, value in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), value * scale), (ema, name)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "network.", "model.", "model.module.", "net.score_model."])
@pytest.mark.parametrize("kind", ["plain", "nested", "safetensors"])
def test_prefixes_come_off(tmp_path, model, prefix, kind):
    state = prefixed(prefix, model.state_dict())
    if kind == "safetensors":
        save_file(state, tmp_path / "c.safetensors")
        path = tmp_path / "c.safetensors"
    else:
        torch.save(state if kind == "plain" else {"state_dict": state, "epoch": 1}, tmp_path / "c.pth")
        path = tmp_path / "c.pth"
    loaded = load_checkpoint(path, image_size=8)
    assert not loaded.averaged and torch.equal(loaded.begin_conv.weight, model.begin_conv.weight)


@pytest.mark.parametrize(
    "content, said",
    [
        (
            lambda m: {"model": m.state_dict(), "ema": shadow(m)[:-1]},
            "averages .* parameters in 'ema', where",
        ),
        (lambda m: {"model": m.state_dict(), "ema": shadow(m)[::-1]}, "averages .* with shape"),
        (
            lambda m: {"model": m.state_dict(), "ema": {"fast": {"a": torch.ones(3)}}},
            "'ema' in a form that is not understood",
        ),
        (
            lambda m: {
                "model": prefixed("net.", m.state_dict()) | {f"net_ema.{i}": p for i, p in enumerate(shadow(m))}
            },
            "'net_ema.' in a form that is not understood",
        ),
        (
            lambda m: {"model": m.state_dict(), "opt": {"state": {0: {"ema": shadow(m)[0]}}, "param_groups": []}},
            "'opt/state/ema' in a form that is not understood",
        ),
        (lambda m: {"a": m.state_dict(), "b": m.state_dict()}, "holds 2 networks .a, b.: save the one"),
        (lambda m: {"ema": half(m), "swa": half(m), "model": m.state_dict()}, "holds 2 networks .ema, swa."),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, model, content, said):
    torch.save(content(model), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "c.pth", image_size=8)


def test_ema_that_is_asked_for_must_be_there(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="holds no averaged weights: leave out ema=True"):
        load_checkpoint(tmp_path / "c.pth", image_size=8, ema=True)
    torch.save({"ema": half(model)}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="holds averaged weights only"):
        load_checkpoint(tmp_path / "d.pth", image_size=8, ema=False)


def test_the_name_of_a_file_says_what_its_weights_do_not(tmp_path):
    """ADM's and others' averages are files of their own; of weights without a name nothing is said."""
    flags = {"config": "--image_size 32 --num_heads 4 --class_cond True --attention_resolutions 16,32 "
             "--use_scale_shift_norm False"}  # fmt: skip
    state = golden("improved_diffusion_32_labels")[1]
    for name, averaged in (("ema_0.9999_050000.pt", True), ("model050000.pt", None)):
        torch.save(state, tmp_path / name)
        assert load_checkpoint(tmp_path / name, **flags).averaged is averaged
    assert load_checkpoint(tmp_path / "ema_0.9999_050000.pt", ema=True, **flags).averaged
    assert "holds averaged weights only" in refused(tmp_path / "ema_0.9999_050000.pt", ema=False, **flags)
    assert "holds no averaged weights" in refused(tmp_path / "model050000.pt", ema=True, **flags)
