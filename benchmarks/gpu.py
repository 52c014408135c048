"""Engines on an NVIDIA GPU: gpuopt's precisions beside TensorRT's own calibrator and PyTorch, same models, same data.

    python benchmarks/gpu.py prepare     # with torch: models, data, bundles without engines
    python benchmarks/gpu.py baselines   # with torch, alone on the GPU: PyTorch's times
    python benchmarks/gpu.py build       # with TensorRT: every engine, built and proved; torch is not needed
    python benchmarks/gpu.py measure     # alone on the GPU: races, accuracy, gpuopt bench, --precision auto
    python benchmarks/gpu.py tables      # benchmarks/results/gpu.json and gpu.md

Without a word it does all of them, without what needs torch where torch is missing. Everything lies in
benchmarks/.work/gpu or in --folder, which may be carried from one machine to another between the steps; what is there
already is not made again. Builders take turns on the GPU (nine at a time on one H100 took six times as long each as
one alone), so that more jobs (--jobs) overlap only what the CPU does.

The networks for ImageNet have random weights: TensorRT's times are those of trained ones (ONNX Runtime CUDA gains by
their biases, which are 0 and left out), their accuracy says nothing beyond the distance to PyTorch. The accuracy of
INT8 is measured on networks that `peers/networks.py` trains on scikit-learn's digits.

What a time is: one inference of the batch, inputs and outputs on the GPU, launched as a CUDA graph where it says so,
the next one enqueued before the last has ended; the engines of a network run in turn, round by round, in one process,
which loads each several times: where it lies in memory makes up to 6 %. The spread is over all loads.
The floor of a network is the larger of its operations over the GPU's peak and its bytes over the memory's rate, summed
over the layers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work/gpu"
RESULTS = HERE / "results"
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_steps import LEGACY_SOURCES, Limit, gpuopt, has_tensorrt_8, legacy_flags, run, say, table, together  # noqa: E402

CUBLAS_SOURCES = ("CUBLAS", "CUBLAS_LT")


INPUT = "x"
"""As the networks' `forward` calls it."""


@dataclass(frozen=True)
class Network:
    """What is compiled.

    Attributes:
        factory: of the model, without arguments.
        shape: of one sample.
        batches: smallest, tuned-for, largest.
        trained: whether it has weights and held-out data of peers/networks.py under this name.
        native: whether TensorRT's own calibrator makes an engine, too.
        auto: whether `--precision auto` is run on it; its candidates are then compiled from the FP32 graph.
        baselines: whether PyTorch's times are taken.
        bench: groups of `gpuopt bench`.
        jit: whether TensorRT 8.5 may compile convolutions; with many small ones that kept it busy for 9 minutes, the
            GPU idle.
    """

    name: str
    factory: str
    shape: tuple[int, ...]
    batches: tuple[int, int, int]
    trained: str = ""
    native: bool = False
    auto: bool = False
    baselines: bool = False
    bench: tuple[str, ...] = ()
    jit: bool = True

    def shapes(self) -> list[str]:
        """Flags of the shape profile."""
        sizes = ["x".join(map(str, (batch, *self.shape))) for batch in self.batches]
        flags = ("--min-shapes", "--opt-shapes", "--max-shapes")
        return [word for flag, size in zip(flags, sizes, strict=True) for word in (flag, f"{INPUT}:{size}")]


