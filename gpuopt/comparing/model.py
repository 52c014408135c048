"""What `gpuopt compare` answers: one document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from gpuopt.report.model import Estimate, Failure

Aspect = Literal["gpu", "library", "driver", "shapes", "definition", "model"]
Verdict = Literal["better", "same", "worse", "not comparable"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Part):
    """One of the two reports.

    Attributes:
        path: as it was given.
        model: file or factory.
    """

    path: str
    created: str
    gpuopt_version: str
    status: Literal["passed", "failed"]
    model: str
    precision: str


class Difference(_Part):
    """What keeps two figures from being comparable.

    Attributes:
        target: that it is about; empty: the whole.
        what: in words, as `GPU or CPU`.
        allowed: whether `--allow-different` named the aspect.
    """

    aspect: Aspect
    target: str
    what: str
    old: str
    new: str
    allowed: bool


class Row(_Part):
    """One figure, old and new.

    Attributes:
        target: `tensorrt`, `tensorrt-rtx`, `onnxruntime`, or empty for what is no target's.
        file: in the bundle; empty: the whole run.
        name: stable, with the unit in it: `latency_p99_ms`, `sqnr_db`, ...
        where: the output or precision that it is about; empty where there is one value.
        unit: of `old`, `new` and `change`: `ms`, `dB`, `bytes`, `s`, `samples/s`, `share`, or empty.
        old, new: None where there is none.
        change: new minus old.
        change_share: of the old value; None where that is zero or the unit is logarithmic.
        change_share_low, change_share_high: ends of its 90 % interval, each of which holds 19 times of 20 (throughput:
            between the lowest and highest rounds); None where it has no spread or none was measured.
        flag: that the limit comes from; empty: there is none.
        limit: how much worse it may become: a share of the old value, dB, or an absolute difference.
        verdict: better and worse are beyond the limit, same is within it.
        reason: why it is not comparable, or what the verdict rests on.
    """

    target: str
    file: str
    name: str
    where: str
    unit: str
    old: Estimate | None
    new: Estimate | None
    change: float | None
    change_share: float | None
    change_share_low: float | None
    change_share_high: float | None
    flag: str
    limit: float | None
    verdict: Verdict
    reason: str


class Comparison(_Part):
    """A run of `gpuopt compare`.

    Attributes:
        status: `passed`: nothing is worse; `refused`: they cannot be compared, or a demanded limit not be checked.
        differences: allowed or not; one that is not refuses the comparison, and there are no rows.
    """

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    status: Literal["passed", "regressed", "refused"]
    error: Failure | None
    old: Side
    new: Side
    differences: list[Difference]
    rows: list[Row]
