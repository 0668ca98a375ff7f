"""Networks of other families as they come, random weights, told by level: module(x [N, C, H, W], level [N]).

diffusers' UNet2DModel (``pip install 'sgm-engine[integrations]'``) in the configuration of google/ddpm-cifar10-32 and
in a small one; a U-Net as tutorials write it: a function as activation, an embedding of sines, additive skips; and the
published networks of sgm_engine.models in the configurations of their papers: DDPM++ and NCSN++ (Song et al. 2021),
EDM's (Karras et al. 2022), ADM's at 64² (Dhariwal and Nichol 2021) with 128 channels for 192; and
denoising-diffusion-pytorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm_engine.models.adm import ADMUNet
from sgm_engine.models.edm_unet import SongUNet
from sgm_engine.models.lucidrains import Unet
from sgm_engine.models.score_sde import NCSNpp

TIMESTEPS = torch.arange(900, 0, -100)


class Told(nn.Module):
    """network(x, what it is told at a level)."""

    def __init__(self, network: nn.Module, told: Tensor, shape: tuple[int, int, int]):
        super().__init__()
        self.network, self.shape = network, shape
        self.register_buffer("told", told)
        self.register_buffer("sigmas", torch.linspace(1, 0.1, len(told)))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        found = self.network(x, self.told[level])
        return found if isinstance(found, Tensor) else found.sample


def unet2d(size: int, channels: int, widths: tuple[int, ...], attended: tuple[int, ...], **options) -> nn.Module:
    """A UNet2DModel. attended: whether there is attention at each size."""
    from diffusers import UNet2DModel

    down = [f"{'Attn' if a else ''}DownBlock2D" for a in attended]
    up = [f"{'Attn' if a else ''}UpBlock2D" for a in attended[::-1]]
    network = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=widths, down_block_types=down,
        up_block_types=up, layers_per_block=2, **options,
    )  # fmt: skip
    return Told(network, TIMESTEPS, (channels, size, size))


def unet2d_cifar10() -> nn.Module:
    return unet2d(
        32, 3, (128, 256, 256, 256), (0, 1, 0, 0), downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        norm_eps=1e-6, attention_head_dim=None,
    )  # fmt: skip


class Small(nn.Module):
    """Strided down, transposed up, GroupNorm and a linear layer of the time after each; divided by the noise's std."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), embedding: int = 128):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(embedding // 2) * 30)
        self.embed = nn.Linear(embedding, embedding)
        self.act = lambda x: x * torch.sigmoid(x)
        inputs = (1, *widths)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, 1 if a == 1 else 2, bias=False) for a, b in zip(inputs, widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[i], widths[i - 1], 3, 2, bias=False, output_padding=int(i < 3)) for i in (3, 2, 1)
        )
        after = (*widths, *widths[2::-1])
        self.told = nn.ModuleList(nn.Linear(embedding, n) for n in after)
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, n // 8), n) for n in after)
        self.last = nn.ConvTranspose2d(widths[0], 1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies * 2 * torch.pi
        e, h, skips = self.act(self.embed(torch.cat([angles.sin(), angles.cos()], dim=-1))), x, []
        for i, (told, norm) in enumerate(zip(self.told, self.norms, strict=True)):
            h = self.down[i](h) if i < 4 else self.up[i - 4](h if i == 4 else h + skips[7 - i])
            h = self.act(norm(h + told(e)[:, :, None, None]))
            skips.append(h)
        return self.last(h + skips[0]) / ((25 ** (2 * t) - 1) / 6.4377516).sqrt()[:, None, None, None]


def score_sde(told: Tensor, **options) -> nn.Module:
    return Told(NCSNpp(128, (1, 2, 2, 2), 4, (16,), 32, **options), told, (3, 32, 32))


def lucidrains() -> nn.Module:
    full, tokens = (False, False, True), (4, 4, 4)
    return Told(Unet(32, (1, 2, 4), 3, full, (4,) * 3, (32,) * 3, tokens), TIMESTEPS, (3, 32, 32))


def adm_64() -> nn.Module:
    network = ADMUNet(
        64, 128, 3, (1, 2, 3, 4), (32, 16, 8), num_head_channels=64, resblock_updown=True, use_new_attention_order=True
    )
    return Told(network, TIMESTEPS, (3, 64, 64))


NETWORKS = {
    "UNet2DModel CIFAR-10": unet2d_cifar10,
    "UNet2DModel 28×28": lambda: unet2d(28, 1, (32, 64, 64), (0, 1, 0), norm_num_groups=8),
    "tutorial U-Net": lambda: Told(Small(), torch.linspace(0.9, 0.1, 9), (1, 28, 28)),
    "DDPM++": lambda: score_sde(torch.linspace(900, 100, 9)),
    "NCSN++": lambda: score_sde(
        torch.linspace(40, 0.1, 9),
        fir=True,
        embedding_type="fourier",
        progressive_input="residual",
        scale_by_sigma=True,
    ),
    "EDM": lambda: Told(SongUNet(32, 3, 3, channel_mult=(2, 2, 2)), torch.linspace(1, -1, 9), (3, 32, 32)),
    "ADM 64": adm_64,
    "denoising-diffusion-pytorch": lucidrains,
}
