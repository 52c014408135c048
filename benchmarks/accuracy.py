"""Held-out accuracy of INT8: gpuopt beside onnxruntime.quantization and nvidia-modelopt, on the same networks and data.

    benchmarks/peers/setup.sh modelopt              # once: modelopt's own environment
    python benchmarks/accuracy.py                   # everything that is not measured yet, then the tables
    python benchmarks/accuracy.py --only gpuopt     # after a change of gpuopt: its rows again, the others as they are
    python benchmarks/accuracy.py --only fp32 onnxruntime modelopt gpuopt     # all again, with the trained weights
    python benchmarks/accuracy.py --variant 'smooth=--set key=value'     # a row of gpuopt with further flags
    python benchmarks/accuracy.py --quick           # two networks hardly trained, one fold: does it run?

Six architectures are trained here on scikit-learn's 1797 digits in two folds, so that every image
is held out once (`peers/networks.py`). All tools get the same FP32 ONNX file and the same 256
training images, one at a time; all results are judged by `peers/judge.py`. Weights and results
lie in benchmarks/.work: a run that was stopped goes on where it was.

Time is that of calibration and quantization alone (gpuopt: the stages between `simplify` and `cast`);
memory the largest resident size of the tool's processes, libraries included. The time in the FP32 row
is the floor: ONNX Runtime runs the 256 images through the graph, one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# From narrow to hard; the names of peers/networks.py.
NETWORKS = (
    "resnet18",
    "regnet_x_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "convnext_atto",
    "vit_tiny",
)
PEERS = {
    "onnxruntime": "onnxruntime, defaults",
    "modelopt": "modelopt, defaults",
    "modelopt-max": "modelopt, max",
}
OURS = {"gpuopt": "gpuopt, defaults"}
# What runs before and after calibration and quantization; every other stage of the report is part of the time.
OTHER_STAGES = {"samples", "export", "simplify", "cast", "build", "verify", "benchmark"}
QUICK_NETWORKS = ("mobilenet_v3_small", "convnext_atto")


@dataclass(frozen=True)
class Bench:
    """Where things lie, and which Python runs modelopt."""

    work: Path
    modelopt_python: Path
    quick: bool

    def folder(self, network: str, fold: int) -> Path:
        return self.work / network / f"fold{fold}"

    @property
    def folds(self) -> tuple[int, ...]:
        return (0,) if self.quick else (0, 1)


@dataclass(frozen=True)
class Finished:
    """A process that ended: its streams, its times, and the largest resident size among it and its children."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_mib: int
    cpu_seconds: float


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], folder: Path) -> Finished:
    """Run to the end, measured. This process stays small: a child's peak starts at its parent's size."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    out, err = folder / "stdout.log", folder / "stderr.log"
    started = time.perf_counter()
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen([str(c) for c in command], stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    busy = usage.ru_utime + usage.ru_stime
    return Finished(process.returncode, out.read_text(), err.read_text(), seconds, usage.ru_maxrss // 1024, busy)


def prepare(bench: Bench, network: str, fold: int) -> Path:
    """The trained network's folder: model.onnx, calibration.npz, evaluation.npz; trained when they are missing."""
    folder = bench.folder(network, fold)
    if not all((folder / name).exists() for name in ("model.onnx", "calibration.npz", "evaluation.npz")):
        say(f"{network} fold {fold}: training")
        folder.mkdir(parents=True, exist_ok=True)
        quick = ["--quick"] if bench.quick else []
        done = run([sys.executable, HERE / "peers/networks.py", network, str(fold), folder, *quick], folder)
        if done.code:
            raise SystemExit(f"{network} fold {fold} cannot be trained:\n{done.stderr}")
    return folder


def quantize_by_peer(bench: Bench, method: str, source: Path, folder: Path) -> dict[str, Any]:
    tool, _, choice = method.partition("-")
    python = bench.modelopt_python if tool == "modelopt" else Path(sys.executable)
    graph = folder / "model.onnx"
    script = HERE / "peers" / f"{tool}_int8.py"
    # In a folder of its own: both tools leave files beside the graph that they read.
    copy = Path(shutil.copy(source / "model.onnx", folder / "fp32.onnx"))
    done = run([python, script, copy, source / "calibration.npz", graph, *([choice] if choice else [])], folder)
    if done.code:
        return {"error": _last_line(done.stderr)}
    return {"graph": graph, "engine": graph, "seconds": float(done.stdout.split()[-1]), **_cost(done)}


