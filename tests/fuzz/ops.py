"""Calls of the ops with wrong arguments: ``python -m tests.fuzz.ops --seconds 10 --seed 0``.

Each is refused with one line, by an error of a kind that says whose fault it is, or gives what the reference gives.
--module: the path of another build of sgm_engine._C, one with sanitizers.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time

import torch
from torch import Tensor

from sgm_engine.programs.arguments import Program, at_least, positive

REFUSALS = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)
INTEGERS = (-1, 0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**56 - 1, 2**56, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -0.0, 1e-40, 3e38, float("inf"), float("nan"), -1.0)


def use(module: str) -> None:
    """Make that build the one that is imported."""
    spec = importlib.util.spec_from_file_location("sgm_engine._C", module)
    sys.modules["sgm_engine._C"] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)


class Calls:
    """Random calls, each reproducible from its seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def shape(self) -> tuple[int, ...]:
        r = self.random
        return (
            r.choice((0, 1, 2, 3)),
            r.choice((1, 2, 3, 4, 8, 16, 17)),
            r.choice((1, 2, 4, 5, 8)),
            r.choice((1, 3, 4, 8)),
        )

    def images(self, shape, dtype=torch.float32) -> Tensor:
        x = torch.randn(shape).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.random.random() < 0.4 else x

    def spoiled(self, value, others: list[Tensor]):
        """Another of its kind, or of none."""
        r = self.random
        if isinstance(value, str):
            return r.choice(("", "normal", "uniform", "silu", "relu", "gelu", "none"))
        if not isinstance(value, Tensor):
            return r.choice((None, *INTEGERS, *NUMBERS, "x"))
        t = value
        ways = [
            lambda: None,
            lambda: t.double(),
            lambda: t.to(r.choice((torch.float16, torch.bfloat16, torch.int32, torch.int64))),
            lambda: t[..., ::2],
            lambda: t[:-1],
            lambda: t.flip(0),
            lambda: t.transpose(0, -1),
            lambda: t.permute(0, 3, 1, 2) if t.dim() == 4 else t[None],
            lambda: t[:1].expand(t.shape) if t.shape[0] else t,
            lambda: t.flatten(),
            lambda: t.new_empty(0),
            lambda: t.to("meta"),
            lambda: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
            lambda: torch.full_like(t, self.integer(t)) if not t.is_floating_point() else t * 0 + r.choice(NUMBERS),
            lambda: self.alias(t, r.choice(others)),
        ]
        return r.choice(ways)()

    def integer(self, t: Tensor) -> int:
        return self.random.choice([i for i in INTEGERS if torch.iinfo(t.dtype).min <= i <= torch.iinfo(t.dtype).max])

    def alias(self, t: Tensor, other: Tensor) -> Tensor:
        """Like t, in the memory of another argument, at some place."""
        try:
            flat = torch.as_strided(other, (other.numel(),), (1,)).view(t.dtype)
            start = self.random.randrange(max(1, flat.numel() - t.numel() + 1))
            return flat[start : start + t.numel()].view(t.shape)
        except (RuntimeError, ValueError):
            return t

    def arguments(self) -> tuple[str, dict]:
        """The name of an op and good arguments of it."""
        r, shape = self.random, self.shape()
        batch, channels = shape[:2]
        name = r.choice(
            ("noise_fill_", "langevin_update_", "langevin_update", "noise_conditioned_norm_both", "norm_backward")
        )
        dtype = r.choice((torch.float32, torch.bfloat16, torch.float16))
        seed, ids = torch.randint(-(2**62), 2**62, (batch,)), torch.randint(2**56, (batch,))
        if name == "noise_fill_":
            out, kind = self.images(shape).fill_(torch.nan), r.choice(("normal", "uniform"))
            return name, dict(
                out=out, seed=seed, sample_id=ids, draw=r.randrange(2**32), stream=r.randrange(256) << 24, kind=kind
            )
        if name.startswith("langevin"):
            coef, draw = torch.randn(3, 4) * torch.tensor([1, 1, r.choice((0, 1)), 1]), torch.randint(-9, 9, (3,)).int()
            row = torch.randint(3, (batch,))
            given = dict(x=self.images(shape), score=self.images(shape, dtype), coef=coef, draw=draw, row=row)
            if name == "langevin_update":
                return name, given | dict(seed=seed, sample_id=ids, previous=self.images(shape))
            bad_row = torch.full((batch,), 2**63 - 1)
            given |= dict(
                stop=torch.randint(4, (batch,)), seed=seed, sample_id=ids, bad_row=bad_row, previous=self.images(shape)
            )
            return name, given | dict(
                keep=r.choice((None, torch.randn(3, 2))), gain=r.choice((None, torch.rand(batch)))
            )
        groups = r.choice([g for g in (1, 2, 4, channels) if channels % g == 0])
        activation, eps = r.choice(("none", "elu", "relu", "silu")), r.choice((1e-5, 0.1))
        x = self.images(shape, dtype)
        if name == "norm_backward":
            given = dict(grad=self.images(shape, dtype), x=x, gamma=torch.randn(channels), beta=torch.randn(channels))
            return name, given | dict(activation=activation, eps=eps, groups=groups)
        gamma, beta, level = torch.randn(5, channels), torch.randn(5, channels), torch.randint(5, (batch,))
        given = dict(
            x=x, residual=r.choice((None, self.images(shape, dtype))), gamma=gamma, alpha=None, beta=beta, level=level
        )
        return name, given | dict(activation=activation, eps=eps, groups=groups, pool=False, before="none")

    def one(self) -> bool:
        """Make a call; whether it was accepted. Raises AssertionError."""
        name, arguments = self.arguments()
        tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
        for wrong in self.random.sample(list(arguments), self.random.choice((0, 1, 1, 2))):
            arguments[wrong] = self.spoiled(arguments[wrong], tensors)
        before = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        try:
            found = getattr(torch.ops.sgm_engine, name)(**arguments)
        except REFUSALS as error:
            own = not str(error).startswith("sgm_engine::")  # else torch's word on a type that the schema does not have
            assert not own or "\n" not in str(error).strip() or "meta" in str(error), (
                f"{name}: more than a line: {error}"
            )
            return False
        if any(isinstance(v, Tensor) and v.device.type == "meta" for v in arguments.values()):
            return False
        agree(name, arguments, before, found)
        return True


