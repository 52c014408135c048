"""What `gpuopt plan-batching` predicts, beside what a Triton server does; and how fast the simulation is.

    python benchmarks/batching.py [--environment FOLDER] [--requests 2000] [--output benchmarks/results/batching]
    python benchmarks/batching.py --simulator

The server is NVIDIA's own: nvidia-pytriton brings the `tritonserver` binary, whose dynamic batcher is predicted. It
loads the repository that `gpuopt triton` writes; ONNX Runtime, one thread, stands behind Triton's Python backend
(`serving/onnxruntime_backend.py`), since the package has no other. The network has eight convolutions of 64 channels
over 16x16 pixels, FP32: little traffic to memory, which other processes would disturb. A client in a process of its own
replays arrivals over gRPC on 127.0.0.1, open loop. Packages are installed into an environment of their own.

Calibration, before anything is predicted and on other requests: a server that waits for whole batches is kept busy with
bursts of each batch size, two of them always on their way, and the times between the ends of its batches are the
service times. Lone requests tell the rest: what their latency has beyond the time that the instance was busy, by
Triton's own statistics, is the constant part of a request, gRPC and scheduler; what the instance was busy longer than
in the bursts of one is what a batch takes longer after idleness. Nothing is fitted to the settings that are predicted.

A replay or calibration during which other processes took more than 0.1 of a core is repeated, once, and the quieter one
counts; what they took, but for niced processes, is in the JSON. --real-time gives server and client the
scheduler's real-time class, so that other processes get what these two leave, and repeats no replay.

Then every setting is served and predicted with the same arrivals; it is replayed three times, and the median of its
percentiles counts. At last the example of max_batch_size 128, preferred sizes 8, 16, 32, a delay of 100 ms and ordered
responses is compared with the plan for one latency target: the rates of a ladder that each holds in the replay.

--simulator: seconds for a million requests, and for as many in simpy.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gpuopt.batching import latency, load
from gpuopt.batching.batcher import Settings, constant_service, simulate
from gpuopt.batching.command import settings_of
from gpuopt.triton import check

ROOT = Path(__file__).resolve().parent.parent
SERVING = ROOT / "benchmarks" / "serving"
PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime", "tritonclient[grpc]")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
ALLOWED = 0.15
DISTURBED = 0.1
TRIES = 2
LONGEST = 20
"""Seconds of a replay, at most."""

LADDER = (100, 200, 300, 400, 500, 600, 700)
REPLAYS = 3
CALIBRATIONS = 2
LONE_GAP = 0.01
"""Seconds between lone requests: longer than one takes, and as in the loads, since a CPU that slept for longer wakes up
more slowly."""

TARGET_MS = 50
NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
"""


@dataclass(frozen=True)
class Case:
    """One setting under one load; `flags` are those of `gpuopt triton`."""

    name: str
    flags: tuple[str, ...]
    rate: float
    distribution: str = "poisson"
    burstiness: float = 1.0


