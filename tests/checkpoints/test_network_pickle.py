"""EDM's network pickles: read as data, to the network and the preconditioning of their authors."""

import pickle

import pytest
import torch
from torch import nn

from sgm_engine import load_checkpoint
from sgm_engine.models.edm_unet import SongUNet
from tests.family_files import edm_arguments, edm_pickle, golden, network_of, refused, relative, same_network

TINY = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 16, "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}  # fmt: skip


@pytest.mark.parametrize("name", ["edm_ddpmpp_32", "edm_ncsnpp_32", "edm_adm_32_labels"])
def test_edm_pickles(tmp_path, name):
    config, state, tensors = golden(name)
    network = network_of(name, config)
    network.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    path = edm_pickle(tmp_path / "network-snapshot.pkl", network, edm_arguments(config), own={"sigma_data": 0.5})
    label = config["labels"][0] if config["labels"] else None
    model = load_checkpoint(path, class_labels=label)
    same_network(model, name)
    assert model.averaged and model.plan["name"] == "heun" and len(model.sigmas) == 18
    told = tensors["told"][:1]  # D, as the authors' preconditioning gives it, from our score in other units
    with torch.no_grad():
        x = (tensors["x"][:1] + 1) / 2
        score = model.at_sigmas([told.item() / 2])(x, torch.tensor([0]))
    denoised = x.double() + (told.double() / 2) ** 2 * score.double()
    assert relative(2 * denoised - 1, tensors["out_f64"][:1]) < 5e-6
    refused_labels = refused(path, class_labels=99)
    assert "class_label must be" in refused_labels


@pytest.mark.parametrize(
    "precond, ends",
    [("VPPrecond", (152.2, 1.0e-3)), ("VEPrecond", (100.0, 0.02)), ("iDDPMPrecond", (2.0e4, 6.4e-3))],
)
def test_other_preconditioning_of_edm(tmp_path, precond, ends):
    path = edm_pickle(tmp_path / "n.pkl", SongUNet(**TINY).eval(), TINY, precond)
    model = load_checkpoint(path)
    assert model.config.sigma_max == pytest.approx(ends[0], rel=0.05)
    assert model.config.sigma_min == pytest.approx(ends[1], rel=0.05)
    assert model(torch.rand(1, 1, 8, 8), torch.tensor([5])).isfinite().all()


@pytest.mark.parametrize(
    "precond, own",
    [
        ("VPPrecond", {"beta_d": 1e300}),
        ("VPPrecond", {"beta_min": 10**400}),
        ("iDDPMPrecond", {"M": 10**9}),
        ("iDDPMPrecond", {"M": 1e300}),
        ("iDDPMPrecond", {"C_2": -1}),
    ],
)
def test_constants_that_give_no_levels(tmp_path, precond, own):
    path = edm_pickle(tmp_path / "n.pkl", SongUNet(**TINY).eval(), TINY, precond, own)
    assert "constants give no noise levels" in refused(path)


def test_storages_that_are_no_bytes(tmp_path):
    """Neither as the call's arguments, which must be a tuple, nor as the one in it."""
    path = edm_pickle(tmp_path / "n.pkl", SongUNet(**TINY).eval(), TINY)
    content = path.read_bytes()
    call = content.index(b"_load_from_bytes")
    start = content.index(b"B", call)
    end = start + 5 + int.from_bytes(content[start + 1 : start + 5], "little")
    for other in (b"K\x07", b"K\x07\x85", b"K\x07\x85\x85"):
        tail = content[end:].lstrip(b"\x94")
        assert tail[:1] == b"\x85"  # TUPLE1
        path.write_bytes(_unframed(content[:start] + other + tail[1:]))
        refused(path)


def _unframed(content):
    """Without the lengths of frames, which a pickle may leave out."""
    assert content[2:3] == b"\x95"
    return content[:2] + content[11:]


def wide(depth):
    """A module in which few modules hold each other so often that a walk would not end."""
    inner = nn.Identity()
    for _ in range(depth):
        outer = nn.Module()
        outer.a = outer.b = inner
        inner = outer
    network = SongUNet(**TINY)
    network.extra = inner
    return network


def test_a_pickle_of_something_else(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weights": [1.0, 2.0]}, protocol=4))
    assert "holds no network; it holds: weights" in refused(tmp_path / "a.pkl")
    (tmp_path / "b.pkl").write_bytes(b"\x80\x04\x95\x10" + bytes(7) + b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "Nothing in it was run" in refused(tmp_path / "b.pkl")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"ema": 1}, protocol=4)[:-4])
    assert "no sound pickle" in refused(tmp_path / "c.pkl")
    network = SongUNet(**TINY)
    path = edm_pickle(tmp_path / "g.pkl", wide(30), TINY)
    assert "nests its modules deeper" in refused(path)
    assert "class 'FlowPrecond'" in refused(edm_pickle(tmp_path / "d.pkl", network, TINY, "FlowPrecond"))
    wider = TINY | {"model_channels": 32}
    assert "of shape [" in refused(edm_pickle(tmp_path / "e.pkl", network, wider))
    path = edm_pickle(tmp_path / "f.pkl", network, TINY)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "no sound pickle" in refused(path)
