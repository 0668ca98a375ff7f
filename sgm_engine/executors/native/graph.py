"""The layers of a native network as Python builds them: one method of ``Graph`` a layer of csrc/cpu/executor.

What a norm and an activation do to a layer's input, and what bias, residuals and a pool do to its output, belongs to
the layer that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.executors.native.builder import PRECISIONS, Activation, Add, Builder, Layer, Value
from sgm_engine.executors.native.kernel import Kernel, Padding, fir
from sgm_engine.executors.native.norm import Norm, Table, Unsupported
from sgm_engine.executors.native.weights import as_float32, given

__all__ = ["PRECISIONS", "Graph", "Layer", "Value"]


class Graph(Builder):
    """Builds the layers of one network for images of one size; every method emits one layer and returns its output."""

    def load(self, channels: int, height: int, width: int, scale: float = 1.0, shift: float = 0.0) -> Value:
        """scale·x + shift of the network's input x [channels, height, width]."""
        return self._layer(_C.Op.load, None, (channels, height, width), scale=scale, shift=shift)

    def conv(
        self,
        x: Value,
        conv: nn.Conv2d | nn.ConvTranspose2d | Kernel,
        norm: nn.Module | Norm | None = None,
        activation: Activation = "none",
        add: Add = (),
        pool: bool = False,
    ) -> Value:
        """conv(activation(norm(x))), its 2×2 mean if ``pool``, plus at most two addends."""
        kernel = conv if isinstance(conv, Kernel) else Kernel.of(conv)
        shape = (kernel.c_out, *self._output(kernel, x, pool))
        return self._layer(_C.Op.conv, x, shape, add=add, norm=norm, activation=activation, kernel=kernel, pool=pool)

    def store(
        self, x: Value, conv: nn.Conv2d | Kernel, norm: nn.Module | Norm | None = None, activation: Activation = "none"
    ) -> None:
        """The network's output: conv(activation(norm(x)))."""
        kernel = conv if isinstance(conv, Kernel) else Kernel.of(conv)
        self._output(kernel, x)
        if (kernel.stride, kernel.up, kernel.groups) != (1, 1, 1):
            raise Unsupported(f"{conv}: the last convolution must be one of stride 1, ungrouped")
        self._layer(_C.Op.store, x, None, norm=norm, activation=activation, kernel=kernel)

    def activate(self, x: Value, activation: Activation, norm: nn.Module | Norm | None = None, add: Add = ()) -> Value:
        """activation(norm(x)), plus at most two addends."""
        return self._layer(_C.Op.activate, x, x[1:], add=add, norm=norm, activation=activation)

    def mean_pool(self, x: Value, norm: nn.Module | Norm | None = None, activation: Activation = "none") -> Value:
        """2×2 mean of activation(norm(x)), stride 2."""
        shape = (x.channels, x.height // 2, x.width // 2)
        return self._layer(_C.Op.mean_pool, x, shape, norm=norm, activation=activation)

    def pool5(
        self, x: Value, kind: str, norm: nn.Module | Norm | None = None, activation: Activation = "none"
    ) -> Value:
        """5×5 pool of activation(norm(x)), stride 1: its "mean", padding counted as zeros, or its "max"."""
        op = _C.Op.mean_pool5 if kind == "mean" else _C.Op.max_pool5
        return self._layer(op, x, x[1:], norm=norm, activation=activation)

    def upsample(self, x: Value, height: int, width: int, add: Add = ()) -> Value:
        """Bilinear, corners aligned, plus at most two addends."""
        return self._layer(_C.Op.upsample, x, (x.channels, height, width), add=add)

    def nearest(self, x: Value, height: int, width: int, add: Add = ()) -> Value:
        """Every pixel repeated a whole number of times, cropped, plus at most two addends."""
        return self._layer(_C.Op.nearest, x, (x.channels, height, width), add=add)

    def concat(self, x: Value, second: Value) -> Value:
        """The channels of x, then those of second."""
        return self._layer(_C.Op.concat, x, (x.channels + second.channels, x.height, x.width), second=second)

    def embed(self, shape: tuple[int, int, int], patch: int, octaves: Sequence[int], table: Table) -> Value:
        """u = a·x + b of x [*shape], then sin and cos(2ⁿ·π·u) of each octave n, patch×patch pixels as channels.

        table: float64 [levels, 5]: a and b, and what ``store_gradient`` makes the score with.
        """
        channels, height, width = shape
        self.native.embedding(channels, height, width, patch, list(octaves))

        def pack(native=self.native) -> None:
            rows = table.make().detach().double().contiguous()
            native.set_embedding((rows.data_ptr(), rows.numel()))

        self._keep(table.tensors, pack)
        planes = channels * (1 + 2 * len(octaves)) * patch**2
        return self._layer(_C.Op.embed, None, (planes, height // patch, width // patch))

    def store_gradient(self, gradient: Value, embedded: Value) -> None:
        """The network's output: table[:, 2]·∇ᵤ + table[:, 3]·x + table[:, 4], by the gradient of what embed made."""
        self._layer(_C.Op.store_gradient, gradient, None, second=embedded)

    def noise_features(
        self, shape: tuple[int, int, int], potentials: int, waves: int, table: Table, classes: int
    ) -> tuple[Value, Value]:
        """What a classifier of potentials reads of x [*shape]: planes, 2×2 pixels as channels, and [waves, 1, 1].

        table: float64, csrc/cpu/executor/program.h's Potential, with a row a level.
        """
        channels, height, width = shape
        self.native.potential(channels, height, width, classes, waves, potentials)

        def pack(native=self.native) -> None:
            numbers = table.make().contiguous()
            native.set_potential((numbers.data_ptr(), numbers.numel()))

        self._keep(table.tensors, pack)
        planes = self._layer(_C.Op.noise_features, None, (16 * channels, height // 2, width // 2))
        return planes, self._layer(_C.Op.waves, None, (waves, 1, 1))

    def potential(self, fields: Value) -> Value:
        """Gradient in the fields a [4·C·M, H/2, W/2] of Σ w_m(level)·⟨y, a_m⟩; that in y waits for store_potential."""
        return self._layer(_C.Op.potential, fields, fields[1:])

    def store_potential(self, planes: Value, waves: Value) -> None:
        """The network's output, by the gradients in what noise_features made."""
        self._layer(_C.Op.store_potential, planes, None, second=waves)

    def constant(self, values: Table, shape: tuple[int, int, int]) -> Value:
        """values [*shape], the same for every image."""
        index = self.native.constant(*shape)

        def pack(native=self.native) -> None:
            pixels = as_float32(values.make().permute(1, 2, 0))
            native.set_constant(index, given(pixels))

        self._keep(values.tensors, pack)
        return self._layer(_C.Op.constant, None, shape, first=index)

    def reshape(self, x: Value, shape: tuple[int, int, int]) -> Value:
        """The numbers of x, pixel by pixel, each with its channels, in another shape."""
        return self._layer(_C.Op.reshape, x, shape)

    def affine_backward(
        self, x: Value, gradient: Value, norm: Norm | None, activation: Activation, add: Add = ()
    ) -> Value:
        """Gradient in x, given that of activation(γ·x + β), plus at most two addends; no norm: of activation(x)."""
        return self._layer(_C.Op.affine_backward, x, x[1:], second=gradient, add=add, norm=norm, activation=activation)

    def film_backward(self, x: Value, gradient: Value, norm: Norm, activation: Activation) -> Value:
        """Gradient in γ and β, [2·channels, 1, 1], given that of activation(γ·x + β)."""
        shape = (2 * x.channels, 1, 1)
        return self._layer(_C.Op.film_backward, x, shape, second=gradient, norm=norm, activation=activation)

    def fir(
        self,
        x: Value,
        taps: Sequence[float] | Tensor,
        up: int = 1,
        down: int = 1,
        padding: Padding = 0,
        norm: nn.Module | Norm | None = None,
        activation: Activation = "none",
        add: Add = (),
    ) -> Value:
        """up − 1 zeros behind and below a pixel, padding, taps [k] or [k, k] on each channel, every down-th pixel."""
        if up > 1 and down > 1:
            raise Unsupported("a filter that goes up and down at once")
        return self.conv(x, fir(x.channels, taps, up, down, padding), norm, activation, add)

    def attention(
        self, x: Value, channels: int, heads: int = 1, scale: float | None = None, memory: Table | None = None
    ) -> Value:
        """softmax(scale·qᵀk)·v over the pixels, by head. x: q, k and v, a third of its channels each, [heads, size].

        channels: of all heads; what a third holds beyond them is not read. scale: None is 1/√size. memory: keys and
        values [2, heads, n, size] before those of the pixels.
        """
        index = self._heads(x, channels, heads, scale, memory)
        plain = heads == 1 and scale is None and memory is None
        return self._layer(_C.Op.attention, x, (channels, x.height, x.width), heads=index, turns=plain)

    def linear_attention(
        self, x: Value, channels: int, heads: int, scale: float = 1.0, memory: Table | None = None
    ) -> Value:
        """scale·contextᵀ·softmax(q), over channels, context = softmax(k)·vᵀ, over pixels; laid out as for attention."""
        index = self._heads(x, channels, heads, scale, memory)
        return self._layer(_C.Op.linear_attention, x, (channels, x.height, x.width), heads=index)

    def channel_norm(
        self,
        x: Value,
        groups: int = 1,
        centred: bool = True,
        eps: float = 0.0,
        floor: float = 0.0,
        after: float = 0.0,
        scale: Table | None = None,
        shift: Table | None = None,
        activation: Activation = "none",
        add: Add = (),
    ) -> Value:
        """activation(scale·(x − mean)/(after + √(max(variance, floor) + eps)) + shift) of a pixel's groups of channels.

        Not centred, the mean is taken for 0, as in RMSNorm. scale, shift: [1 or levels, C or 1].
        """
        norm = Norm(x.channels, groups, eps, (scale, None, shift), True, centred, floor, after)
        return self._layer(_C.Op.channel_norm, x, x[1:], add=add, norm=norm, activation=activation)

    def slope(self, x: Value, scale: Norm, activation: str) -> Value:
        """γ(level)·activation′(x)."""
        return self._layer(_C.Op.slope, x, x[1:], norm=scale, activation=activation)

    def norm_backward(self, x: Value, gradient: Value, norm: Norm, activation: Activation, add: Add = ()) -> Value:
        """Gradient in x, given that of activation(norm(x)), plus at most two addends."""
        return self._layer(_C.Op.norm_backward, x, x[1:], second=gradient, add=add, norm=norm, activation=activation)

    def attention_backward(self, x: Value, gradient: Value) -> Value:
        """Gradient in x, given that of attention(x)."""
        return self._layer(_C.Op.attention_backward, x, x[1:], second=gradient)

    def spread(self, x: Value, height: int, width: int) -> Value:
        """x at every second pixel of every second row, zeros between."""
        return self._layer(_C.Op.spread, x, (x.channels, height, width))

    def block_sum(self, x: Value, height: int, width: int, add: Add = ()) -> Value:
        """The transpose of ``nearest``, plus at most two addends."""
        return self._layer(_C.Op.block_sum, x, (x.channels, height, width), add=add)

    def slice(self, x: Value, first: int, channels: int, add: Add = ()) -> Value:
        """Channels first … first + channels − 1, plus at most two addends."""
        return self._layer(_C.Op.slice, x, (channels, x.height, x.width), add=add, first=first)

    def divide_by(self, divisor: Table) -> None:
        """Divide the output by the number [levels, 1] of the level."""

        def pack(native=self.native) -> None:
            values = as_float32(divisor.make())
            native.set_sigmas(given(values))

        self._keep(divisor.tensors, pack)
