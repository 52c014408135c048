"""How near one output is to another, and whether that is near enough: the same rule in every stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpuopt import reference
from gpuopt.reference import Reference
from gpuopt.tolerance import Limits, problem

Array = npt.NDArray[Any]


class Runnable(Protocol):
    """What runs a model on one feed: a session, or an engine's execution."""

    def run(self, feed: Mapping[str, Array]) -> Mapping[str, Array]: ...


SAME = Limits(min_cosine=0.99999, min_sqnr_db=60.0, min_agreement=0.99)
"""FP32 graphs that ought to compute the same: the order of summation differs, no more."""


MOST_COARSE = 0.25
"""Of a row's largest value: what a quantized row may differ by in a batch, however coarse it is alone."""


def compare(actual: Array, expected: Array) -> dict[str, Any]:
    """Figures of one output.

    Returns:
        `shape`, `shape_equal`, `finite` (NaN and infinity stand where the reference has them),
        `cosine`, `sqnr_db`, `max_abs_error` for floating-point outputs, `agreement` for others;
        None where undefined: an exact result has no SQNR.
    """
    figures: dict[str, Any] = {
        "shape": list(actual.shape),
        "shape_equal": actual.shape == expected.shape,
        "finite": True,
        "cosine": None,
        "sqnr_db": None,
        "agreement": None,
        "max_abs_error": None,
    }
    if actual.shape != expected.shape:
        return figures
    if expected.dtype.kind != "f":
        figures["agreement"] = float(np.mean(actual == expected)) if expected.size else 1.0
        return figures
    got, want = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    usable = np.isfinite(got) & np.isfinite(want)
    figures["finite"] = bool(np.array_equal(got[~usable], want[~usable], equal_nan=True))
    got, want = got[usable], want[usable]
    figures["max_abs_error"] = float(np.max(np.abs(got - want), initial=0.0))
    # The other figures do not depend on the unit, and squares of very large or small numbers would leave float64.
    unit = float(max(np.max(np.abs(got), initial=0.0), np.max(np.abs(want), initial=0.0))) or 1.0
    got, want = got / unit, want / unit
    error = float(np.sum((got - want) ** 2))
    power = float(np.sum(want**2))
    norm = math.sqrt(power) * float(np.linalg.norm(got))
    if norm > 0:
        figures["cosine"] = min(1.0, float(got @ want) / norm)
    else:
        figures["cosine"] = 1.0 if error == 0 else 0.0
    if error > 0 and power > 0:
        figures["sqnr_db"] = 10 * math.log10(power / error)
    return figures


class Distance:
    """How far an output is from what is expected, over any number of samples: sums in float64, no arrays."""

    def __init__(self) -> None:
        self._signal = self._error = self._dot = self._other = 0.0
        self._finite = True
        self._is_float = True

    def add(self, actual: Array, expected: Array) -> None:
        """Take in one sample; both arrays have one shape and dtype kind."""
        if actual.shape != expected.shape:
            self._finite = False
            return
        if expected.dtype.kind != "f":
            self._is_float = False
            self._signal += expected.size
            self._error += float(np.count_nonzero(actual != expected))
            return
        got, want = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        usable = np.isfinite(got) & np.isfinite(want)
        if not usable.all():
            self._finite &= bool(np.array_equal(got[~usable], want[~usable], equal_nan=True))
            got, want = got[usable], want[usable]
        difference = got - want
        self._signal += _dot(want, want)
        self._other += _dot(got, got)
        self._dot += _dot(got, want)
        self._error += _dot(difference, difference)

    @property
    def is_silent(self) -> bool:
        """Whether nothing but zeros was expected, to which no error has a ratio."""
        return self._finite and self._signal == 0

    @property
    def relative_error(self) -> float:
        """Error power over signal power (of values that are no floats: the share that differs); infinite
        where NaN or infinity stands in the place of a number."""
        if not self._finite:
            return math.inf
        if self._error == 0:
            return 0.0
        return self._error / self._signal if self._signal > 0 else math.inf

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal power / error power); None where exact, undefined or no floats."""
        ratio = self.relative_error
        return -10 * math.log10(ratio) if self._is_float and 0 < ratio < math.inf else None

    @property
    def cosine(self) -> float | None:
        """Cosine similarity of all samples as one vector; None where undefined or no floats."""
        norm = math.sqrt(self._signal) * math.sqrt(self._other)
        return min(1.0, self._dot / norm) if self._is_float and self._finite and norm > 0 else None


def _dot(one: Array, other: Array) -> float:
    """The inner product without BLAS, whose threads would wait for the cores that ONNX Runtime's still hold."""
    return float(np.einsum("i,i->", one, other))


