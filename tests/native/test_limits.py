"""Numbers that no network has, told to the native executor: refused in words, or computed as they should be."""

import pytest
import torch
from torch import nn

from sgm_engine import _C
from sgm_engine.executors.native.graph import Graph

MOST = 2**31 - 1
I64 = torch.int64


def executor(batch=2):
    return _C.NativeExecutor(batch, _C.Precision.direct)


def conv(e, c_in, c_out, kernel, dilation, stride, padding):
    return e.conv(c_in, c_out, kernel, dilation, stride, 1, 1, (padding,) * 4, _C.Border.zeros, False, 0)


def layer(e, op, x, second, out, kernel=-1, first=0):
    e.layer(op, x, second, out, [], -1, kernel, -1, _C.Activation.none, 0, 1, 0, first)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda e: conv(e, 3, 3, 65536, 1, 1, 0),
            "kernel must be from 1 to 7, got 65536",
        ),  # its square is 0 in 32 bits
        (lambda e: conv(e, 3, 3, 3, 1, 1, 2**30), "padding must be from 0 to 65536"),
        (lambda e: conv(e, 3, 3, 3, MOST, 1, 1), "dilation must be from 1 to 65536"),
        (lambda e: conv(e, 3, 3, 3, 1, MOST, 1), "stride must be from 1 to 65536"),
        (lambda e: conv(e, MOST, 3, 3, 1, 1, 1), "c_in must be from 1 to 1048576"),
        (lambda e: conv(e, 3, MOST, 3, 1, 1, 1), "c_out must be from 1 to 1048576"),
        (lambda e: e.tensor(MOST, 8, 8), "a tensor's channels must be from 1 to 1048576, got 2147483647"),
        (lambda e: e.tensor(3, MOST, 1), "a tensor's height must be from 1 to 65536"),
        (
            lambda e: e.tensor(3, 65536, 65536),
            r"a tensor's height \* width must be from 1 to 134217728, got 4294967296",
        ),
        (lambda e: e.norm(MOST, MOST, 0, False, 1e-5), "a norm's channels must be from 1 to 1048576"),
        (lambda e: e.norm(8, 8, MOST, False, 1e-5), "a norm's levels must be from 0 to 16777216"),
        (lambda e: e.norm(2**20, 1, 2**24, False, 1e-5), "the network is too large"),
        (lambda e: e.norm(8, 8, 0, False, float("nan")), "eps, floor and after must be at least 0, got nan"),
        (lambda e: e.embedding(MOST, 8, 8, 1, []), "an embedding's channels must be from 1"),
        (lambda e: e.embedding(1, 8, 8, 1, [0] * 17), "the number of octaves must be from 0 to 16, got 17"),
        (lambda e: (e.embedding(1, 8, 8, 1, []), e.embedding(1, 64, 64, 1, [])), r"embedding\(\) twice"),
        (lambda e: executor(0), "batch must be from 1"),
    ],
)
def test_sizes_are_refused(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(executor())


def test_a_slice_beyond_the_end_of_32_bits():
    e = executor()
    x, y = e.tensor(16, 4, 4), e.tensor(8, 4, 4)
    with pytest.raises(ValueError, match="its input has 16 channels"):
        layer(e, _C.Op.slice, x, -1, y, first=MOST)


def small(batch=2, channels=1):
    """A planned graph, one convolution of x [B, channels, 4, 4], and that."""
    torch.manual_seed(0)
    conv, graph = nn.Conv2d(channels, channels, 3, padding=1), Graph(batch, "float32")
    graph.store(graph.load(channels, 4, 4), conv)
    graph.plan()
    return graph, conv


def test_a_batch_of_all_that_an_integer_holds():
    x, level = torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=I64)
    want = small(3)[0].run(x, level, torch.full_like(x, torch.nan))
    assert torch.equal(small(MOST)[0].run(x, level, torch.full_like(x, torch.nan)), want)


