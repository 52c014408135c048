"""A failure small enough to be sent to somebody: graph, log, versions, and the command that replays it.

    failure.json     what failed, where, with which versions, settings and shapes; how to replay it
    reduced.onnx     the smallest graph that still fails in the same way, if it fails alone
    other.onnx       of a difference between two graphs, the same part of the other one
    values.npz       of a difference, the values that go into both
    log.txt          traceback and what the libraries said

Weights are random values of the same shape and dtype unless they were asked for, or two graphs are compared;
there is no calibration data in it, and nothing of what exporters write of the source code. Names of nodes and
tensors stay.
"""

from __future__ import annotations

import datetime
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpuopt
from gpuopt import environment
from gpuopt.errors import GpuoptError, ReductionError, RequirementError, StorageError, UsageError
from gpuopt.progress import Progress
from gpuopt.recipe import resolve
from gpuopt.reduction import halving
from gpuopt.reduction.attempts import BY_PIPELINE, Attempts, Check, out_of_time, recipe_for, signature
from gpuopt.reduction.files import (
    GRAPH_FILE,
    LIMITS_FILE,
    OTHER_FILE,
    VALUES_FILE,
    profile_from_json,
    profile_to_json,
)
from gpuopt.shapes import Profile
from gpuopt.storage import storage_errors, write_json, write_text
from gpuopt.tolerance import Limits

if TYPE_CHECKING:
    from gpuopt.reduction.subgraph import Piece
    from gpuopt.reduction.subjects import Differing, Failing

DOCUMENT_FILE = "failure.json"
LOG_FILE = "log.txt"
STAGES = ("build", "run", "difference", *BY_PIPELINE)
TARGETS = ("", "tensorrt", "tensorrt-rtx")
_VERSION = 1
SAME_OUTPUTS = Limits(min_cosine=0.99, min_sqnr_db=20.0, min_agreement=0.9)
"""What the outputs of two graphs of one model reach if nothing is asked for."""


@dataclass(frozen=True)
class Wish:
    """How a failure is reduced.

    Attributes:
        seconds: for all tries.
        keep_weights: whether the weights of the model stay in the graph.
        other: for a difference, the graph to compare with; None: the graph as ONNX Runtime optimizes it.
        limits: for a difference, what the outputs have to reach.
        kind: of the error that it has to be; empty: any.
    """

    seconds: float
    keep_weights: bool = False
    other: Path | None = None
    limits: Limits = SAME_OUTPUTS
    kind: str = ""


def reproduce(
    graph: Path, profile: Profile, check: Check, wish: Wish, progress: Progress, folder: Path
) -> dict[str, Any]:
    """Find the smallest part of a graph that fails as the whole does, and write it.

    Args:
        graph: ONNX, as the failing stage got it.
        profile: shapes of its inputs.
        folder: an existing empty folder.

    Returns:
        What `failure.json` holds.

    Raises:
        ReductionError: the whole does not fail, alone and on random inputs, or the time ran out.
        RequirementError: what the stage needs is not here.
        ModelError, UsageError: the file is no ONNX graph, its shapes are not known, or a setting does not fit.
    """
    from gpuopt.reduction.subgraph import Pieces
    from gpuopt.reduction.subjects import Differing, Failing, open_pieces

    started = time.monotonic()
    pieces = Pieces(open_pieces(graph), profile)
    with Attempts(check, wish.seconds) as attempts, progress.stage("reduce"):
        if check.stage == "difference":
            subject: Differing | Failing = Differing(pieces, attempts, wish.other, wish.limits)
        else:
            subject = Failing(pieces, attempts)
        everything = tuple(range(len(pieces.nodes)))
        whole = subject.error_of(everything)
        if whole is None:
            raise _nothing(graph, check, attempts.is_over())
        if wish.kind not in ("", whole.kind):
            raise ReductionError(f"alone, the graph fails in another way: {whole.message}", "The log has the rest.")
        if isinstance(whole, (RequirementError, UsageError)):
            # What is missing here, or does not fit the target, is so for every part alike.
            raise whole
        wanted = signature(whole)

        def fails(part: halving.Part) -> bool:
            found = subject.error_of(part)
            progress.advance(attempts.tries, None)
            return found is not None and signature(found) == wanted

        left = halving.reduce(len(everything), fails, attempts.is_over)
        attempts.grant(wish.seconds)
        piece, again = subject.write(left.kept, wanted, wish.keep_weights, folder)
        tries = attempts.tries
    document = {
        **_about(whole, check),
        "graph": GRAPH_FILE,
        "weights": "original" if wish.keep_weights or wish.other is not None else "random",
        "fails_with_these_weights": again,
        "nodes": piece.nodes,
        "nodes_before": len(everything),
        "operators": piece.operators,
        "finished": left.finished,
        "tries": tries,
        "limits": vars(wish.limits) if check.stage == "difference" else None,
        "seconds": round(time.monotonic() - started, 1),
        **_settings(check, piece),
    }
    return _written(document, whole, folder)