_IMAGE = (3, 224, 224)
_DYNAMIC = ("latency", "loads", "batches")
_STATIC = ("latency", "loads", "phases", "overlap", "streams")
NETWORKS = (
    Network(
        "resnet50-b1", "torchvision.models:resnet50", _IMAGE, (1, 1, 1), native=True, baselines=True, bench=_STATIC
    ),
    Network(
        "resnet50-b32", "torchvision.models:resnet50", _IMAGE, (32, 32, 32), native=True, baselines=True, bench=_STATIC
    ),
    Network(
        "resnet18", "torchvision.models:resnet18", _IMAGE, (1, 8, 16), auto=True, bench=(*_DYNAMIC, "memory")
    ),
    Network(
        "mobilenet_v3_small", "networks:imagenet_mobilenet_v3_small", _IMAGE, (1, 8, 16), auto=True, bench=_DYNAMIC,
        jit=False,
    ),
    Network(
        "vit_tiny", "timm.models.vision_transformer:vit_tiny_patch16_224", _IMAGE, (1, 8, 16), auto=True, bench=_DYNAMIC
    ),
    Network("digits-resnet18", "networks:resnet18", (3, 32, 32), (1, 64, 64), "resnet18", native=True),
    Network(
        "digits-mobilenet_v3_small", "networks:mobilenet_v3_small", (3, 32, 32), (1, 64, 64), "mobilenet_v3_small",
        native=True, jit=False,
    ),
)  # fmt: skip
BESIDE = "resnet50-b1/int8.gpuopt/model.tensorrt.engine"
"""Runs beside another network's engine, below the bench's folder."""
CALIBRATION_IMAGES = 32
CALIBRATION_BATCHES = 16
"""Of a network with a fixed batch at least so many: as many as bias correction needs to be measured."""
SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Bench:
    """Where things lie and which networks are asked for."""

    folder: Path
    networks: tuple[Network, ...]
    jobs: int
    seconds: float
    groups: tuple[str, ...]
    baselines: tuple[str, ...]
    limit: Limit
    legacy: bool
    attempts: int = 1

    def home(self, network: Network) -> Path:
        return self.folder / network.name


# prepare ------------------------------------------------------------------------------------------------------------


