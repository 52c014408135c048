"""What a fault at every point of a run costs: kills, Ctrl-C, a full disk, flipped bits, clocks that jump.

    python benchmarks/faults.py [--every 1] [--processes 2] [--output benchmarks/results/faults.md]

A compilation to INT8 is cut off at every change that it makes to the disk (before each file is opened, made, renamed or
deleted, and with half of each file written), over a bundle of an earlier run and a cache. Afterwards the bundle has to
be whole, the next run has to pass and to give, byte for byte, the graphs and ranges of a run that nothing happened to,
and no half-written file may be left. A full disk stays full from its point on. Then one bit is turned in every file of
the cache. A process that is killed leaves what the kernel has: loss of power is not walked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.points import Action  # noqa: E402
from tests.faults.walk import Walk  # noqa: E402

ACTIONS: tuple[Action, ...] = ("kill", "interrupt", "full disk")
NAMES = {"kill": "`kill -9`", "interrupt": "Ctrl-C", "full disk": "full disk from there on", "flip": "flipped bits"}
CLOCKS = {
    "a clock in 1970": itertools.repeat(-2.0e9),
    "a clock in 2100": itertools.repeat(2.4e9),
    "a clock that jumps by years": itertools.cycle([1e8, -1e8, 0.0]),
}


def walk(part: int, parts: int, every: int, jobs: list[tuple[str, int]], found: object) -> None:
    """One process's share of the steps."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        ground = Walk(Path(name))
        for kind, at in jobs[part::parts]:
            what = ground.flip(at) if kind == "flip" else ground.step(kind, at)  # type: ignore[arg-type]
            point = "" if kind == "flip" else ground.points[at]
            found.put((kind, at, point, what))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="every n-th point alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the table into a file, too")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        ground = Walk(Path(name))
        points, files = len(ground.points), ground.cached_files()
        clocks = {label: ground.with_clock(shifts) for label, shifts in CLOCKS.items()}
    jobs = [(action, at) for action in ACTIONS for at in range(0, points, options.every)]
    jobs += [("flip", at) for at in range(0, files, options.every)]
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    workers = [
        context.Process(target=walk, args=(part, options.processes, options.every, jobs, found))
        for part in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    counts = {kind: [0, 0] for kind in (*ACTIONS, "flip")}
    losses = [f"{label}: {what}" for label, what in clocks.items() if what]
    for done in range(1, len(jobs) + 1):
        kind, at, point, what = found.get(timeout=600)
        counts[kind][0] += 1
        if what:
            counts[kind][1] += 1
            losses.append(f"{kind} at {at} ({point}): {what}")
            print(losses[-1], file=sys.stderr, flush=True)
        if done % 20 == 0 or done == len(jobs):
            print(f"{done}/{len(jobs)}, {len(losses)} lost", file=sys.stderr, flush=True)
    for worker in workers:
        worker.join()
    rows = [f"| {NAMES[kind]} | {walked} | {lost} |" for kind, (walked, lost) in counts.items()]
    rows += [f"| {label} | 1 | {int(bool(what))} |" for label, what in clocks.items()]
    text = "\n".join(
        [
            "# Faults",
            "",
            f"`python benchmarks/faults.py`; {platform.machine()}, Python {platform.python_version()}. The run has "
            f"{points} points, its cache {files} files; {time.monotonic() - started:.0f} s.",
            "",
            "| fault | points walked | lost |",
            "| --- | --- | --- |",
            *rows,
            *([""] if losses else []),
            *(f"- {loss}" for loss in losses),
            "",
        ]
    )
    print(text)
    print(json.dumps({"points": points, "files": files, "counts": counts, "losses": losses}), file=sys.stderr)
    if options.output:
        options.output.write_text(text)
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
