"""Durations as users write them."""

from __future__ import annotations

import pytest

from gpuopt.durations import digits, microseconds, written
from gpuopt.errors import UsageError


@pytest.mark.parametrize(("text", "found"), [("100ms", 100_000), ("500us", 500), ("1.5s", 1_500_000), (" 2ms ", 2000)])
def test_durations(text: str, found: int) -> None:
    assert microseconds(text, "--it") == found


@pytest.mark.parametrize("text", ["", "5", "ms", "-1ms", "1 ms", "1e3us", "1m", "1_0ms"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--it"):
        microseconds(text, "--it")


@pytest.mark.parametrize(("found", "text"), [(0, "0 us"), (20, "20 us"), (1500, "1.5 ms"), (2_000_000, "2 s")])
def test_written(found: float, text: str) -> None:
    assert written(found) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (0.012344, "0.01234"), (12.3456, "12.35"), (9999.6, "10000"), (18234.5, "18234")]
)
def test_digits(number: float, text: str) -> None:
    assert digits(number, 4) == text
