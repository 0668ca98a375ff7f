"""Pools, upsampling and filters of a recorded network, as layers."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine.executors.native.forms import Conv, Form, Layer, Read, View
from sgm_engine.executors.native.graph import Value
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.walk import Walk
from sgm_engine.rewriting.record import Node


def mean_of_blocks(walk: Walk, form: Form) -> Form:
    """2×2 means, stride 2; of an undilated 3×3 convolution's output within its layer."""
    if form.shape[1] % 2 or form.shape[2] % 2:
        raise Unsupported(f"means of 2×2 of {form.shape[1]}×{form.shape[2]} pixels")
    if isinstance(form, Conv) and not (form.shared or form.add or walk.forms.is_made(form)):
        k, shape = form.kernel, (form.shape[0], form.shape[1] // 2, form.shape[2] // 2)
        if (k.size, k.dilation, k.stride, k.sides, k.groups, k.up, k.mode) == (3, 1, 1, (1,) * 4, 1, 1, "zeros"):
            read, conv = form.read, walk.graph.conv
            return Layer(shape, lambda add: conv(read.x, k, read.norm, read.activation, add, True))
    read = walk.forms.read(form)
    return Read(walk.graph.mean_pool(read.x, read.norm, read.activation))


def avg_pool(walk: Walk, i: int, node: Node) -> View:
    x, size, stride, padding, ceil, counted, divisor = (*node.args, *([], 0, False, True, None)[len(node.args) - 2 :])
    size, stride, padding = ((n,) * 2 if isinstance(n, int) else tuple(n) * (2 if len(n) == 1 else 1)
                             for n in (size, stride or size, padding))  # fmt: skip
    view = walk.image(x)
    if ceil or divisor or (any(padding) and not counted):
        raise Unsupported("an average pool of cut windows")
    if (size, stride, padding) == ((2, 2), (2, 2), (0, 0)) and not (view.form.shape[1] % 2 or view.form.shape[2] % 2):
        return walk.made(mean_of_blocks(walk, view.form))
    if (size, stride, padding) == ((5, 5), (1, 1), (2, 2)):
        read = walk.forms.read(view.form)
        return walk.made(Read(walk.graph.pool5(read.x, "mean", read.norm, read.activation)))
    if size[0] != size[1] or stride[0] != stride[1] or padding[0] != padding[1]:
        raise Unsupported(f"an average pool of {size}")
    kernel = each(view.form.shape[0], torch.full(size, 1 / size[0] ** 2), stride[0], padding[0])
    return walk.made(walk.forms.conv(walk.forms.read(view.form), kernel, walk.shared(i)))


def max_pool(walk: Walk, i: int, node: Node) -> list:
    x, size, stride, padding, dilation, ceil = (*node.args, *([], 0, 1, False)[len(node.args) - 2 :])
    flat = [set(n) if isinstance(n, (list, tuple)) else {n} for n in (size, stride or size, padding, dilation)]
    form = walk.image(x).form
    if flat == [{2}, {2}, {0}, {1}] and not (ceil and (form.shape[1] % 2 or form.shape[2] % 2)):
        return [walk.made(_max_of_blocks(walk, form))]
    if flat != [{5}, {1}, {2}, {1}] or ceil:
        raise Unsupported("a max pool other than 2×2 of stride 2 and 5×5 of stride 1")
    read = walk.forms.read(form)
    return [walk.made(Read(walk.graph.pool5(read.x, "max", read.norm, read.activation)))]


def _max_of_blocks(walk: Walk, form: Form) -> Read:
    """max(a, b) = b + ReLU(a − b), of the columns of a block and then of its rows."""
    x, graph = walk.forms.value(form), walk.graph

    def picked(*taps: float) -> Value:
        return graph.conv(x, each(form.shape[0], torch.tensor(taps).view(2, 2), 2))

    top = graph.activate(picked(1, -1, 0, 0), "relu", None, [picked(0, 1, 0, 0)])
    bottom = graph.activate(picked(0, 0, 1, -1), "relu", None, [picked(0, 0, 0, 1)])
    difference = graph.activate(top, "none", None, [(bottom, -1.0)])
    return Read(graph.activate(difference, "relu", None, [bottom]))


def each(channels: int, taps: Tensor, stride: int = 1, padding: int = 0, mode: str = "zeros") -> Kernel:
    """The same square filter [k, k] on every channel."""
    weight = taps.expand(channels, 1, *taps.shape)
    return Kernel(
        channels, channels, len(taps), lambda: weight, lambda: None, (), stride, padding, mode=mode, groups=channels
    )


def nearest(walk: Walk, i: int, node: Node) -> View:
    view = walk.image(node.args[0])
    return walk.made(walk.forms.nearest(view.form, *node.shapes[0][2:], walk.shared(i)))


def bilinear(walk: Walk, i: int, node: Node) -> View:
    form, size, upsample = walk.image(node.args[0]).form, node.shapes[0][2:], walk.graph.upsample
    if form.shape[1:] == size:
        return walk.made(form)
    if node.args[2]:
        x = walk.forms.value(form)
        return walk.made(Layer((x.channels, *size), lambda add: upsample(x, *size, add), (), walk.shared(i)))
    if size != (2 * form.shape[1], 2 * form.shape[2]):
        raise Unsupported("bilinear resampling without align_corners by another factor than 2")
    row = torch.tensor([0.25, 0.5, 0.25])  # of what nearest upsampling makes, its border repeated
    read = walk.forms.read(walk.forms.nearest(form, *size))
    return walk.made(
        walk.forms.conv(read, each(form.shape[0], torch.outer(row, row), 1, 1, "replicate"), walk.shared(i))
    )


def filtered(walk: Walk, form: Form, kernel: Kernel) -> Form | None:
    """Filters of a buffer's ones that are a nearest upsampling or a mean of 2×2, as such."""
    if kernel.groups != kernel.c_in or kernel.groups == 1 or kernel.size != 2 or any(
        isinstance(t, torch.nn.Parameter) for t in kernel.tensors
    ):  # fmt: skip
        return None
    taps, plain = kernel.weight(), kernel.bias() is None
    walk.recording.asked.extend(kernel.tensors)
    if not plain or not torch.equal(taps, taps[:1, :1, :1, :1].expand_as(taps)):
        return None
    tap = taps.flatten()[0].item()
    if (kernel.up, kernel.stride, kernel.sides) == (1, 2, (0, 0, 0, 0)):
        return walk.forms.scaled(mean_of_blocks(walk, form), 4 * tap)
    if (kernel.up, kernel.stride, kernel.sides) == (2, 1, (1, 1, 1, 1)):
        return walk.forms.scaled(walk.forms.nearest(form, 2 * form.shape[1], 2 * form.shape[2]), tap)
    return None


HANDLERS = {
    "avg_pool2d": avg_pool,
    "max_pool2d_with_indices": max_pool,
    "upsample_nearest2d": nearest,
    "upsample_bilinear2d": bilinear,
}