def prepare(bench: Bench) -> None:
    """Models, calibration data and bundles; PyTorch's times where it finds a GPU."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    for network in bench.networks:
        bench.home(network).mkdir(exist_ok=True)
    steps = [lambda network=network: _prepare(bench, network) for network in bench.networks]
    together(bench.jobs, bench.limit, steps)


def baselines(bench: Bench) -> None:
    """PyTorch and ONNX Runtime on the same models, as far as they are here."""
    for network in bench.networks:
        told = bench.home(network) / "baselines.json"
        if network.baselines and not told.is_file() and not bench.limit.reached():
            kinds = [word for kind in bench.baselines for word in ("--baseline", kind)]
            asked = ("bench", bench.home(network) / "fp16.gpuopt", "--only", "baselines", *kinds, "--seconds", "1")
            run(gpuopt(*asked, "--json", "--output", told), told.with_suffix(".log"))


def _prepare(bench: Bench, network: Network) -> None:
    home = bench.home(network)
    model: list[str | Path] = [network.factory]
    if network.trained:
        weights = home / "model.pth"
        if not (home / "evaluation.npz").is_file():
            run([sys.executable, HERE / "peers/networks.py", network.trained, "0", home], home / "training.log")
        model = [weights, "--model", network.factory]
    if not (home / SAMPLES).is_file():
        save_samples(home, network)
    for precision in ("fp32",) if network.auto else ("fp16", "int8", "fp32"):
        folder = home / f"{precision}.gpuopt"
        if folder.is_dir():
            continue
        flags = ("--set", "export.exporters=[torchscript]", *legacy_flags(bench.legacy))
        run(
            gpuopt(
                "compile", *model, "-p", precision, "--no-build", "-t", "tensorrt", "-o", folder, *network.shapes(),
                "-c", home / SAMPLES, *flags, "--cache-dir", bench.folder / "cache-prepare", "--json",
            ),
            home / f"prepare-{precision}.log",
        )  # fmt: skip


def save_samples(home: Path, network: Network) -> None:
    """The training images of a trained network; else random ones with structure at several scales, FP32."""
    import numpy as np

    if network.trained:
        np.savez(home / SAMPLES, **{INPUT: np.load(home / "calibration.npz")["image"]})
        return
    count = max(CALIBRATION_IMAGES, CALIBRATION_BATCHES * network.batches[0])
    generator = np.random.default_rng(0)
    side = network.shape[-1]
    images = np.zeros((count, *network.shape), np.float32)
    for cells in (4, 14, 56):
        coarse = generator.standard_normal((count, network.shape[0], cells, cells)).astype(np.float32)
        images += np.kron(coarse, np.ones((1, 1, side // cells, side // cells), np.float32)) / 2
    images += generator.standard_normal(images.shape).astype(np.float32) / 4
    np.savez(home / SAMPLES, **{INPUT: images})


# build --------------------------------------------------------------------------------------------------------------


def build(bench: Bench) -> None:
    """Every engine, several builders at a time."""
    together(bench.jobs, bench.limit, [step for _, step in sorted(_builds(bench), key=lambda entry: entry[0])])


def _sources(network: Network) -> list[str]:
    if not has_tensorrt_8():
        return []
    legacy = LEGACY_SOURCES if network.jit else LEGACY_SOURCES[:1]
    sources = (*legacy, *(CUBLAS_SOURCES if _has_cublas() else ()))
    return ["--set", f"build.tactic_sources=[{', '.join(sources)}]"]


def _has_cublas() -> bool:
    """Whether cuBLAS 11 is here, and more than a stub of it for the linker; transformers need it in TensorRT 8.5."""
    try:
        return int(ctypes.CDLL("libcublasLt.so.11").cublasLtGetVersion()) > 110000
    except (OSError, AttributeError):
        return False


def _builds(bench: Bench) -> list[tuple[int, Callable[[], object]]]:
    """Steps with their rank: what takes longest comes first."""
    found: list[tuple[int, Callable[[], object]]] = []
    for network in bench.networks:
        large = network.name.startswith("resnet50")
        for precision in () if network.auto else ("int8", "fp16"):
            rank = (0 if precision == "int8" else 1) if large else 3
            found.append((rank, lambda n=network, p=precision: _build_bundle(bench, n, p)))
        if network.native:
            found.append((0 if large else 2, lambda n=network: compile_onnx(bench, n, "native")))
        if network.auto:
            found += [(4, lambda n=network, p=p: compile_onnx(bench, n, p)) for p in ("int8", "fp16", "fp32")]
    return found


def _attempts(bench: Bench) -> list[str]:
    return ["--set", f"build.attempts={bench.attempts}"] if bench.attempts > 1 else []


_NO_LIMITS = ("--set", "verify.min_cosine=0", "--set", "verify.min_sqnr_db=0")
"""An engine that is far from PyTorch is measured, too, and the table tells how far it is."""


def _passed(told: Path) -> bool:
    """Whether a report is there, and not that of a failure."""
    try:
        return bool(json.loads(told.read_text())["status"] == "passed")
    except (OSError, ValueError, KeyError):
        return False


def _build_bundle(bench: Bench, network: Network, precision: str) -> None:
    told = bench.home(network) / f"build-{precision}.json"
    if (bench.home(network) / f"{precision}.gpuopt").is_dir() and not _passed(told):
        asked = (
            "build",
            bench.home(network) / f"{precision}.gpuopt",
            "-t",
            "tensorrt",
            *_NO_LIMITS,
            *_sources(network),
            *_attempts(bench),
        )
        text = run(gpuopt(*asked, "--cache-dir", bench.folder / "cache", "--json"), told.with_suffix(".log"))
        told.write_text(text)


def compile_onnx(bench: Bench, network: Network, precision: str) -> None:
    """Compile the FP32 graph; `native` is INT8 by TensorRT's own calibrator."""
    home = bench.home(network)
    told = home / f"compile-{precision}.json"
    if _passed(told) or not (home / "fp32.gpuopt").is_dir():
        return
    quantizer = ("--quantizer", "tensorrt") if precision == "native" else ()
    checks = ("--set", "speed.check=false") if precision != "auto" else ()
    asked = "int8" if precision == "native" else precision
    text = run(
        gpuopt(
            "compile", home / "fp32.gpuopt/model.onnx", "-p", asked, *quantizer, "-t", "tensorrt",
            "-o", home / f"onnx-{precision}.gpuopt", *network.shapes(), "-c", home / SAMPLES,
            *_NO_LIMITS, *checks, *_sources(network), *_attempts(bench),
            "--cache-dir", bench.folder / "cache", "--json",
        ),
        told.with_suffix(".log"),
    )  # fmt: skip
    told.write_text(text)


