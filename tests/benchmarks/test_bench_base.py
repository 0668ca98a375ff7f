"""``pytest bench/ --base``: what it decides on a machine that drifts and stutters, and what it says when it cannot."""

import itertools
import json
import math
import random
import statistics
import subprocess

import pytest

from bench import history, instructions, plants, registers, trees, verdicts
from bench.compare import ABOVE, BELOW, LIVES, CannotRun, Row, Tree, command, counted, decide, environment, more, rounds
from bench.sequential import bounds, evidence, needed


def test_evidence_is_a_fair_bet():
    """At even odds its mean stays 1, and it reaches 1/α within 300 coins with a probability of at most α."""
    for n in (1, 2, 5, 20):
        assert sum(math.comb(n, k) / 2**n * evidence(k, n) for k in range(n + 1)) == pytest.approx(1)
    for alpha in (ABOVE[1], BELOW[1]):
        alive, reached = {0: 1.0}, 0.0  # how many fell above → probability, not having reached 1/α
        for n in range(1, 301):
            after: dict[int, float] = {}
            for k, p in alive.items():
                for above in (k, k + 1):
                    after[above] = after.get(above, 0) + p / 2
            reached += sum(p for k, p in after.items() if k >= needed(n, alpha))
            alive = {k: p for k, p in after.items() if k < needed(n, alpha)}
        assert 0.1 * alpha < reached <= alpha


def test_bounds():
    assert bounds([1.0] * 5, 0.03) == (0.0, math.inf)
    assert [needed(n, 0.03) for n in (7, 8)] == [8, 8]  # eight coins that agree are the fewest that tell
    low, high = bounds([float(i) for i in range(100)], 0.001)
    assert low + high == 99 and 20 < low < 40


def machine(seed, slower=1.0, process=0.012, noise=0.03, seconds=0.7, now=None):
    """Rounds as a busy machine gives them: speed that wanders by some per cent a second and has bursts, processes and
    their children that are some per cent slower for as long as they live, turns that are off by a few per cent and now
    and then by half."""
    draw, speed, burst = random.Random(seed), 1.0, 0
    for number in itertools.count():
        if number % LIVES == 0:
            parents = [draw.gauss(0, process / 2) for _ in range(2)]
        lives = [math.exp(parent + draw.gauss(0, process)) for parent in parents]
        pairs = []
        for _ in range(5):
            times = [0.0, 0.0]
            for i in draw.sample((0, 1), 2):
                speed *= math.exp(draw.gauss(0, 0.01))
                burst = burst - 1 if burst else 7 * (draw.random() < 0.02)
                off = noise if draw.random() < 0.9 else 0.3
                times[i] = speed * lives[i] * math.exp(abs(draw.gauss(0, off))) * (1.4 if burst else 1.0)
            pairs.append((times[0], times[1] * slower))
        if now is not None:
            now[0] += seconds
        yield statistics.median(b / a for a, b in pairs), *map(list, zip(*pairs, strict=True))


def verdict(seed, slower, **options):
    now = [0.0]
    return decide(machine(seed, slower, now=now, **options), 55.0, lambda: now[0]).verdict


@pytest.mark.parametrize(("process", "noise"), [(0.005, 0.02), (0.012, 0.03), (0.02, 0.06)])
def test_the_gate_tells_five_per_cent_from_none(process, noise):
    options = {"process": process, "noise": noise}
    unchanged = [verdict(seed, 1.0, **options) for seed in range(200)]
    assert unchanged.count("SLOWER") == 0
    assert unchanged.count("ok") >= 190
    assert sum(verdict(seed, 1.10, **options) == "SLOWER" for seed in range(60)) == 60
    if noise < 0.06:  # beyond that, five per cent may take longer than a minute: it says so
        assert sum(verdict(seed, 1.05, **options) == "SLOWER" for seed in range(100)) >= 95
    assert sum(verdict(seed, 1.05, **options) == "ok" for seed in range(100)) == 0


def test_a_minute_is_the_most():
    now = [0.0]
    row = decide(machine(0, 1.025, process=0.05, now=now), 10.0, lambda: now[0])
    assert row.verdict == "undecided" and not row.fails and now[0] < 12


@pytest.fixture(scope="module")
def live():
    pair = [Tree(trees.ROOT, whose) for whose in ("base", "this tree")]
    yield pair
    for tree in pair:
        tree.close()
        assert tree.process.returncode == 0


def test_live_processes(live):
    taken = rounds(*live, "noise 32x3x32x32")
    ratio, base, head = next(taken)
    assert len(base) == len(head) >= 5 and 0.2 < ratio < 5 and 1e-6 < min(base) < 1
    taken.close()
    with pytest.raises(CannotRun, match="base: KeyError: 'no such workload'"):
        live[0].counts("no such workload")
    assert next(rounds(*live, "noise 32x3x32x32")), "the process does not live on"


