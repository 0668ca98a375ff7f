"""``python -m tests.fuzz``: damaged files, odd command lines, random calls, in processes with limits.

    python -m tests.fuzz                              everything, 2,000 cases of each part
    python -m tests.fuzz readers --cases 20000        one part
    python -m tests.fuzz --seed 7 --seconds 3600      an hour, another seed

Parts: readers, command, and native (native.py: the C++ and the ops under sanitizers). A case of the first two is
decided by (seed, its number) alone, so ``--seed S --first K --cases 1`` draws case K again. Fails on a crash, on 10 s
without an answer, on more than 1 GB, on an error that is no line for a user, and on an accepted file whose content is
not what the file says.
"""

from __future__ import annotations

import math
import selectors
import subprocess
import sys
import time

from sgm_engine.programs.arguments import Program, at_least, number

PARTS = ("readers", "command", "native")
PATIENCE = 10.0  # seconds for a case


def fuzz(part: str, seed: int, first: int, cases: int, stop: float, limit: float = PATIENCE) -> tuple[int, list[str]]:
    """(cases done, findings). A process that hangs or dies is replaced, and goes on with the next case."""
    findings, case = [], first
    while case < first + cases and time.monotonic() < stop:
        worker = [sys.executable, "-m", "tests.fuzz.worker", part, str(seed), str(case), str(first + cases - case)]
        process = subprocess.Popen(worker, stdout=subprocess.PIPE, bufsize=0)  # nothing waits in a buffer
        lines = selectors.DefaultSelector()
        lines.register(process.stdout, selectors.EVENT_READ)
        patience = 120.0  # it starts PyTorch first
        try:
            while time.monotonic() < stop:
                left = stop - time.monotonic()
                if not lines.select(min(patience, max(left, 0))):
                    if left <= patience:  # the time is up, not the patience
                        break
                    findings.append(f"{part} {case}: no answer within {patience:.0f} s")
                    case += 1
                    break
                line = process.stdout.readline().decode()
                if not line:
                    if process.wait() and case < first + cases:
                        findings.append(f"{part} {case}: the process died with {process.returncode}")
                        case += 1
                    break
                number, _, finding = line.rstrip("\n").partition(" ")
                patience = limit
                if finding == "begins":
                    case = int(number)
                elif finding == "done":
                    case = int(number) + 1
                elif finding:
                    findings.append(f"{part} {number}: {finding}")
        finally:
            process.kill()
            process.wait()
    return case - first, findings


def main() -> int:
    p = Program("tests.fuzz", __doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    p.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="another one, other cases")
    p.add_argument("--first", type=at_least(0), default=0, metavar="N", help="number of the first case")
    p.add_argument("--cases", type=at_least(1), default=2000, metavar="N", help="of each part")
    p.add_argument("--seconds", type=number, default=math.inf, metavar="X",
        help="in all; what is not done by then is left out")  # fmt: skip
    args = p.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        p.error(f"argument PART: must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    parts = args.parts or PARTS
    start, found = time.monotonic(), []
    for i, part in enumerate(parts):
        share = (args.seconds - (time.monotonic() - start)) / (len(parts) - i)
        began = time.monotonic()
        if part == "native":
            seconds = str(min(share, 600) / 2)  # what it builds comes on top
            command = [sys.executable, "-m", "tests.fuzz.native", "--seed", str(args.seed), "--seconds", seconds]
            findings = ["native: see above"] if subprocess.run(command).returncode else []
            print(f"native: {len(findings)} findings, {time.monotonic() - began:.0f} s", flush=True)
        else:
            done, findings = fuzz(part, args.seed, args.first, args.cases, began + share)
            print(f"{part}: {done} cases, {len(findings)} findings, {time.monotonic() - began:.0f} s", flush=True)
        found += findings
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
