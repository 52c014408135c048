"""Which architectures `gpuopt compile` takes: FP16 and INT8 to TensorRT-RTX, on a machine without a GPU.

    python benchmarks/coverage.py                     # everything that is not there yet, then the table
    python benchmarks/coverage.py --only timm vit     # the architectures whose keys contain one of these words
    python benchmarks/coverage.py --retry             # rows that did not pass, again
    python benchmarks/coverage.py --peers             # Olive and modelopt on a sample of the list, too
    python benchmarks/coverage.py --table             # measure nothing, show what is known

Beside `.[cpu,models,dev]` it needs `pip install transformers`.

The list is `architectures.py`: public architectures of torchvision, timm and transformers, random
weights, small inputs, a batch of 1 to 2. Each is compiled in processes of its own, within a limit of
time and of memory, INT8 with random calibration data; the second precision finds the export of the
first in a stage cache. A row says: verified in ONNX Runtime against PyTorch and engine built, or the
kind of error and its message. Rows lie in benchmarks/.work/coverage: a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from architectures import ARCHITECTURES, Architecture  # noqa: E402

from gpuopt import progress  # noqa: E402
from gpuopt.errors import one_line  # noqa: E402

PRECISIONS = ("fp16", "int8")
SAMPLES = 8
PASSED = "verified and built"
REFUSED = "refused, names the construct"
PEERS = ("olive", "modelopt")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "onnxslim", "tensorrt-rtx-cu13")


@dataclass(frozen=True)
class Bench:
    """Where things lie and what a compilation may take.

    Attributes:
        seconds: limit of one compilation.
        memory_mib: limit of the resident memory of its processes together.
        python: that runs each peer, by name.
    """

    work: Path
    seconds: float
    memory_mib: int
    python: dict[str, Path]

    def row(self, key: str, column: str) -> Path:
        return self.work / "rows" / f"{key}.{column}.json"


@dataclass(frozen=True)
class Finished:
    """A process and its children that ended; `stopped`: the limit they ran into, or empty."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_mib: int
    stopped: str


def run(command: Sequence[str | Path], folder: Path, bench: Bench, environment: dict[str, str]) -> Finished:
    """Run to the end or to a limit, in a process group of its own."""
    out, err = folder / "stdout.log", folder / "stderr.log"
    started, peak, stopped = time.monotonic(), 0, ""
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        while process.poll() is None:
            time.sleep(0.1)
            used = _resident_mib(process.pid)
            peak = max(peak, used)
            if used > bench.memory_mib:
                stopped = f"memory limit of {bench.memory_mib} MiB"
            elif time.monotonic() - started > bench.seconds:
                stopped = f"time limit of {bench.seconds:.0f} s"
            if stopped:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - started
    return Finished(process.returncode, out.read_text(), err.read_text(), seconds, peak, stopped)


def _resident_mib(process: int) -> int:
    try:
        parent = psutil.Process(process)
        family = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for one in family:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total // 2**20


def recipe(architecture: Architecture, precision: str) -> dict[str, Any]:
    """What is compiled and how, as a recipe."""
    bounds = {name: {"low": low, "high": high} for name, low, high in architecture.bounds}
    inputs = {}
    for text in architecture.inputs:
        name, sizes, *dtype = text.split(":")
        inputs[name] = {
            "dtype": dtype[0] if dtype else "float32",
            "min": f"1x{sizes}",
            "max": f"{2 if architecture.batch else 1}x{sizes}",
            **bounds.get(name, {}),
        }
    return {
        "model": {"factory": f"architectures:{architecture.key}"},
        "precision": precision,
        "inputs": inputs,
        "calibrate": {"random": True, "samples": SAMPLES},
        "build": {"target": ["onnxruntime"] if precision == "fp32" else ["tensorrt-rtx", "onnxruntime"]},
    }


