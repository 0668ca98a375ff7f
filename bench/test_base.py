"""``pytest bench/ --base REV``: this tree against REV, workload by workload and count by count. docs/benchmarks.md."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from bench import instructions, registers, trees
from bench.common import about
from bench.compare import NOT_COMPARED, CannotRun, Row, Tree, command, compare, counted, environment, more
from bench.counts import COUNTS
from bench.workloads import WORKLOADS

pytestmark = pytest.mark.base
NOW = [0.0]


def clock() -> float:
    """What pytest-benchmark reads: the seconds that turns took, elsewhere."""
    return NOW[0]


def advance(turns: Iterator[float]) -> None:
    NOW[0] += next(turns)


@pytest.fixture(scope="session")
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Tree, Tree]]:
    """Base and head, live."""
    try:
        head = trees.head()
        live = [Tree(trees.base(request.config.base_commit), "base"), Tree(head, "this tree")]
    except (trees.CannotCompare, CannotRun) as why:
        pytest.exit(f"NOT COMPARED: {why}", returncode=NOT_COMPARED)
    yield tuple(live)
    for tree in live:
        tree.close()


@pytest.fixture
def judge(request: pytest.FixtureRequest, benchmark):
    """judge(rows): into the table and into pytest-benchmark's file; fails with those that are worse."""
    config = request.config

    def accepted(row: Row) -> Row:
        reasons = (why for pattern, why in config.base_accepted.items() if fnmatch.fnmatchcase(row.name, pattern))
        if row.fails and (reason := next(reasons, None)):
            row.verdict, row.note = "accepted", f"{row.verdict}: {reason}"
        return row

    def judge(rows: list[Row]) -> None:
        config.base_rows += map(accepted, rows)
        fields = ("verdict", "unit", "base", "head", "ratio", "low", "high")
        benchmark.extra_info |= about() | {"base": config.base_commit}
        known = lambda value: value if isinstance(value, str) or math.isfinite(value) else None  # noqa: E731 - in JSON
        benchmark.extra_info["rows"] = {row.name: {name: known(getattr(row, name)) for name in fields} for row in rows}
        turns = rows[0].turns or [0.0]
        benchmark.pedantic(advance, (iter(turns),), rounds=len(turns))
        worse = [f"{row.name} is {row.ratio:.3f} times the base's" for row in rows if row.fails]
        if worse:
            pytest.fail("; ".join(worse), pytrace=False)

    return judge


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.quick if w.quick else ()) for name, w in WORKLOADS.items()]
)
def test_time(name, both, judge, request):
    try:
        judge([compare(*both, name, request.config.getoption("--seconds"))])
    except CannotRun as why:
        pytest.fail(str(why), pytrace=False)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", COUNTS)
def test_count(name, both, judge):
    try:
        judge(counted(*both, name))
    except CannotRun as why:
        pytest.fail(str(why), pytrace=False)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("case", instructions.CASES)
def test_instructions(case, both, judge):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind, which counts instructions, is not installed")
    base, head = both
    count = lambda tree: instructions.count(case, environment(tree.root), command)  # noqa: E731
    after = count(head)
    assert after is not None, "this tree cannot run it"
    judge(more(case, trees.kept(base.root, case, lambda: count(base)) or {}, after, 1.01))


@pytest.mark.benchmark(timer=clock)
def test_gpu_kernels(both, judge):
    """Registers, spills and PTX instructions of every kernel that both have, compiled for sm_90."""
    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

    def compiled(tree: Tree) -> dict[str, dict[str, int]] | None:
        run = command("registers", tree.root / "csrc")
        done = subprocess.run(run, env=environment(tree.root), cwd=tree.root, capture_output=True, text=True)
        return None if done.returncode else json.loads(done.stdout)

    base, head = both
    after, before = compiled(head), trees.kept(base.root, "kernels", lambda: compiled(base))
    assert after is not None, "this tree's kernels do not compile"
    judge(registers.rows(before or {}, after))