def note(error: GpuoptError, check: Check, why: str, folder: Path) -> dict[str, Any]:
    """Write a failure that has no graph of its own: log and versions.

    Args:
        why: there is none.
    """
    document = {**_about(error, check), "graph": None, "why_no_graph": _anonymous(why)}
    return _written(document, error, folder)


def _nothing(graph: Path, check: Check, late: bool) -> ReductionError:
    if late:
        return out_of_time()
    if check.stage == "difference":
        return ReductionError(
            f"{graph.name} does not differ: every output is within the limits",
            "Tighter limits: --min-cosine, --min-sqnr.",
        )
    return ReductionError(
        f"{graph.name} does not fail here when it is tried alone ({check.stage} {check.target}".rstrip() + ")",
        "Look at --target, shapes and versions ('gpuopt doctor'); a failure of memory depends on the machine.",
    )


def _about(error: GpuoptError, check: Check) -> dict[str, Any]:
    return {
        "schema_version": _VERSION,
        "gpuopt_version": gpuopt.__version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "stage": check.stage,
        "target": check.target or None,
        "error": {
            "kind": error.kind,
            "exit_code": error.exit_code,
            "message": _anonymous(error.message),
            "hint": _anonymous(error.hint),
        },
        "signature": signature(type(error)(_anonymous(error.message))),
        "environment": environment.describe(),
    }


def _settings(check: Check, piece: Piece) -> dict[str, Any]:
    recipe = recipe_for(check.recipe, Path(GRAPH_FILE), piece.profile)
    return {
        "inputs": profile_to_json(piece.profile),
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
    }


def _written(document: dict[str, Any], error: GpuoptError, folder: Path) -> dict[str, Any]:
    write_log(error, folder)
    write_json(folder / DOCUMENT_FILE, document)
    return document


def write_log(error: GpuoptError, folder: Path) -> None:
    """Write traceback and the libraries' words, the user's home left out."""
    write_text(folder / LOG_FILE, _anonymous(error.details or error.lines()).rstrip() + "\n")


def _anonymous(text: str) -> str:
    """Without the name of the user's home."""
    try:
        home = str(Path.home())
    except RuntimeError:  # as in containers that run as any number
        return text
    return text.replace(home, "~") if len(home) > 1 else text


def replay_command(folder: Path, document: Mapping[str, Any]) -> str:
    """The one command that shows the failure again."""
    if document.get("graph"):
        return shlex.join(["gpuopt", "reduce", str(folder), "--replay"])
    return shlex.join(["gpuopt", "compile", "--recipe", str(folder.parent / "recipe.yaml")])


def replay(folder: Path, plugins: tuple[Path, ...], seconds: float) -> tuple[dict[str, Any], GpuoptError | None]:
    """Try the graph of a failure again.

    Args:
        plugins: libraries that the engine needs; a failure names none, since they run code.

    Returns:
        Its document, and how it fails here; None if it does not any more.

    Raises:
        StorageError: the folder holds no failure that can be replayed.
        ReductionError: the time ran out before it could be told.
    """
    from gpuopt.reduction.subgraph import Piece
    from gpuopt.reduction.subjects import open_pieces

    document = read(folder)
    if not document.get("graph"):
        raise StorageError(
            f"{folder} has no graph to replay: {document.get('why_no_graph')}",
            "Run the compilation of its recipe again.",
        )
    try:
        tree = dict(document["recipe"])
        build = dict(tree.get("build", {}))
        profile = profile_from_json(document["inputs"])
        limits = None if document["limits"] is None else vars(Limits(**document["limits"]))
        stage, target = document["stage"], document["target"] or ""
        if stage not in STAGES or target not in TARGETS:
            raise ValueError(f"no stage {stage} of target {target}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error
    # Whoever made the folder does not decide which code runs here, nor which file is written.
    tree["build"] = {**build, "plugins": [str(path) for path in plugins], "timing_cache": None}
    check = Check(stage, resolve(tree), target)
    model = open_pieces(folder / GRAPH_FILE)
    beside = {name: folder / name for name in (OTHER_FILE, VALUES_FILE) if (folder / name).is_file()}
    with Attempts(check, seconds) as attempts:
        if limits is not None:
            path = attempts.scratch / LIMITS_FILE
            write_json(path, limits)
            beside[LIMITS_FILE] = path
        found = attempts.error_of(Piece(model, profile, len(model.graph.node)), beside)
        if found is None and attempts.is_over():
            raise out_of_time()
        return document, found


def read(folder: Path) -> dict[str, Any]:
    """What a folder's `failure.json` says.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    path = folder / DOCUMENT_FILE
    with storage_errors("read", path):
        text = path.read_text()
    try:
        document: dict[str, Any] = json.loads(text)
        if document["schema_version"] != _VERSION:
            raise ValueError(f"schema version {document['schema_version']}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error
    return document


def _damaged(folder: Path, error: Exception) -> StorageError:
    return StorageError(f"{folder / DOCUMENT_FILE} cannot be read: {error}", "Copy the folder again.")
