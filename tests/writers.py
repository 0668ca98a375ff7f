"""Whoever may write to the weights of a network that an engine shares: tests/engine/test_shared_weights.py."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, vector_to_parameters

from sgm_engine.models import NCSN
from sgm_engine.models.blocks import ConditionalInstanceNormPlus

SIGMAS = [1.0, 0.3, 0.1]
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta")
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


class Small(nn.Module):
    """A few layers of the kinds that executors keep copies of: quick to trace, and to run eagerly."""

    def __init__(self):
        super().__init__()
        self.shape = (1, 8, 8)
        self.sigmas = SIGMAS
        self.register_buffer("divisor", torch.tensor(SIGMAS))
        self.begin, self.middle, self.down = (
            nn.Conv2d(1, 8, 3, padding=1),
            *(nn.Conv2d(8, 8, 3, padding=1) for _ in "ab"),
        )
        self.norm, self.end = ConditionalInstanceNormPlus(8, 3), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, level):
        h = self.begin(2 * x - 1)
        h = h + self.middle(F.elu(self.norm(h, level)))
        h = h + F.interpolate(F.avg_pool2d(self.down(h), 2), scale_factor=2, mode="nearest")
        return self.end(F.elu(h)) / self.divisor[level][:, None, None, None]


def tiny_net(seed=0, kind=Small):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (Small() if kind is Small else NCSN(SIGMAS, 1, ngf=4, divide_by_sigma=True, image_size=8)).eval()


def optimizer_step(net, draw, name=None, how=None):
    """One step of a random optimizer on random gradients of some parameters."""
    name = name or draw.choice(OPTIMIZERS)
    how = how or draw.choice(("plain", "foreach", "fused") if name in FUSED else ("plain", "foreach"))
    flags = {"foreach": how == "foreach"} | ({"fused": True} if how == "fused" else {})
    chosen = draw.sample(list(net.parameters()), draw.choice((1, 3, len(list(net.parameters())))))
    for p in chosen:
        p.grad = torch.randn_like(p)
    rate = {"Adadelta": 50.0, "SGD": 0.05}.get(name, 0.03)
    getattr(torch.optim, name)(chosen, lr=rate, **flags).step()
    net.zero_grad()
    return f"{name} {how}"


def conv(net, draw):
    return draw.choice([m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 9])


def moved(t):
    return t * 1.1 + 0.05 * torch.randn_like(t)


def flip(net, draw):
    w = conv(net, draw).weight
    w.data.copy_(w.data.flip(draw.randrange(4)))


def permute(net, draw):
    w = conv(net, draw).weight
    w.data.copy_(w.data.flatten()[torch.randperm(w.numel())].view_as(w))


def one_element(net, draw):
    conv(net, draw).weight.data.view(-1)[draw.randrange(9)] += 1.0


def through_numpy(net, draw):
    conv(net, draw).weight.detach().numpy()[:] *= -1


def new_data(net, draw):
    w = conv(net, draw).weight
    w.data = moved(w.data)


def other_strides(net, draw):
    w = conv(net, draw).weight
    w.data = moved(w.data).to(memory_format=torch.channels_last)


def assign(net, draw):
    layer = conv(net, draw)
    layer.weight = nn.Parameter(moved(layer.weight.detach()))


def swap(net, draw):
    w = conv(net, draw).weight
    try:
        torch.utils.swap_tensors(w, nn.Parameter(moved(w.detach())))
    except RuntimeError as error:  # torch's own refusal, while somebody holds a weak reference: nothing was written
        assert "weakref" in str(error)
        net.end.weight.data.mul_(1.1)


def buffer(net, draw):
    draw.choice((lambda b: b.mul_(1.2), lambda b: b.data.mul_(0.8)))(net.divisor)


def embedding(net, draw):
    net.norm.embed.weight.data.add_(0.1)


def load(net, draw):
    state = {name: moved(t) if t.dim() > 1 else t for name, t in net.state_dict().items()}
    net.load_state_dict(state, assign=draw.choice((True, False)))


def average(net, draw):
    parameters = [p.data for p in net.parameters()]
    torch._foreach_lerp_(parameters, [moved(p) for p in parameters], 0.5)


def vector(net, draw):
    vector_to_parameters(moved(torch.cat([p.detach().flatten() for p in net.parameters()])), net.parameters())


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, nn.Parameter(torch.randn(1, base.out_channels, 1, 1) * 0.1)

    def forward(self, x):
        return self.base(x) * (1 + self.weight)


def wrapped_layer(net, draw):
    net.middle = Lora(net.middle)


def reparametrise(net, draw):
    parametrizations.weight_norm(net.middle)
    net.middle.parametrizations.weight.original0.data.mul_(1.5)


WRITERS = [optimizer_step] * 4 + [flip, permute, one_element, through_numpy, new_data, other_strides, assign, swap]
WRITERS += [buffer, embedding, load, average, vector]
STRUCTURAL = [wrapped_layer, reparametrise]
