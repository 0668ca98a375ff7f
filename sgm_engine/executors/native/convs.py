"""Convolutions, products with constant matrices and resampling of a recorded network, as layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from sgm_engine.executors.native.forms import Conv, Form, Read, View
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.layout import Axis, Dims, image_dims, names, normal, offsets, only, sizes
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.resampling import filtered
from sgm_engine.executors.native.views import of_padded
from sgm_engine.executors.native.walk import Walk
from sgm_engine.rewriting.record import Node, Ref


def convolution(walk: Walk, i: int, node: Node) -> View:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    view, sides, mode = of_padded(walk.values.get(x))
    shape = walk.recording.shape(weight)
    if len(shape) == 3 and shape[2] == 1 and not transposed and stride == [1] and padding == [0]:  # of tokens
        dims = view.dims
        form, gain = _source(walk, View(view.form, dims, view.start, view.gain))
        kernel = _kernel(walk, weight, bias, shape[0], shape[1] * groups, 1, lambda w: w[..., None], gain, groups)
        return View(_read(walk, i, form, kernel), (dims[0], _channels(shape[0]), *dims[2:]))
    if len(shape) != 4 or len(set(stride)) > 1 or len(set(dilation)) > 1:
        raise Unsupported(f"a convolution by {shape}, stride {tuple(stride)}, dilation {tuple(dilation)}")
    size, d, s = max(shape[2:]), dilation[0] if max(shape[2:]) > 1 else 1, stride[0]
    extra = [size - n for n in shape[2:]]  # zeros that make the kernel square
    view, depthwise = _folded(view, shape, groups)
    if view.dims[1] and names(view.dims[1]) != "c" and shape[2:] == (1, 1) and s == 1 and groups == 1:
        return _of_blocks(walk, i, node, view)
    view, up = _spread(view)
    form, gain = _source(walk, view)
    channels = form.shape[0]
    if not transposed:
        pads = [sides[n] + padding[n // 2] + (d * extra[n // 2] if n % 2 else 0) for n in range(4)]
        outputs = channels if depthwise else shape[0]
        if mode != "zeros" and any(padding):
            raise Unsupported("a border and zeros around it")
    else:
        if up > 1 or any(sides):
            raise Unsupported("a transposed convolution of padded images")
        before = [d * (shape[2 + n] - 1) - padding[n] for n in range(2)]
        pads = [before[n // 2] + (output_padding[n // 2] + d * extra[n // 2] if n % 2 else 0) for n in range(4)]
        up, s, outputs = s, 1, channels if depthwise else shape[1] * groups
    if up > 1 and not transposed:  # zeros behind the last pixel, too
        pads = [p + (up - 1 if n % 2 else 0) for n, p in enumerate(pads)]
    if min(pads) < 0:
        raise Unsupported("a convolution that crops its input")

    def square(w: Tensor) -> Tensor:
        if transposed:
            w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        w = w.expand(outputs, *w.shape[1:]) if depthwise else w
        return F.pad(w, (0, extra[1], 0, extra[0]))

    own = channels if depthwise else groups
    kernel = _kernel(walk, weight, bias, outputs, channels, size, square, gain, own)
    kernel = replace(kernel, stride=s, padding=tuple(pads), dilation=d, mode=mode, up=up)
    if (simple := filtered(walk, form, kernel)) is not None:
        return _unfolded(walk, simple, depthwise)
    return _unfolded(walk, _read(walk, i, form, kernel), depthwise)


def _folded(view: View, shape: tuple[int, ...], groups: int) -> tuple[View, bool]:
    """Images whose channels are seen as images of one channel: each is convolved by the same filter."""
    if shape[:2] == (1, 1) and groups == 1 and names(view.dims[0]) == "bc" and not view.dims[1]:
        images = tuple(a for a in view.dims[0] if a.name == "b")
        channels = tuple(a for a in view.dims[0] if a.name == "c")
        return replace(view, dims=(images, channels, *view.dims[2:])), True
    return view, False


def _unfolded(walk: Walk, form: Form, depthwise: bool) -> View:
    dims = image_dims(walk.recording.batch, *form.shape)
    return View(form, ((*dims[0], *dims[1]), (), *dims[2:]) if depthwise else dims)


def _spread(view: View) -> tuple[View, int]:
    """Without the zeros between pixels, and how far apart those are."""
    zeros = [a.size for dim in view.dims for a in dim if a.name == "z"]
    if not zeros:
        return view, 1
    if len(zeros) != 2 or zeros[0] != zeros[1] or any(dim and dim[0].name == "z" for dim in view.dims):
        raise Unsupported("zeros between some pixels")
    return replace(view, dims=tuple(tuple(a for a in dim if a.name != "z") for dim in view.dims)), zeros[0]


def _source(walk: Walk, view: View) -> tuple[Form, float]:
    """The form of a view that is an image [B, C, H, W] or tokens [B, C, T], and its gain."""
    view = walk.forms.settled(view)
    dims = image_dims(walk.recording.batch, *view.form.shape)
    if view.dims not in (dims, (*dims[:2], dims[2] + dims[3])):
        raise Unsupported("a convolution of something else than images")
    return view.form, view.gain


def _kernel(
    walk: Walk, weight: Ref, bias: Ref | None, outputs: int, inputs: int, size: int, shaped: Callable, gain: float,
    groups: int = 1,
) -> Kernel:  # fmt: skip
    """gain: of the input, which is no gain of the bias."""
    program = walk.program
    program.constant(weight), None if bias is None else program.constant(bias)  # refuses those of the level

    def made() -> Tensor:
        found = shaped(program.constant(weight)).float()
        return found if gain == 1 else found * gain

    return Kernel(
        inputs, outputs, size, made, lambda: None if bias is None else program.constant(bias),
        program.outside(weight, bias), groups=groups,
    )  # fmt: skip


def _read(walk: Walk, i: int, form: Form, kernel: Kernel) -> Conv:
    found = walk.forms.conv(walk.forms.read(form), kernel, walk.shared(i))
    if min(found.shape) < 1:
        raise Unsupported("images too small for a convolution of them")
    return found


def _channels(count: int) -> tuple[Axis, ...]:
    return (Axis("c", count),) if count > 1 else ()


def _of_blocks(walk: Walk, i: int, node: Node, view: View) -> View:
    """A 1×1 convolution of pixels gathered to channels (space to depth): one of their block, and stride."""
    weight, bias = node.args[1:3]
    blocks = [a for a in view.dims[1] if a.name in "hw"]
    if len(blocks) != 2 or blocks[0].size != blocks[1].size or any(a.step != 1 for a in blocks):
        raise Unsupported("pixels gathered to channels")
    n, outputs = blocks[0].size, node.shapes[0][1]
    order = list(view.dims[1])
    full = View(view.form, image_dims(walk.recording.batch, *view.form.shape), 0, view.gain)
    if len(offsets(order)) != view.form.shape[0] or view.start:
        raise Unsupported("pixels of some channels gathered to channels")
    form, gain = _source(walk, full)
    places = torch.tensor(offsets(order)).argsort()

    def shaped(w: Tensor) -> Tensor:
        w = w.reshape(outputs, *(a.size for a in order))
        rows, columns = (1 + k for k, a in enumerate(order) if a.name in "hw")
        if order[rows - 1].name == "w":
            rows, columns = columns, rows
        w = w.movedim((rows, columns), (-2, -1)).flatten(1, -3)
        return w[:, places]

    kernel = _kernel(walk, weight, bias, outputs, form.shape[0], n, shaped, gain)
    return walk.made(_read(walk, i, form, replace(kernel, stride=n)))


def product(walk: Walk, i: int, node: Node) -> object:
    """mm, addmm, bmm and baddbmm: with a constant matrix a 1×1 convolution, of two images a part of attention."""
    bias, (a, b) = (None, node.args) if node.name in ("mm", "bmm") else (node.args[0], node.args[1:3])
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    left, right = walk.program.has(a), walk.program.has(b)
    if not left and not right:
        from sgm_engine.executors.native.products import contracted

        if bias is not None and beta != 0:
            raise Unsupported("a sum with a product of images")
        return contracted(walk, i, walk.values[a], walk.values[b], alpha)
    if (bias is not None and beta != 1) or alpha != 1:
        raise Unsupported("a scaled product")
    view = walk.forms.settled(walk.view(b if left else a))
    inner = view.dims[-2] if left else view.dims[-1]
    outputs = node.shapes[0][-2 if left else -1]
    if not only(inner, "c") or prod(n.size for n in inner) != view.form.shape[0]:
        raise Unsupported("a matrix that multiplies pixels")
    weight = a if left else b

    def shaped(w: Tensor) -> Tensor:
        if w.dim() == 3:
            if len(w) > 1 and not torch.equal(w, w[:1].expand_as(w)):
                raise Unsupported("a matrix that differs from image to image")
            w = w[0]
        return (w if left else w.t())[:, :, None, None]

    shaped(walk.program.constant(weight))
    kernel = _kernel(walk, weight, None, outputs, view.form.shape[0], 1, shaped, view.gain)
    dims: Dims = tuple(_channels(outputs) if dim is inner else dim for dim in view.dims)
    if bias is not None:
        kernel = kernel.shifted(walk.program.table(bias, dims, outputs))
    return View(_read(walk, i, view.form, kernel), dims)


def concat(walk: Walk, i: int, node: Node) -> View:
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    last = walk.view(parts[-1]) if not walk.program.has(parts[-1]) else None
    if len(parts) == 2 and walk.program.has(parts[0]) and last and names(last.dims[normal(dim, len(last.dims))]) != "c":
        return _remembered(walk, parts[0], last, dim)
    image = next(walk.settled(part) for part in parts if not walk.program.has(part))
    views = [_constant(walk, part, image, dim) if walk.program.has(part) else walk.settled(part) for part in parts]
    dim = normal(dim, len(views[0].dims))
    rest = {(*view.dims[:dim], *view.dims[dim + 1 :]) for view in views}
    whole = all(only(view.dims[dim], "c") and sizes(view.dims)[dim] == view.form.shape[0] for view in views)
    if not whole or len({tuple(sizes(r)) for r in rest}) > 1:
        raise Unsupported("a concatenation of something else than channels")
    values = [walk.forms.value(view.form) for view in views]
    total = values[0]
    for value in values[1:]:
        total = walk.graph.concat(total, value)
    return View(Read(total), (*views[0].dims[:dim], _channels(total.channels), *views[0].dims[dim + 1 :]))


def _constant(walk: Walk, ref: Ref, image: View, dim: int) -> View:
    """Channels that are the same at every pixel, beside those of an image: a bias by level, of nothing."""
    channels, dim = walk.recording.shape(ref)[dim], normal(dim, len(image.dims))
    dims = (*image.dims[:dim], _channels(channels), *image.dims[dim + 1 :])
    inputs, table = image.form.shape[0], walk.program.table(ref, dims, channels)
    kernel = Kernel(inputs, channels, 1, lambda: torch.zeros(channels, inputs, 1, 1), lambda: None, ()).shifted(table)
    return View(walk.forms.conv(Read(walk.forms.value(image.form)), kernel), dims)


def _remembered(walk: Walk, memory: Ref, view: View, dim: int) -> View:
    """A constant before the pixels of keys or values, whose gain so far is none of the constant's."""
    if view.gain != 1:
        view = replace(view, form=walk.forms.scaled(view.form, view.gain), gain=1.0)
    dim = normal(dim, len(view.dims))
    total = walk.recording.shape(memory)[dim] + sizes(view.dims)[dim]
    if not only(view.dims[dim], "h") and names(view.dims[dim]) != "hw":
        raise Unsupported("a constant beside channels")
    dims = (*view.dims[:dim], (Axis("n", total),), *view.dims[dim + 1 :])
    return replace(view, dims=dims, memory=(memory, dim))


HANDLERS = {
    "convolution": convolution, **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), product),
    "cat": concat,
}  # fmt: skip