EXAMPLE = (
    "--max-batch-size", "128", "--preferred-batch-size", "8,16,32", "--max-queue-delay", "100ms", "--preserve-ordering",
)  # fmt: skip
CASES = (
    Case("no batching", ("--max-batch-size", "1"), 150),
    Case("greedy, small batches", ("--max-batch-size", "4"), 200),
    Case("greedy", ("--max-batch-size", "32"), 150),
    Case("greedy, busy", ("--max-batch-size", "32"), 400),
    Case("greedy, large batches", ("--max-batch-size", "128"), 500),
    Case("short delay", ("--max-batch-size", "16", "--max-queue-delay", "5ms"), 200),
    Case("long delay", ("--max-batch-size", "16", "--max-queue-delay", "50ms"), 200),
    Case("delay, hardly any load", ("--max-batch-size", "32", "--max-queue-delay", "20ms"), 40),
    Case("preferred 8", ("--max-batch-size", "32", "--preferred-batch-size", "8", "--max-queue-delay", "20ms"), 300),
    Case("preferred 4, 8, no delay", ("--max-batch-size", "32", "--preferred-batch-size", "4,8"), 250),
    Case("the example", EXAMPLE, 200),
    Case("the example, busy", EXAMPLE, 400),
    Case("even gaps", ("--max-batch-size", "32", "--max-queue-delay", "10ms"), 300, "uniform"),
    Case("bursts", ("--max-batch-size", "32"), 200, "bursty", 3.0),
    Case("bursts in order", ("--max-batch-size", "64", "--max-queue-delay", "10ms", "--preserve-ordering"), 200,
         "bursty", 2.0),
    Case("short queue", ("--max-batch-size", "4", "--max-queue-size", "8"), 600),
    Case("timeout", ("--max-batch-size", "2", "--queue-timeout", "30ms"), 600),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--environment", type=Path, default=ROOT / "benchmarks" / ".work" / "serving", help="made if it is not there"
    )
    parser.add_argument("--requests", type=int, default=1500, help="in each replay, unless that takes over 20 s")
    parser.add_argument("--output", type=Path, help="write .md and .json of this name, too")
    parser.add_argument(
        "--real-time", action="store_true", help="server and client before all other processes of a busy machine: chrt"
    )
    parser.add_argument("--only", action="append", help="beginning of a case's name; repeatable")
    parser.add_argument("--simulator", action="store_true", help="time the simulation alone")
    arguments = parser.parse_args()
    if arguments.simulator:
        print_simulator(arguments.environment)
        return
    prepare(arguments.environment)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.environment, arguments.requests, arguments.real_time)
        found = bench.run(arguments.only or [])
    print(markdown(found))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(markdown(found) + "\n")


def prepare(environment: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Make the environment, with the server's stub for this Python where the server looks for it."""
    if not (environment / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(environment / "bin" / "python"), "-m", "pip", "install", "-q", *packages], check=True)