def test_counts_of_live_processes(live):
    (row,) = counted(*live, "packed NCSN ngf 64")
    assert (row.verdict, row.base) == ("ok", row.head) and row.base > 1e6


def test_a_tree_that_cannot_start(tmp_path):
    with pytest.raises(CannotRun, match="base: RuntimeError: sgm_engine is that of"):
        Tree(tmp_path, "base")


def test_more_is_more():
    one, two = more("m", {"bytes": 100, "gone": 1, "calls": 0}, {"bytes": 106, "new": 1, "calls": 1}, 1.05)
    assert (one.name, one.verdict, one.ratio) == ("m: bytes", "MORE", 1.06)
    assert (two.name, two.verdict) == ("m: calls", "MORE")
    assert more("m", {"a": 100}, {"a": 105}, 1.05)[0].verdict == "ok"
    assert more("m", {"a": 1}, {"b": 1}, 1.0)[0].verdict == "new"


def test_kernels_are_worse_by_units_of_registers_by_any_spill_and_by_instructions():
    kernel = {"registers": 32, "spills": 0, "PTX instructions": 100}
    worse = {"a": {"registers": 33}, "b": {"spills": 1}, "c": {"PTX instructions": 103}, "d": {"PTX instructions": 101}}
    before = dict.fromkeys(("a", "b", "c", "d", "gone"), kernel) | {"e": {"registers": 25}}
    after = {name: kernel | changed for name, changed in worse.items()} | {"e": {"registers": 32}, "new": kernel}
    total, *rows = registers.rows(before, after)
    assert [row.name for row in rows if row.fails] == ["a: registers", "b: spills", "c: PTX instructions"]
    assert (total.base, total.head, total.verdict) == (6, 6, "ok")
    ptx = ".reg .b32 %r<3>;\n$L__BB0_1:\n\tadd.s32 \t%r1, %r2, 1;\n\t@%p1 bra \t$L__BB0_1;\n\tret;\n}\n"
    assert registers.instructions(ptx) == 3


def test_a_profile_is_read():
    profile = (
        "fn=(1) main\n1 5\ncfn=(2) malloc\ncalls=3 7\n1 9\ncfn=(3) free\ncalls=2 7\n1 1\ncfn=(2)\ncalls=4 7\n1 1\n"
    )
    assert instructions.read(profile + "totals: 1234\n") == {"instructions": 1234, "allocations": 7}


