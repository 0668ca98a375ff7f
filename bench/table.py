"""The table of peers: rows kept in bench/results/peers.json, written as Markdown and drawn as a chart beside it.

``python -m bench.table`` writes both again from the rows, with ``--readme`` the README's table too. A row replaces an
older one of the same case and device, so that a table can be made in several runs; each has its own date and commit.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path

from bench.common import Ratio
from bench.peers import PEERS
from sgm_engine.programs.arguments import Program

FOLDER = Path(__file__).parent / "results"
README, MARKS = FOLDER.parent.parent / "README.md", ("<!-- peers -->", "<!-- end of peers -->")
CASE = ("network", "batch", "dtype", "threads", "device")


def load() -> list[dict]:
    file = FOLDER / "peers.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for row in rows:
        row["ratios"] = {name: Ratio(**ratio) for name, ratio in row["ratios"].items()}
    return rows


def keep(row: dict) -> None:
    """Add the row to the file, in place of an older one of its case."""
    case = [row[key] for key in CASE]
    row["date"] = datetime.date.today().isoformat()
    rows = [other for other in load() if [other[key] for key in CASE] != case]
    rows = sorted([*rows, row], key=lambda r: [r["device"], r["threads"], r["network"], len(r["dtype"]), r["batch"]])
    FOLDER.mkdir(exist_ok=True)
    for_json = [r | {"ratios": {name: asdict(ratio) for name, ratio in r["ratios"].items()}} for r in rows]
    part = FOLDER / "peers.json.part"
    part.write_text(json.dumps(for_json, indent=1) + "\n")
    part.replace(FOLDER / "peers.json")


def line(row: dict) -> str:
    ratios = ", ".join(f"{name} {ratio}" for name, ratio in row["ratios"].items())
    threads = f"{row['threads']} thread" + "s" * (row["threads"] > 1)
    return f"{row['network']} B={row['batch']} {row['dtype']} {threads}: {row['ms']:.1f} ms; {ratios}"


def markdown(rows: list[dict]) -> str:
    """One table a device and number of threads."""
    text = [
        "# The CPU executor against its peers",
        "",
        "The peer's time over ours for one network evaluation, median of interleaved rounds with a 95% interval: above",
        "1 we are faster. `pytest bench/ --peers` writes this file. TFLOP/s and their share of what the multiply-add",
        "units can do are nominal: the operations of direct convolution, of which Winograd needs a quarter.",
        "",
    ]
    names = list(PEERS)
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        some = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        clock = "one thread, CPU time" if threads == 1 else f"{threads} threads, wall time"
        dates = " to ".join(dict.fromkeys([min(r["date"] for r in some), max(r["date"] for r in some)]))
        text += [f"## {device}; {clock}", "", f"torch {some[0]['torch']}; {dates}", ""]
        text += ["| network | batch | precision | ours, ms | TFLOP/s | of peak | " + " | ".join(names) + " |"]
        text += ["|" + "---|" * (6 + len(names))]
        for row in some:
            cells = [str(row["ratios"].get(name, "—")) for name in names]
            share = row["share of multiply-add peak"]
            first = [row["network"], row["batch"], row["dtype"], row["ms"], f"{row['TFLOP/s']:.3f}", f"{share:.2f}"]
            text.append("| " + " | ".join(map(str, [*first, *cells])) + " |")
        reasons = {f"{name}: {reason}" for row in some for name, reason in row["left out"].items()}
        text += ["", *(f"— {reason}." for reason in sorted(reasons)), ""]
    return "\n".join(text)


def main_device(rows: list[dict]) -> list[dict]:
    """The rows of the device that most of them come from."""
    devices = [row["device"] for row in rows]
    return [row for row in rows if row["device"] == max(set(devices), key=devices.count)]


def short(rows: list[dict], threads: int = 1) -> str:
    """The README's table: medians, batch 1, 8 and 32 in one cell."""
    names = ["OpenVINO", "ONNX Runtime", "torch.compile, freezing", "eager, channels-last"]
    rows = [row for row in main_device(rows) if row["dtype"] == "float32"]
    text = ["| network | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for network in dict.fromkeys(row["network"] for row in rows if row["threads"] == threads):
        some = [r for r in rows if (r["network"], r["threads"]) == (network, threads)]
        cells = []
        for name in names:
            found = {r["batch"]: r["ratios"][name].median for r in some if name in r["ratios"]}
            cells.append(" / ".join(f"{found[b]:.1f}" if b in found else "–" for b in (1, 8, 32)) if found else "")
        text.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def write_readme(file: Path = README) -> None:
    """Put ``short`` between the README's two marks."""
    before, mark, rest = file.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"{file} lacks the marks {MARKS[0]} and {MARKS[1]}")
    file.write_text(f"{before}{mark}\n{short(load())}\n{end}{after}")


def chart(rows: list[dict], file: Path, batch: int = 8) -> None:
    """Bars: how many times longer each peer takes, at one batch and thread, on one device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    some = [row for row in main_device(rows) if row["batch"] == batch and row["threads"] == 1]
    if not some:
        return
    dtypes = [row["dtype"] for row in some]
    most, dtypes = max(map(dtypes.count, dtypes)), list(dict.fromkeys(dtypes))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 0.7 + 0.7 * most), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        panel = [row for row in some if row["dtype"] == dtype]
        names = [name for name in PEERS if any(name in row["ratios"] for row in panel)]
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [j + (i - (len(names) - 1) / 2) * height for j, row in enumerate(panel) if name in row["ratios"]]
            values = [row["ratios"][name].median for row in panel if name in row["ratios"]]
            bars = axis.barh(at, values, height * 0.92, label=name, color=f"C{list(PEERS).index(name)}")
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(panel)), [row["network"] for row in panel])
        axis.set_title(f"{dtype}, batch {batch}, one thread", fontsize=10)
        axis.set_xlabel("time of one evaluation; sgm-engine = 1")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
        axis.invert_yaxis()
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def write() -> list[Path]:
    """peers.md and peers.png from the rows; the files."""
    rows = load()
    if not rows:
        return []
    (FOLDER / "peers.md").write_text(markdown(rows))
    chart(rows, FOLDER / "peers.png")
    return [FOLDER / f"peers.{kind}" for kind in ("json", "md", "png")]


if __name__ == "__main__":
    parser = Program("bench.table", __doc__)
    parser.add_argument("--readme", action="store_true", help="write the README's table too")
    readme = parser.parse_args().readme
    print(*write(), sep="\n")
    if readme:
        write_readme()