def quantize_by_gpuopt(method: str, source: Path, folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The command that users run; `model.onnx` of its bundle, also where its own gate refuses the result."""
    choice = method.partition("-")[2]
    side = "3x32x32"
    bundle = folder / "bundle"
    command = [
        *(sys.executable, "-m", "gpuopt", "compile", str(source / "model.onnx"), "--precision", "int8"),
        *("--calibration-data", str(source / "calibration.npz"), "--output", str(bundle), "--no-cache", "--json"),
        *("--min-shapes", f"image:1x{side}", "--opt-shapes", f"image:8x{side}", "--max-shapes", f"image:64x{side}"),
        *(["--calibration-method", choice] if choice in ("entropy", "minmax", "percentile", "mse") else []),
        *flags,
    ]
    done = run(command, folder)
    report = json.loads(done.stdout) if done.stdout.strip() else {}
    refused = bundle.with_name(bundle.name + ".failed")
    made = bundle if done.code == 0 else refused
    result: dict[str, Any] = {"exit_code": done.code, **_cost(done)}
    if done.code:
        result["refused"] = (report.get("error") or {}).get("message") or _last_line(done.stderr)
    if not (made / "model.onnx").exists():
        return {**result, "error": result.get("refused", "no model.onnx in the bundle")}
    stages = [s for s in report.get("stages", []) if s["name"].split()[0] not in OTHER_STAGES]
    engine = made / "engine.onnx"
    return {
        **result,
        "graph": made / "model.onnx",
        "engine": engine if engine.exists() else made / "model.onnx",
        "seconds": sum(stage["seconds"] for stage in stages),
        "stages": {stage["name"]: stage["seconds"] for stage in stages},
        "calibration": next((s["facts"].get("method") for s in stages if s["name"] == "calibrate"), None),
    }


def _cost(done: Finished) -> dict[str, Any]:
    return {
        "process_seconds": round(done.seconds, 2),
        "process_cpu_seconds": round(done.cpu_seconds, 2),
        "peak_mib": done.peak_mib,
    }


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def judge(graph: Path, engine: Path, source: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, HERE / "peers/judge.py", graph, source / "evaluation.npz", "--engine", engine]
    timed = ["--time", source / "calibration.npz"] if graph == source / "model.onnx" else []
    done = run([*command, *timed], folder)
    return json.loads(done.stdout) if done.code == 0 else {"error": _last_line(done.stderr)}


def measure(bench: Bench, network: str, fold: int, method: str, flags: Sequence[str]) -> dict[str, Any]:
    """Quantize, judge, keep the result."""
    source = bench.folder(network, fold)
    folder = source / method
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    say(f"{network} fold {fold}: {method}")
    if method == "fp32":
        result: dict[str, Any] = {"graph": source / "model.onnx", "engine": source / "model.onnx"}
    elif method.startswith("gpuopt"):
        result = quantize_by_gpuopt(method, source, folder, flags)
    else:
        result = quantize_by_peer(bench, method, source, folder)
    if "error" not in result:
        result |= judge(result.pop("graph"), result.pop("engine"), source, folder)
    result["model_sha256"] = _sha256(source / "model.onnx")
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


def known(bench: Bench, network: str, fold: int, method: str) -> dict[str, Any] | None:
    """An earlier result for the same FP32 graph."""
    source = bench.folder(network, fold)
    path = source / method / "result.json"
    if not path.exists() or not (source / "model.onnx").exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["model_sha256"] == _sha256(source / "model.onnx") else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def total(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: counts added up over the folds, time of one quantization, the larger peak."""
    broken = next((fold["error"] for fold in folds if "error" in fold), None)
    if broken:
        return {"error": broken}
    images = sum(fold["images"] for fold in folds)
    noise, signal = sum(fold["noise"] for fold in folds), sum(fold["signal"] for fold in folds)
    row: dict[str, Any] = {
        "images": images,
        "correct": sum(fold["correct"] for fold in folds),
        "accuracy": sum(fold["correct"] for fold in folds) / images,
        "right": "".join(fold["right"] for fold in folds),
        "same": sum(fold["same"] for fold in folds) / images,
        "sqnr_db": round(10 * math.log10(signal / noise), 2) if noise else None,
        "macs": folds[0]["macs"],
        "int8_macs": sum(fold["int8_macs"] for fold in folds) / sum(fold["macs"] for fold in folds),
        "engine_error": next((fold["engine_error"] for fold in folds if fold["engine_error"]), ""),
        "floating_point_layers": folds[0]["floating_point_layers"],
    }
    if "seconds" in folds[0]:
        row["seconds"] = round(sum(fold["seconds"] for fold in folds) / len(folds), 2)
    for key in ("process_seconds", "process_cpu_seconds"):
        if key in folds[0]:
            row[key] = round(sum(fold.get(key, 0) for fold in folds) / len(folds), 2)
    if "peak_mib" in folds[0]:
        row["peak_mib"] = max(fold["peak_mib"] for fold in folds)
    for key in ("refused", "calibration"):
        value = next((fold[key] for fold in folds if fold.get(key)), None)
        row |= {key: value} if value else {}
    return row


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


HEAD = ("network", "method", "accuracy", "same answer", "SQNR, dB", "MACs in INT8", "s", "MiB", "TensorRT-RTX")


def table(rows: dict[str, dict[str, dict[str, Any]]], labels: dict[str, str]) -> list[str]:
    """One Markdown row a network and method; the FP32 row opens each network."""
    lines = [line(HEAD), line(["---"] * len(HEAD))]
    for network, methods in rows.items():
        for method, label in {"fp32": "PyTorch FP32", **labels}.items():
            row = methods.get(method)
            if row is None:
                continue
            if "error" in row:
                lines.append(line([network, label, f"fails: {row['error'][:120]}", *[""] * (len(HEAD) - 3)]))
                continue
            fp32 = method == "fp32"
            lines.append(
                line(
                    [
                        network,
                        label + (f" ({row['calibration']})" if method == "gpuopt" and "calibration" in row else ""),
                        f"{row['accuracy']:.2%}" + (" (refused)" if "refused" in row else ""),
                        "" if fp32 else f"{row['same']:.2%}",
                        "" if fp32 or row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
                        f"0 of {row['macs'] / 1e6:.0f} M" if fp32 else f"{row['int8_macs']:.1%}",
                        f"{row['seconds']:.1f}" if "seconds" in row else "",
                        f"{row['peak_mib']}" if "peak_mib" in row else "",
                        "builds" if not row["engine_error"] else "no",
                    ]
                )
            )
    return lines


def below(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Where gpuopt's defaults are right on fewer images than a peer, or less like PyTorch."""
    found = []
    for network, methods in rows.items():
        ours = methods.get("gpuopt", {})
        for peer, label in PEERS.items():
            theirs = methods.get(peer, {})
            if "accuracy" not in theirs:
                continue
            if "accuracy" not in ours:
                found.append(f"{network}: gpuopt gives nothing, {label} does")
                continue
            if ours["correct"] < theirs["correct"]:
                pairs = list(zip(ours["right"], theirs["right"], strict=True))
                lost, won = pairs.count(("0", "1")), pairs.count(("1", "0"))
                chance = f"sign test p = {sign_test(lost, won):.2f}"
                found.append(
                    f"{network}: {label} is right on {lost} images that gpuopt misses, wrong on {won} others; {chance}"
                )
            if ours["sqnr_db"] < theirs["sqnr_db"]:
                nearer = f"{theirs['sqnr_db']:.1f} dB against {ours['sqnr_db']:.1f}"
                found.append(f"{network}: {label} is nearer to PyTorch's outputs, {nearer}")
    return found


def sign_test(lost: int, won: int) -> float:
    """Exact two-sided p of so uneven a split if both tools were equally good (McNemar's test on discordant images)."""
    count = lost + won
    tail = sum(math.comb(count, k) for k in range(min(lost, won) + 1)) / 2**count
    return min(1.0, 2 * tail)


def document(rows: dict[str, dict[str, dict[str, Any]]], about: dict[str, Any]) -> str:
    errors = {
        f"{network}, {({**PEERS, **OURS}).get(method, method)}: {row['engine_error'][:240]}"
        for network, methods in rows.items()
        for method, row in methods.items()
        if row.get("engine_error")
    }
    others = {method: label for method, label in OURS.items() if method != "gpuopt"}
    others |= {m: m for row in rows.values() for m in row if m.startswith("gpuopt") and m not in OURS}
    return "\n".join(
        [
            f"`{about['command']}`; {about['machine']}; "
            + ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
            "",
            *table(rows, {**PEERS, "gpuopt": OURS["gpuopt"]}),
            "",
            *(["gpuopt with other settings:", "", *table(rows, others), ""] if others else []),
            "gpuopt below a peer:",
            "",
            *([f"- {text}" for text in below(rows)] or ["- nowhere"]),
            "",
            "What TensorRT-RTX says where it does not build:",
            "",
            *([f"- {text}" for text in sorted(errors)] or ["- it builds everything"]),
            "",
        ]
    )


def describe(bench: Bench, command: str) -> dict[str, Any]:
    """Machine and versions, without names of hosts."""
    names = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"

    def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
        answer = subprocess.run([str(python), "-c", names, *packages], capture_output=True, text=True)
        return dict(json.loads(answer.stdout)) if answer.returncode == 0 else {}

    found = versions(Path(sys.executable), ["torch", "onnx", "onnxruntime", "tensorrt-rtx-cu13", "timm", "torchvision"])
    if bench.modelopt_python.exists():
        packages = {"nvidia-modelopt": "modelopt", "onnxruntime-gpu": "modelopt's onnxruntime"}
        theirs = versions(bench.modelopt_python, list(packages))
        found |= {packages[name]: version for name, version in theirs.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    return {"command": command, "machine": machine, "versions": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--only", nargs="+", metavar="TOOL", help="measure these tools' rows again; leave the others")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="one more row: gpuopt compile FLAGS"
    )
    parser.add_argument("--methods", nargs="+", help="instead of all", choices=(*PEERS, *OURS))
    parser.add_argument("--tables", action="store_true", help="measure nothing, show what is known")
    parser.add_argument("--quick", action="store_true", help="two networks, two epochs, one fold; writes no results")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--modelopt-python", type=Path, default=HERE / ".work/modelopt/bin/python")
    options = parser.parse_args()
    bench = Bench(options.work / ("quick" if options.quick else "."), options.modelopt_python, options.quick)
    methods = ["fp32", *(options.methods or [*PEERS, *(["gpuopt"] if options.quick else OURS)])]
    flags: dict[str, list[str]] = {}
    for variant in options.variant:
        name, _, text = variant.partition("=")
        flags[f"gpuopt-{name}"] = text.split()
    methods += flags
    if not bench.modelopt_python.exists():
        say(f"no {bench.modelopt_python}: modelopt is left out (benchmarks/peers/setup.sh modelopt makes it)")
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for network in options.networks or (QUICK_NETWORKS if options.quick else NETWORKS):
        rows[network] = {}
        results: dict[str, list[dict[str, Any]]] = {}
        for fold in bench.folds:
            if not options.tables:
                prepare(bench, network, fold)
            for method in methods:
                result = known(bench, network, fold, method)
                wanted = method.partition("-")[0] in (options.only or ())
                able = method.partition("-")[0] != "modelopt" or bench.modelopt_python.exists()
                if able and not options.tables and (wanted or (result is None and options.only is None)):
                    result = measure(bench, network, fold, method, flags.get(method, ()))
                if result is not None:
                    results.setdefault(method, []).append(result)
        rows[network] = {m: total(found) for m, found in results.items() if len(found) == len(bench.folds)}
    shown = " ".join(["python benchmarks/accuracy.py", *(["--quick"] if options.quick else [])])
    about = describe(bench, shown)
    text = document(rows, about)
    print(text)
    complete = all({"fp32", *PEERS, *OURS} <= rows.get(network, {}).keys() for network in NETWORKS)
    if options.quick or not complete:
        say("benchmarks/results is left as it is: these are not all rows")
    else:
        kept = {n: {m: {k: v for k, v in row.items() if k != "right"} for m, row in r.items()} for n, r in rows.items()}
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results/accuracy.json").write_text(json.dumps({**about, "rows": kept}, indent=1) + "\n")
        (HERE / "results/accuracy.md").write_text(text)


if __name__ == "__main__":
    main()
