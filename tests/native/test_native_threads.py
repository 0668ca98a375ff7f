"""Threads that share a native network, and threads that do not start: every answer is right, or an error."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sgm_engine import _C
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.integrations.deepinv import Denoiser
from sgm_engine.models import NCSN

ROOT = Path(__file__).parent.parent.parent

SHORTAGE = """
import resource, torch
from sgm_engine import Engine, _C, annealed_langevin
from sgm_engine.kernels import ops
from sgm_engine.models import NCSN

torch.manual_seed(0)
sigmas = [1.0, 0.5]
model = NCSN(sigmas, channels=1, ngf=4, image_size=8).eval()
plan, n = annealed_langevin(sigmas, 2, 1e-4), [1, 16, 64]
engine = Engine(model, 16, executor="native")
want = {k: engine.sample(k, 1, plan) for k in n}

def short(call):
    _C.set_num_threads(32)  # whose stacks need four times what there is
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.RLIM_INFINITY))
    try:
        call()
    except RuntimeError as error:
        assert "cannot start thread" in str(error) and "set SGM_NUM_THREADS to fewer" in str(error), error
    else:
        raise AssertionError("threads that need 256 MiB of 64 have started")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

for k in n:
    short(lambda: engine.sample(k, 1, plan))
    assert torch.equal(engine.sample(k, 1, plan), want[k]), k
noise, ids = torch.zeros(64, 1, 64, 64), torch.arange(64)
short(lambda: ops.noise_fill_(noise, ids, ids, 0, 0, "normal"))
assert not noise.any()
ops.noise_fill_(noise, ids, ids, 0, 0, "normal")
_C.set_num_threads(1)
alone = torch.empty_like(noise)
ops.noise_fill_(alone, ids, ids, 0, 0, "normal")
assert torch.equal(noise, alone)
print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_after_a_shortage_of_threads_the_next_request_is_right():
    done = subprocess.run([sys.executable, "-c", SHORTAGE], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "right\n", done.stderr[-3000:]


def ncsn():
    torch.manual_seed(0)
    return NCSN([1.0, 0.5, 0.25], channels=1, ngf=4, image_size=8).eval()


@pytest.fixture
def four_threads():
    before = _C.num_threads()
    _C.set_num_threads(4)
    yield
    _C.set_num_threads(before)


def together(*calls):
    """Each of them in a thread of its own, at once; raises what one raised."""
    errors, start = [], threading.Barrier(len(calls))

    def run(call):
        try:
            start.wait()
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_a_native_network(four_threads):
    """Batches of several sizes, whose scratch is laid out anew; weights are packed and threads change meanwhile."""
    model = ncsn()
    network = NativeNetwork(model, 2, 8, 8)
    cases = [(torch.rand(n, 1, 8, 8), torch.arange(n) % 3) for n in (1, 2, 5, 13)]
    want = [network(*case) for case in cases]

    def calls(i):
        for _ in range(20):
            assert torch.equal(network(*cases[i]), want[i]), i

    def packs():
        for i in range(20):
            assert network.sync(force=True) > 0
            _C.set_num_threads(1 + i % 4)

    together(*(lambda i=i: calls(i) for i in range(len(cases))), packs)


def test_threads_share_a_denoiser(four_threads):
    """Of images of several sizes: each call gets the network of its own."""
    denoiser = Denoiser(ncsn())
    cases = [torch.rand(n, 1, size, size) for n, size in ((1, 8), (3, 8), (1, 12), (2, 16))]
    with torch.no_grad():
        want = [denoiser(x, 0.5) for x in cases]

    def calls(x, expected):
        with torch.no_grad():
            for _ in range(5):
                assert torch.equal(denoiser(x, 0.5), expected)

    together(*(lambda pair=pair: calls(*pair) for pair in zip(cases, want, strict=True)))