def chain(row, stop, steps, sample_id=0, rows=2):
    """One slot of the small network; returns its row."""
    x, score = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), torch.nan)
    coef, draw, level = torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=I64)
    slots = {"row": row, "stop": stop, "seed": 0, "sample_id": sample_id, "bad_row": 2**63 - 1}
    tensors = {name: torch.tensor([value], dtype=I64) for name, value in slots.items()}
    tensors |= {"x": x, "score": score, "coef": coef, "draw": draw, "level": level}
    native = small()[0].native
    native.run_steps(slots=1, nhwc=False, rows=rows, steps=steps, **{k: t.data_ptr() for k, t in tensors.items()})
    return tensors["row"].item()


def test_steps_without_end_stop_where_the_slot_stops():
    assert chain(0, 2, 2**63 - 1) == 2
    assert chain(1, 2, 2**63 - 1) == 2
    assert chain(0, 2, -(2**63)) == 0
    assert chain(5, 2, 2**63 - 1) == 5  # idle


@pytest.mark.parametrize(
    "row, stop, steps", [(1, 2**63 - 1, 2**63 - 1), (0, 3, 2**63 - 1), (-1, 2, 1), (-(2**63), 2**63 - 1, 5)]
)
def test_rows_outside_the_table(row, stop, steps):
    with pytest.raises(IndexError, match=r"slot 0 would run rows .*, but the table has rows 0 to 1"):
        chain(row, stop, steps)


@pytest.mark.parametrize("sample_id", [-1, 2**56])
def test_ids_of_a_chain(sample_id):
    with pytest.raises(ValueError, match=r"sample_id must be in \[0, 2\^56\)"):
        chain(0, 2, 1, sample_id)


def described(e, *ops):
    """Layers of 1 channel and 4×4 pixels, one after the other; returns the executor."""
    last = -1
    for op in ops:
        end = op == _C.Op.store
        kernel = conv(e, 1, 1, 1, 1, 1, 0) if end or op == _C.Op.conv else -1
        out = -1 if end else e.tensor(1, 4, 4)
        layer(e, op, -1 if op == _C.Op.load else last, -1, out, kernel)
        last = last if end else out
    return e


def test_an_executor_whose_plan_failed_does_nothing():
    e = described(executor(), _C.Op.load, _C.Op.conv)  # no store
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="the last a store"):
        e.plan()
    with pytest.raises(RuntimeError, match="run before plan"):
        e.run(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1)
    e = executor()
    a, b, out = (e.tensor(1, 4, 4) for _ in range(3))
    layer(e, _C.Op.load, -1, -1, a)
    layer(e, _C.Op.concat, a, b, e.tensor(2, 4, 4))  # nothing wrote b
    layer(e, _C.Op.store, a, -1, out, conv(e, 1, 1, 1, 1, 1, 0))
    with pytest.raises(ValueError, match="reads a tensor that no layer wrote"):
        e.plan()
    for call in (e.plan, lambda: e.tensor(1, 4, 4), lambda: e.run(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1)):
        with pytest.raises(RuntimeError, match="plan"):
            call()


def test_nothing_runs_before_its_weights_are_set():
    e, x = described(executor(), _C.Op.load, _C.Op.store), torch.zeros(1, 1, 4, 4)
    e.plan()
    with pytest.raises(RuntimeError, match=r"run before set_conv\(\) of convolution 0"):
        e.run(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1)


def test_what_reads_x_or_writes_the_score_beyond_its_end():
    store = _C.Op.store
    with pytest.raises(ValueError, match="only the last layer may store the score"):
        described(executor(), _C.Op.load, store, store).plan()
    e = executor()
    for size in (4, 64):
        layer(e, _C.Op.load, -1, -1, e.tensor(1, size, size))
    layer(e, store, 0, -1, -1, conv(e, 1, 1, 1, 1, 1, 0))
    with pytest.raises(ValueError, match="read x as the first layer does"):
        e.plan()


def test_a_planned_executor_keeps_its_description():
    native = small()[0].native
    for call in (lambda: native.tensor(1, 4, 4), lambda: native.embedding(1, 512, 512, 1, []), native.plan):
        with pytest.raises(RuntimeError, match=r"after plan\(\)"):
            call()
