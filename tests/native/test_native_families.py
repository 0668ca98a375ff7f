"""The families' networks, small, whole on the native executor by a recorded run: against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.models import score_sde
from sgm_engine.models.adm import ADMUNet
from sgm_engine.models.edm_unet import DhariwalUNet, SongUNet
from sgm_engine.models.lucidrains import Unet
from sgm_engine.models.unet2d import UNet2D
from tests.family_files import GOLDEN, edm2_network, golden, network_of
from tests.native.layers import relative_error

TIMES, STEPS = torch.tensor([0.9, 0.5, 0.1, 0.05]), torch.tensor([900, 500, 3, 77])


class Told(nn.Module):
    def __init__(self, network, told, *rest):
        super().__init__()
        self.network, self.rest = network, rest
        self.register_buffer("told", told)

    def forward(self, x, level):
        return self.network(x, self.told[level], *self.rest)


def ncsnpp(scale=1.0, **options):
    settings = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "image_size": 16}
    return Told(score_sde.NCSNpp(**settings | options), TIMES * scale)


def edm(kind, *rest, **options):
    settings = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
    return Told(kind(16, 3, 3, **settings | options), TIMES, *(rest or (None,)))


FOURIER = {"fir": True, "embedding_type": "fourier", "scale_by_sigma": True, "scale": 10}
NETWORKS = {
    "DDPM++": lambda: ncsnpp(999),
    "DDPM": lambda: ncsnpp(999, resblock_type="ddpm", skip_rescale=False),
    "NCSN++, residual": lambda: ncsnpp(progressive_input="residual", **FOURIER),
    "NCSN++, skips": lambda: ncsnpp(
        progressive="output_skip", progressive_input="input_skip", progressive_combine="cat", **FOURIER
    ),
    "EDM ddpmpp": lambda: edm(SongUNet),
    "EDM ncsnpp": lambda: edm(
        SongUNet, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1)
    ),
    "EDM adm": lambda: edm(DhariwalUNet),
    "EDM2": lambda: Told(edm2_network(img_channels=3), TIMES, one_hot(torch.tensor([3]), 5)),
    "EDM2, no class": lambda: Told(edm2_network(label_dim=0, channel_mult=(1, 1)), TIMES),
    "ADM, new order": lambda: Told(
        ADMUNet(16, 32, 1, (1, 2), (8,), num_heads=2, resblock_updown=True, use_new_attention_order=True), STEPS
    ),
    "ADM, legacy order": lambda: Told(ADMUNet(16, 32, 1, (1, 2), (8,), num_head_channels=16), STEPS),
    "denoising-diffusion-pytorch": lambda: Told(Unet(16, (1, 2), 3, (False, True), (2, 2), (8, 8), (4, 3)), STEPS),
    "UNet2DModel": lambda: Told(
        UNet2D(16, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
               up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8), STEPS),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_whole(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for p in model.parameters():  # the last of every block starts at zero, and would hide the others
        if not p.any():
            p.normal_(0, 0.05)
    x, level = torch.randn(5, 3, 16, 16), torch.tensor([0, 3, 1, 2, 1])
    native = NativeNetwork(model, 2, 16, 16, channels=3, levels=4)
    found, want = native(x, level), copy.deepcopy(model).double()(x.double(), level)
    assert relative_error(found, want) < max(1e-5, 2 * relative_error(model(x, level), want))


class Original(nn.Module):
    """What a golden file holds, by sample: its network's output, or D of EDM's preconditioning around it."""

    def __init__(self, name):
        super().__init__()
        config, state, tensors = golden(name)
        self.network, told, labels = network_of(name, config), tensors["told"], config.get("labels")
        self.network.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k != "sigmas"})
        self.labels = None if labels is None else torch.tensor(labels)
        one = torch.ones(len(told), 1, 1, 1)
        self.c_in, self.c_skip, self.c_out = one, 0 * one, one
        if name.startswith("edm"):
            sigma = told[:, None, None, None].float()
            total, told = sigma**2 + 0.25, told.log() / 4
            self.c_in, self.c_skip, self.c_out = total.rsqrt(), 0.25 / total, sigma / 2 * total.rsqrt()
            self.labels = None if labels is None else one_hot(self.labels, config["label_dim"])
        self.told, self.x, self.expected = told, tensors["x"], tensors["out_f64"][:, : tensors["x"].shape[1]]

    def forward(self, x, level):
        labels = [] if self.labels is None else [self.labels[level]]
        found = self.network(self.c_in[level] * x, self.told[level], *labels)
        return self.c_skip[level] * x + self.c_out[level] * found


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_outputs(name):
    model = Original(name).eval()
    n, c, h, w = model.x.shape
    native = NativeNetwork(model, n, h, w, channels=c, levels=len(model.told))
    assert relative_error(native(model.x, torch.arange(n)), model.expected) < 5e-6