def against_reference(session: Runnable, stored: Reference) -> Iterator[dict[str, Any]]:
    """Figures of every output at every corner, with `corner` and `output`.

    Raises:
        QuantizationError: ONNX Runtime fails on a corner's inputs.
    """
    for corner in stored.corners:
        actual = session.run(stored.feed(corner))
        for name, expected in stored.expected(corner).items():
            yield {"corner": corner.name, "output": name, **compare(actual[name], expected)}


def first_difference(session: Runnable, stored: Reference, limits: Limits) -> str:
    """The first output that misses a limit, in words; empty if none does."""
    for row in against_reference(session, stored):
        if found := problem(row, limits):
            return f"output '{row['output']}' at {row['corner']}: {found}"
    return ""


def batch_invariance(
    session: Runnable, stored: Reference, tolerance: float, min_agreement: float, *, is_coarse: bool = False
) -> dict[str, Any]:
    """Whether a sample's outputs depend on the samples beside it, where the original's do not.

    Args:
        tolerance: largest difference of floating-point outputs, relative to the row's largest finite value.
        min_agreement: smallest share of equal values of other outputs.
        is_coarse: of a quantized model, whose rounding depends on the kernels, and these on the batch. Two results
            that are each within e of the original differ by up to 2 e: where one of the rows alone is further from it
            than half the tolerance, twice that distance is allowed, up to `MOST_COARSE`.

    Returns:
        `checked`; then `batch`, `worst_relative_error` (of floating-point outputs, that which is nearest to what is
        allowed or furthest beyond it), `tolerance` (what is allowed there), `lowest_agreement` (where there are other
        outputs) and `failures`, or the `reason` why not.
    """
    name = reference.largest_batch(stored.corners, stored.profiles)
    if name is None:
        return {"checked": False, "reason": "the shapes have one batch size"}
    corner = next(c for c in stored.corners if c.name == name)
    given = stored.feed(corner)
    feed = reference.with_distinct_rows(given)
    if feed is None:
        return {"checked": False, "reason": "all rows of the reference inputs are the same one"}
    if not stored.batched_outputs:
        return {"checked": False, "reason": f"in {stored.origin} too, outputs depend on the whole batch"}
    batch = next(iter(feed.values())).shape[0]
    rows = reference.rows_to_check(batch)
    expected = stored.expected(corner) if is_coarse else {}
    # Rows that were made distinct have no original to be measured against.
    known = [row for row in rows if _equal(reference.row_of(feed, row), reference.row_of(given, row))]
    together = session.run(feed)
    alone = {row: session.run(reference.row_of(feed, row)) for row in rows}
    agreements, failures = list[float](), list[str]()
    worst, allowed = 0.0, tolerance
    for output in stored.batched_outputs:
        limit = tolerance
        if output in expected:
            noise = [_error(alone[row][output], expected[output][row : row + 1]) for row in known]
            limit = max(tolerance, min(2 * max(noise, default=0.0), MOST_COARSE))
        for row, values in alone.items():
            in_batch = together[output][row : row + 1]
            found = compare(values[output], in_batch)
            where = f"output '{output}': row {row} of a batch of {batch}"
            if found["agreement"] is None:
                has_original = output in expected and row in known
                error = _relative_error(found, expected[output][row : row + 1] if has_original else in_batch)
                if error / limit >= worst / allowed:
                    worst, allowed = error, limit
                if error > limit:
                    failures.append(f"{where} differs from the row alone by {error:.1e}")
            else:
                agreements.append(found["agreement"])
                if found["agreement"] < min_agreement:
                    failures.append(f"{where} has only {found['agreement']:.1%} of the values of the row alone")
    judged: dict[str, Any] = {"batch": batch, "worst_relative_error": worst, "tolerance": allowed}
    if agreements:
        judged["lowest_agreement"] = min(agreements)
    return {"checked": True, **judged, "failures": failures}


def _equal(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether two feeds hold the same, NaN counted as equal to itself."""
    return all(np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f") for name, value in one.items())


def _error(actual: Array, expected: Array) -> float:
    """The relative error of floating-point values; 0 for others, which are judged otherwise."""
    found = compare(actual, expected)
    return _relative_error(found, expected) if found["agreement"] is None else 0.0


def _relative_error(figures: Mapping[str, Any], expected: Array) -> float:
    """The largest difference over the largest finite value; infinite where NaN or infinity stands elsewhere."""
    if not figures["shape_equal"] or not figures["finite"]:
        return math.inf
    largest = float(np.max(np.abs(expected[np.isfinite(expected)].astype(np.float64)), initial=0.0))
    return float(figures["max_abs_error"] / max(largest, 1e-12))