def compile_one(architecture: Architecture, precision: str, folder: Path, bench: Bench) -> dict[str, Any]:
    """The command that users run; one row."""
    path = folder / f"{precision}.yaml"
    path.write_text(yaml.safe_dump(recipe(architecture, precision), sort_keys=False))
    bundle = folder / precision
    command = [sys.executable, "-m", "gpuopt", "compile", "--recipe", path, "--output", bundle, "--json"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "GPUOPT_CACHE_DIR": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    done = run(command, folder, bench, environment)
    row: dict[str, Any] = {"seconds": round(done.seconds, 1), "peak_mib": done.peak_mib, "exit_code": done.code}
    if done.stopped:
        return {**row, "outcome": "stopped", "message": done.stopped}
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return {**row, "outcome": "no answer", "message": one_line(done.stderr.strip().rpartition("\n")[2])}
    row["warnings"] = report.get("warnings", [])
    states = {engine["target"]: engine["status"] for engine in report.get("engines", [])}
    outputs = [o for o in (report.get("verification") or {}).get("outputs", []) if o.get("cosine") is not None]
    if outputs:
        row["cosine"] = min(o["cosine"] for o in outputs)
    if done.code == 0 and states == {"tensorrt-rtx": "built", "onnxruntime": "verified"}:
        return {**row, "outcome": PASSED}
    error = report.get("error") or {"kind": "none", "message": f"engines: {states}", "hint": "", "stage": None}
    named = architecture.refused and architecture.refused in f"{error['message']} {error['hint']}"
    row["states"] = states
    outcome = REFUSED if named else error["kind"]
    return {**row, "outcome": outcome, "stage": error["stage"], "message": error["message"], "hint": error["hint"]}


def compile_both(key: str, bench: Bench) -> None:
    """The rows of one architecture that are missing; what was made is deleted."""
    folder = bench.work / "now" / key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for precision in PRECISIONS:
            if not bench.row(key, precision).exists():
                row = compile_one(ARCHITECTURES[key], precision, folder, bench)
                _write(bench.row(key, precision), {**row, "code": CODE})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{threading.get_ident()}")
    beside.write_text(json.dumps(row, indent=1))
    beside.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def measure(keys: Sequence[str], bench: Bench, at_once: int) -> None:
    """Everything that is not there yet, `at_once` architectures at a time."""
    missing = [key for key in keys if any(not bench.row(key, p).exists() for p in PRECISIONS)]
    listener = progress.choose(False)
    with (
        listener.stage("coverage"),
        concurrent.futures.ThreadPoolExecutor(at_once) as pool,
    ):
        jobs = {pool.submit(compile_both, key, bench): key for key in missing}
        try:
            for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                job.result()
                listener.line(f"{len(keys) - len(missing) + done}/{len(keys)} {_told(jobs[job], bench)}")
                listener.advance(len(keys) - len(missing) + done, len(keys))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def _told(key: str, bench: Bench) -> str:
    rows = {precision: _read(bench.row(key, precision)) or {} for precision in PRECISIONS}
    states = (f"{p} {r.get('outcome', '?')} {r.get('seconds', 0):.0f} s" for p, r in rows.items())
    return f"{key}: {'; '.join(states)}"


# -- the table


def interleaved(keys: Sequence[str]) -> list[str]:
    """One of each source in turn, so that a run that is stopped has seen all kinds."""
    queues: dict[str, list[str]] = {}
    for key in keys:
        queues.setdefault(ARCHITECTURES[key].source, []).append(key)
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [
        queue[i * len(queue) // longest]
        for i in range(longest)
        for queue in queues.values()
        if _is_next(queue, i, longest)
    ]


def _is_next(queue: Sequence[str], step: int, steps: int) -> bool:
    return step == 0 or step * len(queue) // steps != (step - 1) * len(queue) // steps


def lines_of(keys: Sequence[str], bench: Bench, about: dict[str, Any]) -> Iterator[str]:
    rows = {(k, p): row for k in keys for p in PRECISIONS if (row := _read(bench.row(k, p))) is not None}
    known = [key for key in keys if any((key, p) in rows for p in PRECISIONS)]
    yield f"`{about['command']}`; {about['machine']}; " + ", ".join(f"{n} {v}" for n, v in about["versions"].items())
    yield ""
    yield from _summary(known, rows)
    yield ""
    states = Counter(row.get("code", "") for row in rows.values()).most_common()
    counts = ", ".join(f"{count} with {code}" for code, count in states)
    yield f"Rows by the state of gpuopt's code that they were measured with: {counts}."
    yield ""
    yield "| source | task | architecture | FP16 | INT8 |"
    yield "| --- | --- | --- | --- | --- |"
    for key in known:
        a = ARCHITECTURES[key]
        cells = [_cell(rows.get((key, precision))) for precision in PRECISIONS]
        yield "| " + " | ".join([a.source, a.task, a.name, *cells]) + " |"
    others = [(key, p, row) for (key, p), row in rows.items() if row["outcome"] != PASSED]
    if others:
        yield ""
        yield "What is said where it is not verified and built:"
        yield ""
        for key, precision, row in others:
            hint = f" Next step: {' '.join(row['hint'].split())}" if row.get("hint") else ""
            yield f"- {ARCHITECTURES[key].name}, {precision.upper()}: {row['outcome']}: {row['message']}.{hint}"
    peers = [line for peer in PEERS for line in _peer_lines(peer, keys, bench)]
    if peers:
        yield ""
        yield from peers


def _summary(keys: Sequence[str], rows: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    tasks = Counter(ARCHITECTURES[key].task for key in keys)
    yield f"{len(keys)} architectures: " + ", ".join(f"{task} {count}" for task, count in tasks.most_common()) + "."
    yield ""
    yield "| precision | compiled | verified and built | share | refused, construct named | other errors |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for precision in PRECISIONS:
        found = [rows[key, precision]["outcome"] for key in keys if (key, precision) in rows]
        if found:
            passed, refused = found.count(PASSED), found.count(REFUSED)
            share = f"{passed / len(found):.1%}"
            rest = len(found) - passed - refused
            yield f"| {precision.upper()} | {len(found)} | {passed} | {share} | {refused} | {rest} |"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["outcome"] == PASSED:
        return "yes" + (f", cosine {row['cosine']:.4f}" if "cosine" in row else "")
    return row["outcome"]


# -- peers


def sample(keys: Sequence[str], count: int) -> list[str]:
    """Architectures spread evenly over the list, those left out that have to be refused."""
    able = [key for key in keys if not ARCHITECTURES[key].refused]
    return [able[i * len(able) // count] for i in range(min(count, len(able)))]


def measure_peers(keys: Sequence[str], bench: Bench) -> None:
    """Each peer on each architecture, judged as gpuopt is: ONNX Runtime against PyTorch, then TensorRT-RTX."""
    able = [peer for peer in PEERS if bench.python[peer].exists()]
    for peer in PEERS:
        if peer not in able:
            print(f"no {bench.python[peer]}: {peer} is left out (benchmarks/peers/setup.sh {peer})", file=sys.stderr)
    listener = progress.choose(False)
    with listener.stage("peers"):
        for done, key in enumerate(keys, 1):
            columns = [(p, f) for p in able for f in PRECISIONS if not bench.row(key, f"{p}-{f}").exists()]
            if columns:
                _peers_on(key, columns, bench)
            listener.line(f"{done}/{len(keys)} {key}: {_peers_told(key, bench)}")
            listener.advance(done, len(keys))


def _peers_told(key: str, bench: Bench) -> str:
    rows = {f"{p} {f}": _read(bench.row(key, f"{p}-{f}")) for p in PEERS for f in PRECISIONS}
    return "; ".join(f"{name} {row['outcome']}" for name, row in rows.items() if row)


def _peers_on(key: str, columns: Sequence[tuple[str, str]], bench: Bench) -> None:
    folder = bench.work / "now" / f"{key}.peers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        source = folder / "fp32"
        made = compile_one(ARCHITECTURES[key], "fp32", folder, bench)
        for peer, precision in columns:
            row: dict[str, Any] = {"outcome": "no FP32 graph", "message": made.get("message", "")}
            if (source / "model.onnx").exists():
                row = _peer_row(peer, precision, source, folder, bench)
            _write(bench.row(key, f"{peer}-{precision}"), row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _peer_row(peer: str, precision: str, source: Path, folder: Path, bench: Bench) -> dict[str, Any]:
    made = folder / f"{peer}-{precision}" / "model.onnx"
    made.parent.mkdir()
    script = HERE / "peers" / f"{peer}_coverage.py"
    done = run([bench.python[peer], script, source, made, precision, str(SAMPLES)], folder, bench, {})
    row: dict[str, Any] = {"seconds": round(done.seconds, 1), "peak_mib": done.peak_mib}
    if done.stopped or done.code or not made.exists():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {**row, "outcome": "not converted", "message": done.stopped or one_line(said[-1] if said else "")}
    judge = HERE / "peers" / "coverage_judge.py"
    environment = {"PYTHONPATH": str(HERE.parent)}
    done = run([sys.executable, judge, made, source, precision], folder, bench, environment)
    if done.stopped or done.code:
        crash = f"the judge ended with {done.code}"
        return {**row, "outcome": "crashes a library", "message": done.stopped or crash}
    # Libraries print there, too.
    return {**row, **json.loads(done.stdout.strip().rpartition("\n")[2])}


def _peer_lines(peer: str, keys: Sequence[str], bench: Bench) -> Iterator[str]:
    found = {(k, p): row for k in keys for p in PRECISIONS if (row := _read(bench.row(k, f"{peer}-{p}")))}
    if not found:
        return
    known = list(dict.fromkeys(key for key, _ in found))
    package = {"olive": "olive-ai", "modelopt": "nvidia-modelopt[onnx]"}[peer]
    yield f"{package} {_peer_version(peer, bench)} on {len(known)} of them, a sample spread over the list, from the"
    yield "FP32 ONNX graph that gpuopt exported, judged by the same limits and the same builder."
    yield ""
    for precision in PRECISIONS:
        theirs = [found[key, precision]["outcome"] == PASSED for key in known if (key, precision) in found]
        both = [key for key in known if (key, precision) in found]
        ours = [(_read(bench.row(key, precision)) or {}).get("outcome") == PASSED for key in both]
        counts = f"{sum(theirs)} of {len(theirs)} verified and built; gpuopt {sum(ours)} of {len(ours)}"
        yield f"- {precision.upper()}: {counts}"
    yield ""
    yield "| architecture | FP16 | INT8 | gpuopt FP16 | gpuopt INT8 |"
    yield "| --- | --- | --- | --- | --- |"
    for key in known:
        cells = [_cell(found.get((key, p))) for p in PRECISIONS]
        cells += [_cell(_read(bench.row(key, p))) for p in PRECISIONS]
        yield "| " + " | ".join([ARCHITECTURES[key].name, *cells]) + " |"
    yield ""
    said = Counter(one_line(row["message"])[:160] for row in found.values() if row.get("message"))
    yield from (f"- {count} times: {text}" for text, count in said.most_common(12))
    yield ""


def _peer_version(peer: str, bench: Bench) -> str:
    package = {"olive": "olive-ai", "modelopt": "nvidia-modelopt"}[peer]
    if not bench.python[peer].exists():
        return "(version not known here)"
    asked = f"import importlib.metadata as m; print(m.version('{package}'))"
    answer = subprocess.run([str(bench.python[peer]), "-c", asked], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _code() -> str:
    from gpuopt.pipeline import own_version

    return own_version()


CODE = _code()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="keys that contain one of these words")
    parser.add_argument("--retry", action="store_true", help="measure again what did not pass")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is known")
    parser.add_argument("--peers", action="store_true", help="Olive and modelopt on a sample, too")
    parser.add_argument("--sample", type=int, default=20, help="size of that sample")
    parser.add_argument("--at-once", type=int, default=1, help="architectures compiled side by side")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one compilation")
    parser.add_argument("--memory", type=int, default=6144, metavar="MIB", help="limit of one compilation")
    parser.add_argument("--work", type=Path, default=HERE / ".work/coverage")
    parser.add_argument("--olive-python", type=Path, default=HERE / ".work/olive/bin/python")
    parser.add_argument("--modelopt-python", type=Path, default=HERE / ".work/modelopt/bin/python")
    options = parser.parse_args()
    python = {"olive": options.olive_python, "modelopt": options.modelopt_python}
    bench = Bench(options.work.resolve(), options.seconds, options.memory, python)
    keys = [key for key in ARCHITECTURES if not options.only or any(word in key for word in options.only)]
    for source in dict.fromkeys(ARCHITECTURES[key].source for key in keys):
        if not options.table and source != "own" and importlib.util.find_spec(source) is None:
            print(f"{source} is not installed: its architectures are left out", file=sys.stderr)
            keys = [key for key in keys if ARCHITECTURES[key].source != source]
    if options.retry:
        for path in (bench.row(key, precision) for key in keys for precision in PRECISIONS):
            if (row := _read(path)) is not None and row["outcome"] not in (PASSED, REFUSED):
                path.unlink()
    if not options.table:
        measure(interleaved(keys), bench, options.at_once)
    if options.peers:
        measure_peers(interleaved(sample(keys, options.sample)), bench)
    memory = psutil.virtual_memory().total / 2**30
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    about = {
        "command": "python benchmarks/coverage.py --peers",
        "machine": machine,
        "versions": {package: _version_of(package) for package in PACKAGES},
    }
    text = "\n".join(lines_of(keys, bench, about)) + "\n"
    print(text, end="")
    if options.only:
        print("benchmarks/results is left as it is: these are not all rows", file=sys.stderr)
        return
    columns = [*PRECISIONS, *(f"{peer}-{precision}" for peer in PEERS for precision in PRECISIONS)]
    rows = {key: {c: row for c in columns if (row := _read(bench.row(key, c)))} for key in keys}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/coverage.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (HERE / "results/coverage.md").write_text(text)


if __name__ == "__main__":
    main()
