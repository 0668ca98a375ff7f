"""Checkpoints with the names of CDM's published program, made by a stand-in of that layout: no file is published."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine import Engine, load_checkpoint, save_checkpoint
from sgm_engine.checkpoints.torch_file import CheckpointError
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.models.cdm.model import CDM
from tests.native.classifiers import question, score64, worst

WIDTH, MULTIPLIERS, BLOCKS, SIZE, STEPS = 32, (1, 2), 1, 32, 8  # attention at 16 pixels, the second resolution
CIN, LABELS = 3, 4


def layout(labels=LABELS, seed=0):
    """The tensors of such a network by name, random."""
    state, g = {}, torch.Generator().manual_seed(seed)

    def put(name, *shape, scale=1.0):
        fan = math.prod(shape[1:]) or 1
        state[f"{name}.weight"] = torch.randn(shape, generator=g) * (scale / math.sqrt(fan))
        state[f"{name}.bias"] = torch.randn(shape[0], generator=g) * 0.1

    def norm(name, c):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(c, generator=g)
        state[f"{name}.bias"] = 0.3 * torch.randn(c, generator=g)

    def block(name, c_in, c_out):
        norm(f"{name}.norm1", c_in), put(f"{name}.conv1", c_out, c_in, 3, 3)
        norm(f"{name}.norm2", c_out), put(f"{name}.conv2", c_out, c_out, 3, 3)
        if labels:
            put(f"{name}.temb_proj", c_out, 4 * WIDTH, scale=3.0)
        if c_in != c_out:
            put(f"{name}.nin_shortcut", c_out, c_in, 1, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", c, c, 1, 1)

    wide, c2 = WIDTH, 2 * WIDTH
    put("conv_in", wide, CIN, 3, 3)
    block("down.0.block.0", wide, wide), put("down.0.downsample.conv", wide, wide, 3, 3)
    block("down.1.block.0", wide, c2), attention("down.1.attn.0", c2)
    block("mid.block_1", c2, c2), attention("mid.attn_1", c2), block("mid.block_2", c2, c2)
    block("up.1.block.0", 2 * c2, c2), attention("up.1.attn.0", c2)
    block("up.1.block.1", c2 + wide, c2), attention("up.1.attn.1", c2), put("up.1.upsample.conv", c2, c2, 3, 3)
    block("up.0.block.0", c2 + wide, wide), block("up.0.block.1", wide + wide, wide)
    norm("norm_out", wide), put("conv_out", 2 * wide, wide, 3, 3)
    put("linear_layer", STEPS + 2, 2 * wide, scale=30.0)
    if labels:
        put("temb.dense.0", 4 * wide, wide), put("temb.dense.1", 4 * wide, 4 * wide)
        state["label_emb.weight"] = torch.randn(labels + 1, wide, generator=g)
    return state


def logits64(state, u, label=None):
    """What the paper's network makes of u [N, 3, H, W] in float64, written from its layout."""
    s = {name: t.double() for name, t in state.items()}

    def conv(name, x, **options):
        return F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], **options)

    def norm(name, x):
        return F.group_norm(x, 32, s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def dense(name, x):
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    e = None
    if label is not None:
        e = dense("temb.dense.1", F.silu(dense("temb.dense.0", s["label_emb.weight"][label])))

    def block(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = h if e is None else h + dense(f"{name}.temb_proj", F.silu(e))[..., None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weight = (torch.einsum("ncx,ncy->nxy", q, k) / x.shape[1] ** 0.5).softmax(2)
        return x + conv(f"{name}.proj_out", torch.einsum("nxy,ncy->ncx", weight, v).view_as(x))

    h = conv("conv_in", u.double(), padding=1)
    kept = [h, h := block("down.0.block.0", h)]
    h = conv("down.0.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
    kept += [h, h := attention("down.1.attn.0", block("down.1.block.0", h))]
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", h)))
    for j in (0, 1):
        h = attention(f"up.1.attn.{j}", block(f"up.1.block.{j}", torch.cat([h, kept.pop()], 1)))
    h = conv("up.1.upsample.conv", F.interpolate(h, scale_factor=2), padding=1)
    for j in (0, 1):
        h = block(f"up.0.block.{j}", torch.cat([h, kept.pop()], 1))
    h = conv("conv_out", F.silu(norm("norm_out", h)), padding=1).mean((2, 3))
    return dense("linear_layer", h).cumsum(1)


def saved(path, state, average=None):
    average = state if average is None else average
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []},
               "ema_model_state_dict": {f"module.{n}": t for n, t in average.items()}, "loss": 0.1}  # fmt: skip
    torch.save(content, path)
    return path


@pytest.mark.parametrize("labels", [0, LABELS])
def test_logits_and_scores_are_those_of_the_layout(tmp_path, labels):
    state = layout(labels)
    path = saved(tmp_path / "last_epoch", layout(labels, seed=1), state)
    options = {"class_labels": 2} if labels else {}
    model = load_checkpoint(path, **options)
    assert isinstance(model, CDM) and model.averaged and model.labels == labels and model.shape == (3, SIZE, SIZE)
    assert model.classes.levels == STEPS and not any("dropout" in name for name, _ in model.named_parameters())
    x, level = question(model, 2)
    u = model.to_u(x)
    want = logits64(state, u, 2 if labels else None)
    assert (model.double().logits(u.double()) - want).abs().max() < 1e-9 * want.abs().max()
    other = logits64(layout(labels, 1), u, 2 if labels else None)
    assert (other - want).abs().max() > 1e-2 * want.abs().max()
    model = load_checkpoint(path, **options)
    assert worst(NativeNetwork(model, 2, SIZE, SIZE)(x, level), score64(model, x, level)) < 5e-6
    raw = load_checkpoint(path, ema=False, **options).double()
    assert (raw.logits(u.double()) - other).abs().max() < 1e-9 * other.abs().max()


def test_the_paper_s_denoised_image_and_likelihood(tmp_path):
    """ε = √(1 − ᾱ)·(∇(f_T+1 − f_t) + u), log p(u) = log N(u; 0, I) + f_0 − f_T+1, as the paper has them."""
    state = layout(0)
    model = load_checkpoint(saved(tmp_path / "file", state)).double()
    x, level = question(model, 3)
    t = model.level_class[level]
    u = model.to_u(x.double()).requires_grad_()
    f = logits64(state, u)
    (slope,) = torch.autograd.grad((f[:, -1] - f.gather(1, t[:, None])[:, 0]).sum(), u)
    want = model.noise[t].view(-1, 1, 1, 1) * (slope + u)
    assert (model.noise_pred(u, t)[0] - want).abs().max() < 1e-9 * want.abs().max()
    d = u[0].numel()
    log_p = -u.square().sum((1, 2, 3)) / 2 - d / 2 * math.log(2 * math.pi) + f[:, 0] - f[:, -1]
    assert torch.allclose(model.log_prob(x.double()), log_p + d * math.log(2), rtol=1e-10)


def test_converted_and_drawn(tmp_path, sgm):
    path = saved(tmp_path / "last.pth", layout())
    assert sgm("convert", path, "ours.safetensors").returncode == 0
    ours = load_checkpoint(tmp_path / "ours.safetensors", class_labels=1, guidance=2.0)
    assert (ours.class_label, ours.guidance) == (1, 2.0)
    x = Engine(ours, 2).sample(2)
    assert x.shape == (2, 3, SIZE, SIZE) and x.isfinite().all()
    save_checkpoint(ours, tmp_path / "again.safetensors")
    assert load_checkpoint(tmp_path / "again.safetensors").config == ours.config


def broken():
    """Files that are near to one, and what is said of each."""
    for name in ("conv_in.weight", "mid.block_1.conv1.weight", "up.0.block.1.norm2.bias", "conv_out.weight"):
        yield f"without {name}", {name: None}, r"lacks"
    yield "without down.1.attn.0.q.weight", {"down.1.attn.0.q.weight": None}, "image_size"
    yield "a narrow q", {"down.1.attn.0.q.weight": torch.zeros(64, 8, 1, 1)}, "belong together"
    yield "other widths", {"down.1.block.0.conv1.weight": torch.zeros(50, 32, 3, 3)}, "no multiples"
    yield "flow matching", {"linear_layer.weight": torch.zeros(1000, 64)}, "flow matching"
    yield "one class", {"linear_layer.weight": torch.zeros(1, 64)}, "levels must be"
    yield "no numbers", {"conv_in.weight": torch.zeros(0)}, "no published CDM"
    yield "unknown", {"down.0.block.0.more.weight": torch.zeros(3)}, "unknown"
    yield "a far resolution", {"down.99999.block.0.conv1.weight": torch.zeros(32, 32, 3, 3)}, "resolutions"
    yield "NaN", {"norm_out.weight": torch.full((32,), torch.nan)}, "NaN"


@pytest.mark.parametrize("what", [pytest.param(case, id=case[0]) for case in broken()])
def test_what_is_nearly_one_is_refused_in_a_line(tmp_path, what):
    _, changes, message = what
    state = {name: t for name, t in (layout(0) | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(saved(tmp_path / "file.pth", state))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_embedding_of_another_network_is_none(tmp_path):
    """A network that only happens to end in linear_layer."""
    torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict() | {"linear_layer.weight": torch.zeros(2, 2)}, tmp_path / "x")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x")
