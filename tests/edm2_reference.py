"""EDM2's network as arXiv 2312.02696 describes it (figure 21, configuration G), from tensors by name, in float64.

Written from the paper's equations and apart from sgm_engine.models. Where the paper leaves a choice (order of q, k and
v, of what is joined), as EDM's files have it.
"""

import math

import torch


def unit(v, dims):
    """v/(rms + 1e-4)."""
    return v / ((v * v).mean(dims, keepdim=True).sqrt() + 1e-4)


def mp_silu(x):
    return x / (1 + (-x).exp()) / 0.596


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    c = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([c * (1 - t) / math.sqrt(a.shape[1]) * a, c * t / math.sqrt(b.shape[1]) * b], 1)


class Reference:
    """state: float64 by the files' names. Called with x [N, C, H, W], c_noise [N], one-hot labels or None → F."""

    def __init__(self, state, attn_channels=64):
        self.state, self.attn_channels = {k: v.double() for k, v in state.items()}, attn_channels

    def weight(self, name):
        w = self.state[f"{name}.weight"]
        return unit(w, tuple(range(1, w.dim()))) / math.sqrt(w[0].numel())

    def conv(self, x, name):
        w = self.weight(name)
        return torch.nn.functional.conv2d(x, w, padding=(w.shape[2] - 1) // 2)

    def __call__(self, x, c_noise, labels=None):
        s = self.state
        emb = math.sqrt(2) * torch.cos(c_noise[:, None] * s["emb_fourier.freqs"] + s["emb_fourier.phases"])
        emb = emb @ self.weight("emb_noise").T
        if "emb_label.weight" in s:
            count = s["emb_label.weight"].shape[1]
            labels = torch.zeros(len(x), count) if labels is None else labels
            emb = mp_sum(emb, (labels.double() * math.sqrt(count)) @ self.weight("emb_label").T, 0.5)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones(len(x), 1, *x.shape[2:], dtype=x.dtype)], 1)
        names = list(dict.fromkeys(".".join(n.split(".")[:2]) for n in s if n[:4] in ("enc.", "dec.")))
        skips = []
        for name in names:
            if name.endswith("_conv"):
                x = self.conv(x, name)
            elif name.startswith("enc."):
                if name.endswith("_down"):
                    x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
                x = self.shortcut(x, name)
                x = self.block(unit(x, 1), unit(x, 1), emb, name)
            else:
                if name.endswith("_up"):
                    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                if "_block" in name:
                    x = mp_cat(x, skips.pop(), 0.5)
                x = self.block(x, self.shortcut(x, name), emb, name)
            if name.startswith("enc."):
                skips.append(x)
        return s["out_gain"] * self.conv(x, "out_conv")

    def shortcut(self, x, name):
        return self.conv(x, f"{name}.conv_skip") if f"{name}.conv_skip.weight" in self.state else x

    def block(self, x, main, emb, name):
        scale = self.state[f"{name}.emb_gain"] * (emb @ self.weight(f"{name}.emb_linear").T) + 1
        y = self.conv(mp_silu(x), f"{name}.conv_res0") * scale[:, :, None, None]
        x = mp_sum(main, self.conv(mp_silu(y), f"{name}.conv_res1"), 0.3)
        if f"{name}.attn_qkv.weight" in self.state:
            x = mp_sum(x, self.conv(self.attention(self.conv(x, f"{name}.attn_qkv")), f"{name}.attn_proj"), 0.3)
        return x.clamp(-256, 256)

    def attention(self, qkv):
        """Channel 3·i + j is feature i of q, k or v (j = 0, 1, 2); heads are runs of features."""
        n, _, height, width = qkv.shape
        heads = []
        for head in range(qkv.shape[1] // 3 // self.attn_channels):
            start, stop = 3 * head * self.attn_channels, 3 * (head + 1) * self.attn_channels
            q, k, v = (unit(qkv[:, start + j : stop : 3].flatten(2), 1) for j in range(3))
            scores = torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(self.attn_channels)
            heads.append(torch.einsum("nqk,nck->ncq", scores.softmax(2), v))
        return torch.cat(heads, 1).view(n, -1, height, width)
