"""The network's precisions: what each computes in, and that PyTorch's switches are afterwards what they were."""

import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.network import Network
from sgm_engine.models.ncsn import NCSN
from sgm_engine.numerics import float32_math
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.schedule import geometric
from tests.forks import forks

SIGMAS = geometric(1, 0.1, 3)
PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)


def switches():
    return [torch._C._get_fp32_precision_getter("cuda", op) for op in ("all", "conv", "matmul")]


# A fresh process for each, because PyTorch cannot unset what was set once: what a user may have done before.
USERS = {
    "nothing": "pass",
    "legacy off": "torch.backends.cudnn.allow_tf32 = False",
    "legacy on": "torch.backends.cudnn.allow_tf32 = True; torch.backends.cuda.matmul.allow_tf32 = True",
    "high": "torch.set_float32_matmul_precision('high')",
    "conv ieee": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "conv tf32": "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "all tf32": "torch.backends.cudnn.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "everything": "torch.backends.fp32_precision = 'tf32'",
}
SCRIPT = """
import os, torch
from sgm_engine.numerics import float32_math
ops = [("generic", "all"), ("cuda", "all"), ("cuda", "conv"), ("cuda", "matmul"), ("cuda", "rnn"), ("mkldnn", "conv")]
def state():
    return [torch._C._get_fp32_precision_getter(*op) for op in ops]
def history():
    found = [state()]
    for value in ("ieee", "tf32", "none"):  # whoever followed the general switch must follow it still
        torch.backends.fp32_precision = value
        found.append(state())
    return found
def child(work):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, repr(work()).encode())
        os._exit(0)
    os.wait()
    return os.read(read, 1 << 16).decode()
def scoped(user, value):
    exec(user)
    with float32_math(value):
        inside = state()[2:4]
    return inside, history()
def alone(user):
    exec(user)
    return history()
for name, user in %r.items():
    want = child(lambda: alone(user))
    for value in ("ieee", "tf32"):
        got = child(lambda: scoped(user, value))
        print(name, value, "ok" if got == f"([{value!r}, {value!r}], {want})" else f"wrong: {got}, without us {want}")
"""


@forks
def test_switches_are_afterwards_what_they_were():
    run = subprocess.run([sys.executable, "-c", SCRIPT % USERS], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == 2 * len(USERS), run.stderr
    assert [line for line in lines if not line.endswith(" ok")] == []


def test_switches_after_an_error():
    before = switches()
    with pytest.raises(ZeroDivisionError), float32_math("ieee"):
        assert switches() == ["ieee"] * 3
        raise ZeroDivisionError
    assert switches() == before


def test_threads_take_turns_with_the_switches():
    wrong, ready = [], threading.Barrier(4)

    def caller(value):
        ready.wait()
        for _ in range(200):
            with float32_math(value):
                wrong.extend([value] if switches() != [value] * 3 else [])

    before = switches()
    threads = [threading.Thread(target=caller, args=(value,)) for value in ("ieee", "tf32") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and switches() == before


@pytest.mark.parametrize("precision, expected", [("float32", "ieee"), ("tf32", "tf32")])
def test_what_a_gpu_computes_float32_in(precision, expected):
    """ "float32" is float32, although PyTorch's convolutions on a GPU are TensorFloat-32 unless told otherwise."""
    seen = []

    def model(x, level):
        seen.append(switches())
        return x

    before = switches()
    Network(model, precision, torch.device("cuda"))(torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    assert seen == [[expected] * 3] and switches() == before


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(SIGMAS, channels=1, ngf=16, divide_by_sigma=True, image_size=8).eval()


class Seen(TorchDispatchMode):
    """dtypes: of image, weight and result of every convolution; each weight is taken from memory, not cast there."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten.convolution.default:
            self.dtypes.add((args[0].dtype, args[1].dtype, out.dtype))
        assert func is not torch.ops.aten._to_copy.default or args[0].shape[2:] != (3, 3), "a weight was cast"
        return out


@pytest.mark.parametrize(
    "precision, dtype, most", [("bfloat16", torch.bfloat16, 3e-2), ("float16", torch.float16, 4e-3)]
)
def test_sixteen_bits(net, precision, dtype, most):
    """Convolutions in 16 bits, from weights cast once; as close to float32 as their mantissa lets them be."""
    network, dtype = Network(net, precision, torch.device("cpu")), getattr(torch, precision)
    network.sync()
    x, level = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    with torch.no_grad():
        want = net(x, level)
        seen = Seen()
        with seen:
            got = network(x, level)
    assert seen.dtypes == {(dtype, dtype, dtype)} and net.end_conv.weight.dtype == torch.float32
    error = ((got.float() - want).norm() / want.norm()).item()
    assert 0 < error < most


def test_float16_samples(net):
    with pytest.warns(UserWarning, match="precision='float16' is not one of its own.*executor='eager' runs it"):
        engine = Engine(net, 4, precision="float16")
    x, exact = engine.sample(4, 1, PLAN), Engine(net, 4, executor="eager").sample(4, 1, PLAN)
    assert x.dtype == torch.float32 and ((x - exact).norm() / exact.norm()) < 1e-2
    with torch.no_grad():
        net.end_conv.weight.mul_(2)
    moved = engine.sample(4, 1, PLAN)
    with torch.no_grad():
        net.end_conv.weight.div_(2)
    assert not torch.equal(moved, x)


@pytest.mark.parametrize(
    "precision, options, message",
    [
        ("half", {}, r"precision must be one of \(.*'tf32', .*\), got 'half'"),
        ("tf32", {}, "precision='tf32' needs a CUDA device, got cpu: use precision='float32'"),
        ("float16", {"executor": "native"}, "precision.*float16"),
    ],
)
def test_precisions_that_are_refused(net, precision, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(net, 4, precision=precision, **options)


def test_a_plain_callable_is_not_cast():
    with pytest.raises(ValueError, match=r"precision='float16' needs an nn\.Module"):
        Network(lambda x, level: x, "float16", torch.device("cpu"))