# measure ------------------------------------------------------------------------------------------------------------


def measure(bench: Bench) -> None:
    """Alone on the GPU, one thing after another; what is most wanted comes first."""
    steps: list[tuple[str, Network, Callable[[Network], Any]]] = []
    steps += [("auto", n, lambda n: compile_onnx(bench, n, "auto")) for n in bench.networks if n.auto]
    steps += [("race", n, lambda n: race_network(bench, n)) for n in bench.networks]
    steps += [("distance", n, lambda n: distance(bench, n)) for n in bench.networks]
    steps += [("accuracy", n, lambda n: accuracy(bench, n)) for n in bench.networks if n.trained]
    steps += [("bench", n, lambda n: _bench(bench, n)) for n in bench.networks if n.bench]
    steps += [("profile", n, lambda n: _profile(bench, n)) for n in bench.networks if n.baselines]
    for name, network, step in steps:
        told = bench.home(network) / f"{name}.json"
        if name not in bench.groups or told.is_file() or bench.limit.reached():
            continue
        started = time.monotonic()
        try:
            answer = step(network)
            if answer is not None:
                told.write_text(json.dumps(answer, indent=1))
        except Exception as error:  # one figure less, and the reason for it
            say(f"{network.name}/{name} failed: {error!r}")
        say(f"{network.name}/{name}: {time.monotonic() - started:.1f} s")
        collect(bench)


def engines_of(bench: Bench, network: Network) -> dict[str, Path]:
    """Engines by what made them."""
    home, file = bench.home(network), "model.tensorrt.engine"
    folders = {"fp16": "fp16.gpuopt", "int8": "int8.gpuopt", "tensorrt int8": "onnx-native.gpuopt"}
    if network.auto:
        folders = {name: f"onnx-{name}.gpuopt" for name in ("fp32", "fp16", "int8", "auto")}
    found = {name: home / folder / file for name, folder in folders.items() if (home / folder / file).is_file()}
    # Where a limit of accuracy was missed the engine lies beside the bundle's place.
    for name, folder in folders.items():
        failed = home / f"{folder}.failed" / file
        if name not in found and failed.is_file():
            found[name] = failed
    return found


def race_network(bench: Bench, network: Network) -> Any:
    """All engines of a network in turn, as CUDA graphs."""
    from gpuopt.bench.engine_race import Racing, race_engines
    from gpuopt.cuda.device import Device

    with Device() as device:
        found = race_engines(Racing(engines_of(bench, network), seconds=bench.seconds), device)
        gpu = device.name
    names = list(found.milliseconds)
    ratios = {
        f"{one} / {other}": vars(found.ratio(one, other)) for one in names for other in ("fp16", "tensorrt int8")
        if one != other and other in names
    }  # fmt: skip
    spread = {name: [min(rounds), max(rounds)] for name, rounds in found.rounds.items()}
    rounds = {name: list(times) for name, times in found.rounds.items()}
    return {
        "gpu": gpu, "milliseconds": dict(found.milliseconds), "spread": spread, "ratios": ratios, "rounds": rounds,
        "loads": found.loads,
    }  # fmt: skip


def distance(bench: Bench, network: Network) -> Any:
    """Lowest SQNR in dB of the engines' outputs against PyTorch's, which the FP32 bundle keeps, over all corners."""
    import gpuopt as package
    from gpuopt import reference
    from gpuopt.comparison import against_reference

    stored = reference.load(bench.home(network) / "fp32.gpuopt/reference")
    answer: dict[str, Any] = {}
    for name, path in engines_of(bench, network).items():
        with package.load(path) as engine:
            rows = list(against_reference(_Runs(engine.infer), stored))
        answer[name] = {
            "corners": len(stored.corners), "lowest_sqnr_db": min(row["sqnr_db"] for row in rows),
            "lowest_cosine": min(row["cosine"] for row in rows),
        }  # fmt: skip
    return answer


@dataclass(frozen=True)
class _Runs:
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]]