def close(found: Tensor, want: Tensor, name: str, tolerance: float) -> None:
    found, want = found.detach().double(), want.detach().double()
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0
    torch.testing.assert_close(
        found, want, rtol=tolerance, atol=tolerance * (scale + 1), equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def huge(value) -> bool:
    """Whether it is a tensor of numbers some of which are finite and beyond 1e18."""
    given = isinstance(value, Tensor) and value.is_floating_point()
    return given and bool((value.isfinite() & (value.abs() > 1e18)).any())


def agree(name: str, arguments: dict, before: dict, found) -> None:
    """Raises AssertionError unless the accepted call gave what the reference gives of the arguments as they were."""
    from sgm_engine.kernels import reference

    b = before
    if name == "noise_fill_":
        want = reference.noise(b["out"].shape, b["seed"], b["sample_id"], b["draw"], b["stream"], b["kind"])
        assert torch.equal(arguments["out"], want), "noise_fill_: other bits"
    elif name.startswith("langevin"):
        x, row, draw = b["x"], b["row"], b["draw"].long() % 2**32
        live = row < b["stop"] if "stop" in b else torch.ones_like(row, dtype=torch.bool)
        at = row.where(live, 0)  # an idle slot's row may be anything
        z = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i in range(len(x)):
            if live[i]:
                one = slice(i, i + 1)
                z[one] = reference.noise(x[one].shape, b["seed"][one], b["sample_id"][one], int(draw[at[i]]))
        y = reference.langevin_update(x, b["score"].float(), b["coef"], at, z, b["previous"], b.get("gain"))
        y = torch.where(live[:, None, None, None], y, x)
        if y.isfinite().all():  # else 0·∞ is what a term that is left out would give
            close(found if name == "langevin_update" else arguments["x"], y, name, 1e-5)
        if "stop" in b:
            assert torch.equal(arguments["row"], row + live), "langevin_update_: other rows"
    elif any(map(huge, b.values())):
        return  # squares and products that float32 cannot hold
    elif name == "norm_backward":
        x, gamma, beta = (None if b[k] is None else b[k].double().requires_grad_() for k in ("x", "gamma", "beta"))
        y = reference.noise_conditioned_norm(x, gamma, None, beta, None, b["activation"], None, b["eps"], b["groups"])
        (dx,) = torch.autograd.grad(y, x, b["grad"].double())
        if dx.isfinite().all() and dx.abs().amax() < 1e3 if dx.numel() else False:
            close(found[0], dx, name, 2e-2 if b["x"].dtype != torch.float32 else 1e-3)
    else:
        options = {
            k: b[k]
            for k in ("gamma", "alpha", "beta", "level", "activation", "residual", "eps", "groups", "before", "pool")
        }
        doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
        y = reference.noise_conditioned_norm(b["x"].double(), **doubled)
        y = y[0] if isinstance(y, tuple) else y
        if y.isfinite().all() and y.abs().max() < 1e3 if y.numel() else False:
            close(found[0], y, name, 5e-2 if b["x"].dtype != torch.float32 else 1e-3)


def main() -> int:
    parser = Program("tests.fuzz.ops", __doc__.splitlines()[0])
    parser.add_argument("--seconds", type=positive, default=10, metavar="X", help="of running")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="another one, other calls")
    parser.add_argument("--module", metavar="PATH", help="the path of another build of sgm_engine._C")
    arguments = parser.parse_args()
    if arguments.module:
        use(arguments.module)
    import sgm_engine.kernels.ops  # noqa: F401 - registers them

    end, seed, accepted = time.monotonic() + arguments.seconds, 10**6 * arguments.seed, 0
    while time.monotonic() < end:
        try:
            accepted += Calls(seed).one()
        except AssertionError as error:
            print(f"call {seed}: {error}", file=sys.stderr)
            return 1
        seed += 1
    print(f"ops: {seed - 10**6 * arguments.seed} calls, {accepted} of them accepted and right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