def test_the_table():
    rows = [Row("fine", "ok", "8 rounds", "ms", 1.0, 1.0, 1.0, 0.99, 1.01), Row("missing", "new", "base: no such name")]
    rows += [
        Row("bad", "SLOWER", "20 rounds", "ms", 1.0, 1.1, 1.1, 1.08, 1.13),
        Row("fat", "MORE", "", "", 1e6, 2e6, 2.0),
    ]
    first, *lines, last = verdicts.lines(rows, "0123456789abcdef")
    assert "0123456789ab:" in first and "load" in first
    assert [line.split()[1] for line in lines] == ["bad", "fat", "missing", "fine"]
    assert "1.100 [1.080, 1.130]" in lines[0] and "1,000,000 → 2,000,000" in lines[1]
    assert last == "1 SLOWER, 1 MORE, 1 new, 1 ok"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A tree whose C++ is a file that setup.build writes."""
    monkeypatch.setattr(trees, "ROOT", tmp_path)
    monkeypatch.setattr(trees, "KEPT", tmp_path / "build" / "base")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "sgm_engine").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("one")
    (tmp_path / "sgm_engine" / "a.py").write_text("")
    (tmp_path / "setup.py").write_text(
        "import pathlib\nROOT = pathlib.Path(__file__).parent\n"
        "def build(root):\n    (root / 'build').mkdir(exist_ok=True)\n"
        "    (root / 'sgm_engine' / '_C.so').write_text((root / 'csrc' / 'a.cpp').read_text())\n"
    )
    (tmp_path / ".gitignore").write_text("build/\n*.so\n")

    def git(*arguments):
        user = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *user, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q", "-b", "main"), git("add", "."), git("commit", "-qm", "one")
    return tmp_path, git


def test_a_base_is_built_once_and_kept(repository, monkeypatch):
    root, git = repository
    commit = trees.revision("HEAD")
    (root / "csrc" / "a.cpp").write_text("two")
    assert (trees.head() / "sgm_engine" / "_C.so").read_text() == "two"
    base = trees.base(commit)
    assert (base / "sgm_engine" / "_C.so").read_text() == "one"
    monkeypatch.setattr(trees, "BUILD", ["false"])
    assert trees.base(commit) == base, "it was built again"
    (root / "csrc" / "a.cpp").write_text("one")
    git("commit", "-qm", "Python", "--allow-empty")
    copied = trees.base(trees.revision("HEAD"))  # the same C++: not built at all
    assert (copied / "sgm_engine" / "_C.so").read_text() == "two" and copied != base
    assert trees.kept(base, "a case", lambda: None) is None
    assert trees.kept(base, "a case", lambda: {"a": 1}) == trees.kept(base, "a case", lambda: {"a": 2}) == {"a": 1}


def test_what_cannot_be_compared_is_said(repository, monkeypatch):
    root, git = repository
    with pytest.raises(trees.CannotCompare, match="--base HEAD~1: there is no such commit here"):
        trees.revision("HEAD~1")
    assert trees.revision(trees.AUTO) == trees.revision("HEAD")
    git("branch", "-m", "other")
    with pytest.raises(trees.CannotCompare, match="no main to compare with"):
        trees.revision(trees.AUTO)
    commit = trees.revision("HEAD")
    (root / "setup.py").write_text("def build(root): raise SystemExit('no compiler')\nROOT = ''\n")
    with pytest.raises(trees.CannotCompare, match="no compiler"):
        trees.head()
    git("commit", "-qam", "broken")
    (root / "setup.py").write_text("")
    with pytest.raises(trees.CannotCompare, match="no compiler"):
        trees.base(trees.revision("HEAD"))
    assert not list(trees.KEPT.glob("*")), commit
    monkeypatch.setitem(__import__("sys").modules, "pybind11", None)
    with pytest.raises(trees.CannotCompare, match=r"pybind11.* is missing: pip install 'sgm-engine\[test\]'"):
        trees.head()


def test_a_shallow_clone_says_how_to_deepen_it(repository, tmp_path_factory, monkeypatch):
    root, git = repository
    git("commit", "-qm", "two", "--allow-empty")
    clone = tmp_path_factory.mktemp("clone") / "it"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{root}", str(clone)], check=True)
    monkeypatch.setattr(trees, "ROOT", clone)
    with pytest.raises(trees.CannotCompare, match="this clone is shallow: git fetch --deepen"):
        trees.revision("HEAD~1")


def test_a_trailer_accepts(repository):
    _, git = repository
    commit = trees.revision("HEAD")
    git(
        "commit",
        "--allow-empty",
        "-qm",
        "Exact sums\n\nIn double.\n\nSlower: norm f32* because the sums are exact\nSlower: all",
    )
    assert trees.accepted(commit) == {"norm f32*": "the sums are exact"}, "one without a reason accepts nothing"
    assert trees.accepted("HEAD") == {}


def test_small_steps_add_up(tmp_path, monkeypatch):
    kept = [
        {"date": f"2026-01-0{i}", "base": f"c{i}", "head": f"c{i + 1}", "ratios": {"norm": 1.03, "other": 1.0}}
        for i in (2, 1, 3)
    ]
    found = history.lines(kept)
    assert [commit for commit, _ in found["norm"]] == ["c1", "c2", "c3", "c4"]
    assert found["norm"][-1][1] == pytest.approx(1.03**3)
    monkeypatch.setattr(history, "FOLDER", tmp_path / "base")
    assert history.main() == 2
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.json").write_text(json.dumps(kept[0]))
    assert history.main() == 0
    for i, comparison in enumerate(kept):
        (tmp_path / "base" / f"{i}.json").write_text(json.dumps(comparison))
    assert history.main() == 1
    assert (tmp_path / "base.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [*plants.PLANTS, "memory"])
def test_plants_still_fit(name):
    plant = plants.PLANTS.get(name, plants.MEMORY)
    text = (trees.ROOT / plant.file).read_text()
    with_it = plants.edited(plant, text)
    assert plant.key in with_it and "EVERY" not in with_it
    if plant.file.endswith(".py"):
        compile(with_it, plant.file, "exec")
    with pytest.raises(ValueError, match="adapt the plant"):
        plants.edited(plant, "")


def test_limits_of_a_probability():
    """Of Clopper and Pearson: 20 of 20 and 0 of 50 have 0.025^(1/n) for the one that is not 0 or 1."""
    assert plants.limits(20, 20) == pytest.approx((0.025 ** (1 / 20), 1))
    assert plants.limits(0, 50) == pytest.approx((0, 1 - 0.025 ** (1 / 50)))
    assert plants.limits(2, 10) == pytest.approx((0.02521, 0.55610), abs=1e-4)


def test_a_recorded_network_runs_without_pytorch(tmp_path):
    """What callgrind counts: what Python told the C++ executor, told again by a process that has not imported torch."""
    file, env = tmp_path / "recording", environment(trees.ROOT)
    subprocess.run(command("instructions", "record", "cdm", file), env=env, cwd=trees.ROOT, check=True)
    for what in ("evaluate", "pack"):
        again = command("instructions", f"{what} cdm", 2, file)
        again[2] += "; assert 'torch' not in sys.modules"
        subprocess.run(again, env=env, cwd=trees.ROOT, check=True)