def accuracy(bench: Bench, network: Network) -> Any:
    """Held-out answers of the engines against PyTorch's FP32."""
    import numpy as np

    import gpuopt as package

    data = np.load(bench.home(network) / "evaluation.npz")
    images, labels, wanted = data["image"], data["label"], data["logits"].astype(np.float64)
    answer: dict[str, Any] = {"fp32": {"accuracy": float((wanted.argmax(1) == labels).mean()), "images": len(labels)}}
    for name, path in engines_of(bench, network).items():
        with package.load(path) as engine:
            batch = network.batches[2]
            parts = [engine.infer({INPUT: part}) for part in np.split(images, range(batch, len(images), batch))]
        logits = np.concatenate([next(iter(part.values())) for part in parts]).astype(np.float64)
        noise = float(((logits - wanted) ** 2).sum())
        answer[name] = {
            "accuracy": float((logits.argmax(1) == labels).mean()),
            "same": float((logits.argmax(1) == wanted.argmax(1)).mean()),
            "sqnr_db": float(10 * np.log10((wanted**2).sum() / noise)),
        }
    return answer


def _bench(bench: Bench, network: Network) -> None:
    home = bench.home(network)
    for precision in ("int8", "fp16"):
        only = [word for group in network.bench for word in ("--only", group)]
        wanted = "memory" in network.bench and (bench.folder / BESIDE).is_file()
        beside = ("--beside", bench.folder / BESIDE) if wanted else ()
        subject = home / f"{'onnx-' if network.auto else ''}{precision}.gpuopt"
        asked = ("bench", subject, *only, *beside, "--seconds", f"{bench.seconds / 6:.2f}")
        told = home / f"bench-{precision}.json"
        if not told.is_file() and not bench.limit.reached():
            run(gpuopt(*asked, "--json", "--output", told), told.with_suffix(".log"))


def _profile(bench: Bench, network: Network) -> None:
    for precision in ("int8", "fp16"):
        told = bench.home(network) / f"profile-{precision}.json"
        asked = ("profile", bench.home(network) / f"{precision}.gpuopt", "--json", "--output", told)
        if not told.is_file() and not bench.limit.reached():
            run(gpuopt(*asked), told.with_suffix(".log"))


# tables -------------------------------------------------------------------------------------------------------------


def collect(bench: Bench) -> dict[str, Any]:
    """All answers in one document, without the lists of layers: `results.json` in the folder."""
    found: dict[str, Any] = {}
    for network in (n for n in NETWORKS if bench.home(n).is_dir()):
        entries = found.setdefault(network.name, {"batch": network.batches[1]})
        for path in sorted(bench.home(network).glob("*.json")):
            try:
                entries[path.stem] = _digest(path.stem, json.loads(path.read_text()))
            except ValueError:
                entries[path.stem] = {"failed": "no JSON"}
    (bench.folder / "results.json").write_text(json.dumps(found, indent=1))
    return found


def _digest(kind: str, document: Mapping[str, Any]) -> Any:
    """What the tables need, and what makes a figure believable."""
    if kind.startswith(("build-", "compile-")):
        engine: Mapping[str, Any] = next((e for e in document.get("engines", []) if e["target"] == "tensorrt"), {})
        proof = {k: v for k, v in (engine.get("proof") or {}).items() if k != "layers"}
        race = document.get("race")
        stages = {s["name"]: s["seconds"] for s in document.get("stages", [])}
        facts: Mapping[str, Any] = next((s["facts"] for s in document.get("stages", []) if s["name"] == "build"), {})
        if document.get("status") != "passed":
            error = document.get("error") or {}
            return {
                "status": "failed", "kind": error.get("kind"), "exit_code": error.get("exit_code"),
                "message": error.get("message"), "proof": proof or None, "stage_seconds": stages,
            }  # fmt: skip
        about = ("library_version", "gpu", "driver_version", "options", "attempts", "repairs", "size_bytes")
        kept = {key: facts.get(key) for key in about}
        return {
            "status": document.get("status"), "precision": document.get("precision"),
            "proof": proof, "race": race, "stage_seconds": stages, "build": kept, "warnings": document.get("warnings"),
        }  # fmt: skip
    if kind.startswith("profile-"):
        return {k: document.get(k) for k in ("where", "latency_ms", "sum_ms", "floor_ms", "peak", "modules")}
    if kind.startswith(("bench-", "baselines")):
        return {k: v for k, v in document.items() if k not in ("environment", "command")}
    return document