class Bench:
    def __init__(self, folder: Path, environment: Path, requests: int, real_time: bool) -> None:
        self.first = ["chrt", "--rr", "10"] if real_time else []
        self.tries = 1 if real_time else TRIES
        self.folder, self.environment, self.requests = folder, environment, requests
        self.python = environment / "bin" / "python"
        self.site = next((environment / "lib").glob("python3.*")) / "site-packages"
        self.bundle = folder / "net.gpuopt"
        self.table = folder / "latencies.json"
        self.constant_ms = 0.0
        self.backends = self._backends()

    def run(self, only: Sequence[str]) -> dict[str, Any]:
        self._compile()
        calibration = self.calibrate()
        cases = [case for case in CASES if not only or any(case.name.startswith(name) for name in only)]
        rows = [self.compare(case) for case in cases]
        return {
            "created": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "server": self.server_version(),
            "requests": self.requests,
            "real_time": bool(self.first),
            "calibration": calibration,
            "cases": rows,
            "example": self.example() if not only else None,
        }

    def _compile(self) -> None:
        (self.folder / "network.py").write_text(NETWORK)
        shapes = ("--min-shapes", "1x1x16x16", "--opt-shapes", "32x1x16x16", "--max-shapes", "128x1x16x16")
        self._gpuopt("compile", "network:make", "-p", "fp32", "-t", "onnxruntime", *shapes, "-q", "-o", self.bundle)

    def _gpuopt(self, *arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.folder}", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "gpuopt", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 13):
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def _backends(self) -> Path:
        """Triton's backends: its Python one with the stub beside it, and ours under ONNX Runtime's name."""
        packaged = self.site / "pytriton" / "tritonserver"
        folder = self.folder / "backends"
        shutil.copytree(packaged / "backends" / "python", folder / "python")
        version = "{}.{}".format(*sys.version_info[:2])
        stub = "triton_python_backend_stub"
        shutil.copy(packaged / "python_backend_stubs" / version / stub, folder / "python" / stub)
        (folder / "onnxruntime").mkdir()
        (folder / "onnxruntime" / "model.py").write_text((SERVING / "onnxruntime_backend.py").read_text())
        return folder

    @contextlib.contextmanager
    def server(self, flags: Sequence[str]) -> Iterator[tuple[str, Path]]:
        """A server on what `gpuopt triton` writes with these flags: its address and the model's folder."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            repository = Path(place) / "repository"
            self._gpuopt("triton", self.bundle, "-o", repository, "--name", "net", "--instances", "cpu:1", *flags, "-q")
            http, grpc = free_port(), free_port()
            command = [
                *self.first,
                str(self.site / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
                f"--model-repository={repository}", f"--backend-directory={self.backends}",
                f"--http-port={http}", f"--grpc-port={grpc}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
                "--allow-metrics=false", "--disable-auto-complete-config",
            ]  # fmt: skip
            environment = {
                **os.environ,
                "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": str(self.site),
                "LD_LIBRARY_PATH": str(self.site / "nvidia_pytriton.libs"),
                "OMP_NUM_THREADS": "1",
            }
            with (self.folder / "server.log").open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                self._await(process, http)
                self.process, self.http = process.pid, http
                self.version = json.loads(get(f"http://127.0.0.1:{http}/v2"))["version"]
                yield f"127.0.0.1:{grpc}", repository / "net"
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _await(self, process: subprocess.Popen[bytes], port: int) -> None:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {(self.folder / 'server.log').read_text()[-3000:]}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                get(f"http://127.0.0.1:{port}/v2/health/ready")
                return
            time.sleep(0.1)
        raise SystemExit("the server is not ready after a minute")

    def undisturbed(self, work: Callable[[], Any], tries: int = 0) -> tuple[Any, float]:
        """The result of the try in which other processes took least of the CPU, and how many cores that was."""
        best: tuple[Any, float] | None = None
        for _ in range(tries or self.tries):
            before, started = self._foreign_seconds(), time.perf_counter()
            result = work()
            cores = (self._foreign_seconds() - before) / (time.perf_counter() - started)
            if best is None or cores < best[1]:
                best = result, cores
            if best[1] <= DISTURBED or (tries or self.tries) == 1:
                break
            print(f"disturbed: other processes took {cores:.2f} cores", file=sys.stderr)
        assert best is not None
        return best

    def _foreign_seconds(self) -> float:
        """CPU seconds of the machine that were neither the server's nor a client's, nor those of niced processes."""
        machine = psutil.cpu_times()
        spent = machine.user + machine.system
        server = psutil.Process(self.process)
        for process in (server, *server.children(recursive=True)):
            used = process.cpu_times()
            spent -= used.user + used.system
        ended, own = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
        return float(spent - ended.ru_utime - ended.ru_stime - own.ru_utime - own.ru_stime)

    def server_version(self) -> str:
        return f"Triton {self.version}, nvidia-pytriton 0.7.0"

    def _client(self, address: str, mode: str, *arguments: object, stdin: str = "") -> dict[str, list[Any]]:
        command = [
            *self.first,
            str(self.python),
            str(SERVING / "client.py"),
            mode,
            address,
            "net",
            "input",
            *map(str, arguments),
        ]
        done = subprocess.run([*command, "1x16x16"], input=stdin, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        answer: dict[str, list[Any]] = json.loads(done.stdout)
        return answer

    def calibrate(self) -> dict[str, Any]:
        """Service times of each batch size, and the constant part of a request."""
        service: dict[int, list[float]] = {}
        disturbed: dict[int, float] = {}
        for size in SIZES:
            whole = ("--max-batch-size", str(size), "--preferred-batch-size", str(size), "--max-queue-delay", "1s")
            with self.server(whole) as (address, _):
                self._client(address, "bursts", size, 20)
                count = 300 if size <= 16 else 100
                found, cores = self.undisturbed(
                    functools.partial(self._client, address, "bursts", size, count), CALIBRATIONS
                )
                # The client takes the responses of a burst in one after the other: the typical one counts.
                ends = np.asarray([np.median(times) for times in found["answered"]])
                service[size] = (np.diff(ends)[3:] * 1000).tolist()
                disturbed[size] = round(cores, 3)
                if size == 1:
                    gaps = json.dumps([LONE_GAP * n for n in range(400)])
                    before = self._busy_ms()
                    alone, _ = self.undisturbed(functools.partial(self._client, address, "replay", stdin=gaps))
                    busy = np.subtract(self._busy_ms(), before)
        lone = np.subtract(alone["answered"], alone["sent"]) * 1000
        self.constant_ms = max(0.0, float(np.mean(lone) - busy[0] / busy[1]))
        after_idle = max(0.0, float(np.median(lone) - np.median(service[1])) - self.constant_ms)
        batches = {
            size: {f"p{quantile}": float(np.percentile(service[size], quantile)) for quantile in QUANTILES}
            for size in SIZES
        }
        self.table.write_text(json.dumps({"batches": batches, "after_idle": after_idle, "on_cpu": True}))
        answer = {
            "service_p50_ms": {size: percentile(service[size], 50) for size in SIZES},
            "service_p99_ms": {size: percentile(service[size], 99) for size in SIZES},
            "cores_of_others": disturbed,
            "lone_p50_ms": percentile(lone, 50),
            "constant_ms": round(self.constant_ms, 3),
            "after_idle_ms": round(after_idle, 3),
        }
        print(answer, file=sys.stderr, flush=True)
        return answer

    def _busy_ms(self) -> tuple[float, int]:
        """Milliseconds that the instance has been busy by Triton's statistics, and batches that it has run."""
        stats = json.loads(get(f"http://127.0.0.1:{self.http}/v2/models/net/stats"))["model_stats"][0]
        parts = ("compute_input", "compute_infer", "compute_output")
        runs = stats.get("batch_stats", ())
        return sum(run[part]["ns"] for run in runs for part in parts) / 1e6, sum(
            run["compute_infer"]["count"] for run in runs
        )

    def compare(self, case: Case) -> dict[str, Any]:
        """One setting, measured and predicted on the same arrivals."""
        arrivals = make_load(case.distribution, case.rate, case.burstiness).arrivals(
            case.rate, min(self.requests, int(LONGEST * case.rate)), seed=7
        )
        with self.server(case.flags) as (address, model):
            replays = [self._replay(address, arrivals) for _ in range(REPLAYS)]
            config, _ = check.read(model)
        settings = settings_of(config) if config.HasField("dynamic_batching") else Settings(1)
        service = latency.read(self.table).service(settings.max_batch_size, self.constant_ms)
        predicted = simulate(arrivals, service, settings)
        row = {
            **asdict(case),
            "settings": asdict(settings),
            "measured": {name: middle(replays, name) for name in ("p50_ms", "p99_ms")},
            "replays": replays,
            "predicted": {
                "p50_ms": round(predicted.percentile(50) * 1000, 3),
                "p99_ms": round(predicted.percentile(99) * 1000, 3),
            },
            "refused": {"measured": middle(replays, "refused"), "predicted": round(predicted.drop_rate, 4)},
        }
        row["error"] = {
            name: round(row["predicted"][name] / row["measured"][name] - 1, 4) for name in ("p50_ms", "p99_ms")
        }
        print(
            f"{case.name}: measured {row['measured']}, predicted {row['predicted']}, refused {row['refused']}",
            file=sys.stderr,
            flush=True,
        )
        return row

    def _replay(self, address: str, arrivals: Any) -> dict[str, float]:
        """One replay: percentiles of latency, milliseconds, from when a request was due, not from when it was sent."""
        written = json.dumps(arrivals.tolist())
        found, cores = self.undisturbed(functools.partial(self._client, address, "replay", stdin=written))
        refused, sent = np.asarray(found["refused"]), np.asarray(found["sent"])
        measured = (np.asarray(found["answered"]) - arrivals)[~refused] * 1000
        return {
            "p50_ms": percentile(measured, 50),
            "p99_ms": percentile(measured, 99),
            "refused": round(float(refused.mean()), 4),
            "client_late_p99_ms": percentile((sent - arrivals) * 1000, 99),
            "cores_of_others": round(cores, 3),
        }

    def example(self) -> dict[str, Any]:
        """The example's settings and the plan's, on a ladder of rates: the highest at which p99 holds in the replay."""
        plan_file = self.folder / "plan.json"
        self._gpuopt(
            "plan-batching", self.table, "--target", f"p99={TARGET_MS}ms", "--rate", 100, "--overhead",
            f"{self.constant_ms:.3f}ms", "-o", plan_file, "-q",
        )  # fmt: skip
        plan = json.loads(plan_file.read_text())
        ladders = {}
        for name, flags in (("example", EXAMPLE), ("plan", ("--plan", str(plan_file)))):
            rows = []
            with self.server(flags) as (address, _):
                for rate in LADDER:
                    arrivals = make_load("poisson", rate, 1.0).arrivals(
                        rate, max(self.requests // 3, 4 * rate), seed=11
                    )
                    replays = [self._replay(address, arrivals) for _ in range(REPLAYS)]
                    rows.append({"rate": rate, **{key: middle(replays, key) for key in ("p50_ms", "p99_ms")}})
                    print(f"{name}: {rows[-1]}", file=sys.stderr)
                    if rows[-1]["p99_ms"] > 3 * TARGET_MS:
                        break
            ladders[name] = rows
        return {
            "target_ms": TARGET_MS,
            "plan": plan["settings"],
            "plan_capacity": plan["capacity"],
            "ladders": ladders,
            "rates_that_hold": {
                name: [row["rate"] for row in rows if row["p99_ms"] <= TARGET_MS] for name, rows in ladders.items()
            },
        }


def make_load(distribution: str, rate: float, burstiness: float) -> load.Load:
    return load.make(rate, distribution, burstiness if distribution == "bursty" else None, None)


def middle(replays: Sequence[Mapping[str, float]], name: str) -> float:
    """The median of the replays: one that the machine held up for a moment is none of it."""
    return float(np.median([replay[name] for replay in replays]))


def percentile(values: Any, percent: float) -> float:
    return round(float(np.percentile(values, percent, method="inverted_cdf")), 3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=5) as answer:
        content: bytes = answer.read()
        return content


def markdown(found: dict[str, Any]) -> str:
    """The results as a document."""
    rows = found["cases"]
    within = sum(all(abs(error) <= ALLOWED for error in row["error"].values()) for row in rows)
    lines = [
        "# Predicted and served batches",
        "",
        "Written by `python benchmarks/batching.py`, whose first lines say what is measured and how. "
        f"{found['server']}; {found['machine']}; {found['requests']} requests in each replay"
        f"{'; server and client in the real-time class of the scheduler' if found['real_time'] else ''}.",
        "",
        f"{within} of {len(rows)} settings have p50 and p99 within {ALLOWED:.0%}.",
        "",
        "| setting | flags of `gpuopt triton` | requests/s | p50 measured, ms | predicted | error | p99 measured, ms "
        "| predicted | error | refused: measured, predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kind = "" if row["distribution"] == "poisson" else f", {row['distribution']}"
        cells = []
        for name in ("p50_ms", "p99_ms"):
            error = f"{row['error'][name]:+.1%}"
            cells += [f"{row['measured'][name]:.1f}", f"{row['predicted'][name]:.1f}", error]
        refused = row["refused"]
        told = f"{refused['measured']:.1%}, {refused['predicted']:.1%}" if any(refused.values()) else ""
        lines.append(
            f"| {row['name']} | `{' '.join(row['flags'])}` | {row['rate']:g}{kind} | {' | '.join(cells)} | {told} |"
        )
    calibration = found["calibration"]
    lines += [
        "",
        f"Calibration: a lone request takes {calibration['lone_p50_ms']:.2f} ms, of which "
        f"{calibration['constant_ms']:.2f} ms are on the way and {calibration['after_idle_ms']:.2f} ms due to "
        "idleness.",
        "",
        "| batch | " + " | ".join(str(size) for size in calibration["service_p50_ms"]) + " |",
        "| --- |" + " --- |" * len(calibration["service_p50_ms"]),
        "| p50, ms | " + " | ".join(f"{v:.1f}" for v in calibration["service_p50_ms"].values()) + " |",
        "| p99, ms | " + " | ".join(f"{v:.1f}" for v in calibration["service_p99_ms"].values()) + " |",
    ]
    example = found["example"]
    if example is None:
        return "\n".join(lines)
    plan, ladders = example["plan"], example["ladders"]
    lines += [
        "",
        f"## The example's settings and the plan's, p99 of {example['target_ms']} ms",
        "",
        f"The example: `{' '.join(EXAMPLE)}`. The plan: max_batch_size {plan['max_batch_size']}, preferred "
        f"{list(plan['preferred_batch_size'])}, delay {plan['max_queue_delay_microseconds']} us, {plan['instances']} "
        f"instance; predicted to carry {example['plan_capacity']:.0f} requests/s. Rates that hold in the replay: the "
        f"example's {', '.join(map(str, example['rates_that_hold']['example'])) or 'none'}; the plan's "
        f"{', '.join(map(str, example['rates_that_hold']['plan'])) or 'none'}.",
        "",
        "| requests/s | example p50, ms | p99 | plan p50, ms | p99 |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_rate = {name: {row["rate"]: row for row in rows} for name, rows in ladders.items()}
    for rate in sorted({rate for rows in by_rate.values() for rate in rows}):
        cells = []
        for name in ("example", "plan"):
            row = by_rate[name].get(rate)
            cells += [f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}"] if row else ["", ""]
        lines.append(f"| {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


SIMPY = """
import json, sys, time, random
import simpy

count, rate, largest = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
service = json.loads(sys.argv[4])

def client(env, store):
    draw = random.Random(0).expovariate
    for _ in range(count):
        yield env.timeout(draw(rate))
        store.put(env.now)

def instance(env, store, latencies):
    while True:
        batch = [(yield store.get())]
        while store.items and len(batch) < largest:
            batch.append((yield store.get()))
        yield env.timeout(service[len(batch) - 1])
        latencies += [env.now - at for at in batch]

started = time.perf_counter()
env, latencies = simpy.Environment(), []
store = simpy.Store(env)
env.process(client(env, store))
env.process(instance(env, store, latencies))
env.run(until=count / rate * 1.02)
latencies.sort()
print(json.dumps({"seconds": time.perf_counter() - started, "p50": latencies[len(latencies) // 2],
                  "p99": latencies[int(len(latencies) * 0.99)], "simpy": simpy.__version__}))
"""


def print_simulator(environment: Path) -> None:
    """Seconds for a million requests; simpy does the simplest case, whatever waits at most, without a delay."""
    times = [0.001 + 0.0002 * batch for batch in range(1, 129)]
    count, rate = 1_000_000, 3000.0
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))
    print("| a million requests | s | p50, ms | p99, ms |\n| --- | --- | --- | --- |")
    for name, settings in (
        ("gpuopt, batches of 32", Settings(32)),
        ("gpuopt, preferred 8, 16, 32, delay 100 ms, in order", Settings(128, (8, 16, 32), 100_000, 1, True)),
        ("gpuopt, 4 instances", Settings(32, instances=4)),
        ("gpuopt, queue of 64", Settings(32, max_queue_size=64)),
        ("gpuopt, batches of 1, a tenth of the load", Settings(1)),
    ):
        given = arrivals * 10 if settings.max_batch_size == 1 else arrivals
        started = time.perf_counter()
        outcome = simulate(given, constant_service(times), settings)
        seconds = time.perf_counter() - started
        print(f"| {name} | {seconds:.2f} | {outcome.percentile(50) * 1e3:.2f} | {outcome.percentile(99) * 1e3:.2f} |")
    prepare(environment, ("simpy",))
    command = [str(environment / "bin" / "python"), "-c", SIMPY, str(count), str(rate), "32", json.dumps(times)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(
        f"| simpy {found['simpy']}, batches of 32, no other setting | {found['seconds']:.2f} | "
        f"{found['p50'] * 1e3:.2f} | {found['p99'] * 1e3:.2f} |"
    )


if __name__ == "__main__":
    main()