def tables(bench: Bench) -> None:
    """Write the results and their tables; what an earlier run measured and this folder lacks is kept."""
    path = RESULTS / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name, entries in collect(bench).items():
        found.setdefault(name, {}).update(entries)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "gpu.md").write_text(render(found))


def render(found: Mapping[str, Any]) -> str:
    """The tables, of what was measured; a pure function of the results."""
    engines = [row for name, entries in found.items() for row in _engine_rows(name, entries)]
    parts = [_head(found)]
    head = (
        "network",
        "batch",
        "engine",
        "ms",
        "lowest to highest",
        "loads",
        "built",
        "times FP16's",
        "of the time in",
        "lowest SQNR against PyTorch over all corners, dB",
    )
    parts += ["## Engines in turn, as CUDA graphs", table(head, engines)]
    rows = [row for name, entries in found.items() for row in _auto_rows(name, entries)]
    if rows:
        head = (
            "network",
            "batch",
            "candidate",
            "ms",
            "lowest to highest",
            "lowest SQNR against the ONNX, dB",
            "shipped",
        )
        parts += ["## `--precision auto`: its candidates in turn, as CUDA graphs", table(head, rows)]
    rows = [row for name, entries in found.items() for row in _accuracy_rows(name, entries)]
    if rows:
        head = ("network", "engine", "accuracy", "same answer as FP32", "SQNR of the logits, dB")
        parts += ["## Held-out answers", table(head, rows)]
    for name, entries in found.items():
        for kind in ("baselines", "bench-fp16", "bench-int8"):
            if rows := [row for row in entries.get(kind, {}).get("rows", []) if not row["failed"]]:
                parts += [f"## {name}, {kind}", table(_BENCH_HEAD, [_bench_row(row) for row in rows])]
                parts += [_conditions(entries[kind])]
    return "\n\n".join(part for part in parts if part) + "\n"


_BENCH_HEAD = ("group", "what", "p50, ms", "p99", "ms an inference, back to back", "lowest to highest", "includes")


def _head(found: Mapping[str, Any]) -> str:
    builds = [e[k].get("build") or {} for e in found.values() for k in e if k.startswith(("build-", "compile-"))]
    where = sorted({f"{b['gpu']}, TensorRT {b['library_version']}" for b in builds if b.get("gpu")})
    return (
        "# Engines on a GPU\n\nWritten by `python benchmarks/gpu.py`, whose first lines say what is measured and how. "
        f"Measured on: {'; '.join(where) or 'nothing yet'}."
    )


def _engine_rows(name: str, entries: Mapping[str, Any]) -> list[tuple[str, ...]]:
    race, rows = entries.get("race") or {}, []
    for engine, milliseconds in race.get("milliseconds", {}).items():
        kind = {"tensorrt int8": "native"}.get(engine, engine)
        made = entries.get(f"build-{kind}") or entries.get(f"compile-{kind}") or {}
        proof = made.get("proof") or {}
        attempts = len((made.get("build") or {}).get("attempts") or ()) or 1
        low, high = race["spread"][engine]
        ratio = race["ratios"].get(f"{engine} / fp16")
        shares = (proof.get("coverage") or {}).get("time_share") or {}
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(shares.items(), key=lambda item: -item[1]))
        far = (entries.get("distance") or {}).get(engine)
        chosen = (entries.get("compile-auto") or {}).get("race") or {}
        rows.append(
            (
                name, str(entries["batch"]), f"auto: {chosen.get('chosen', '')}" if engine == "auto" else engine,
                f"{milliseconds:.3f}", f"{low:.3f} to {high:.3f}", str(race.get("loads", 1)), str(attempts),
                f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "",
                told, f"{far['lowest_sqnr_db']:.1f}" if far else "",
            )
        )  # fmt: skip
    return rows


def _auto_rows(name: str, entries: Mapping[str, Any]) -> list[tuple[str, ...]]:
    race = (entries.get("compile-auto") or {}).get("race") or {}
    return [
        (
            name, str(entries["batch"]), one["name"], f"{one['milliseconds']:.3f}",
            f"{one['lowest']:.3f} to {one['highest']:.3f}", f"{one['lowest_sqnr_db']:.1f}",
            "yes" if one["name"] == race["chosen"] else "",
        )
        for one in race.get("candidates", ()) if one["milliseconds"] is not None
    ]  # fmt: skip


def _accuracy_rows(name: str, entries: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name, engine, f"{one['accuracy']:.2%}", f"{one['same']:.2%}" if "same" in one else "",
            f"{one['sqnr_db']:.1f}" if "sqnr_db" in one else f"PyTorch, {one['images']} images",
        )
        for engine, one in (entries.get("accuracy") or {}).items()
    ]  # fmt: skip


def _bench_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    def percentile(name: str) -> str:
        return f"{row['latency_ms'][name]['value']:.3f}" if name in row["latency_ms"] else ""

    spread = f"{row['lowest_ms']:.3f} to {row['highest_ms']:.3f}"
    back = f"{row['back_to_back_ms']:.3f}"
    return row["group"], row["name"], percentile("p50"), percentile("p99"), back, spread, row["includes"]


def _conditions(report: Mapping[str, Any]) -> str:
    told = {**report["conditions"], **report["memory"]}
    shown = ", ".join(f"{name} {value}" for name, value in told.items() if value not in (None, "", [], {}))
    # Baselines' rows name their libraries.
    alone = all(row["group"] == "baselines" for row in report["rows"])
    where = "" if alone else f"{report['gpu']}, {report['target']} {report['library_version']}; "
    return f"{where}{shown}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="prepare, baselines, build, measure, tables; default: all")
    parser.add_argument("--folder", type=Path, default=WORK)
    names = [network.name for network in NETWORKS]
    parser.add_argument("--network", action="append", choices=names, help="repeatable, in this order; default: all")
    parser.add_argument("--one-by-one", action="store_true", help="all steps of a network before the next network's")
    parser.add_argument("--begin-within", type=float, metavar="SECONDS", help="no new build or measurement after that")
    parser.add_argument("--legacy", action="store_true", help="prepare for TensorRT 8.5 or 8.6")
    parser.add_argument("--jobs", type=int, default=1, help="models prepared, engines built at a time")
    parser.add_argument("--attempts", type=int, default=1, help="each engine is the fastest of so many")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each race")
    parser.add_argument("--group", action="append", help="of measure: race, accuracy, bench, auto, profile; repeatable")
    parser.add_argument("--baseline", action="append", help="of gpuopt bench; repeatable; default: all")
    options = parser.parse_args()
    from gpuopt import environment

    reason = environment.why_not_run("tensorrt")
    if not options.steps and reason:
        say(f"gpu.py: nothing was measured: {reason}")
        return
    by_name = {network.name: network for network in NETWORKS}
    networks = tuple(by_name[name] for name in options.network or names)
    groups = tuple(options.group or ("auto", "race", "distance", "accuracy", "bench", "profile"))
    kinds = tuple(options.baseline or ())
    limit = Limit(options.begin_within)
    bench = Bench(
        options.folder.resolve(),
        networks,
        options.jobs,
        options.seconds,
        groups,
        kinds,
        limit,
        options.legacy,
        options.attempts,
    )
    steps: dict[str, Callable[[Bench], object]] = {
        "prepare": prepare, "baselines": baselines, "build": build, "measure": measure, "collect": collect,
        "tables": tables,
    }  # fmt: skip
    everything = ["prepare", "baselines", "build", "measure", "tables"]
    asked = options.steps or everything[0 if environment.has_module("torch") else 2 :]
    for name in asked:
        if name not in steps:
            parser.error(f"there is no step '{name}'")
    rounds = [replace(bench, networks=(network,)) for network in networks] if options.one_by_one else [bench]
    for one in rounds:
        for name in asked:
            steps[name](one)


if __name__ == "__main__":
    main()
