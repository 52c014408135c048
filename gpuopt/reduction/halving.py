"""Delta debugging: the smallest part of a list that still fails, found by halving.

The algorithm is ddmin (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input",
IEEE Transactions on Software Engineering 28/2, 2002): try each of n parts alone, then each
complement, then twice as many parts. What it ends with is 1-minimal: it does not fail without any
one of its elements. Polygraphy's `debug reduce` bisects the end and then the beginning of the
node list instead, which finds no failure that needs two branches of a graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Part = tuple[int, ...]


@dataclass(frozen=True)
class Reduced:
    """What is left.

    Attributes:
        kept: indices, ascending.
        tries: how many parts were tried.
        finished: whether it is 1-minimal; else the time ran out before.
    """

    kept: Part
    tries: int
    finished: bool


def reduce(count: int, fails: Callable[[Part], bool], is_over: Callable[[], bool]) -> Reduced:
    """Halve `0 .. count - 1` for as long as `fails` says so of a part; the whole is known to fail.

    Args:
        count: how many elements; at least 1.
        fails: whether a part, ascending, fails in the same way; asked once of each part.
        is_over: whether the time has run out.
    """
    known: dict[Part, bool] = {}
    kept: Part = tuple(range(count))
    parts = 2
    while len(kept) > 1:
        chunks = _split(kept, min(parts, len(kept)))
        # With two parts, each is the other's complement.
        complements = [tuple(sorted(set(kept) - set(chunk))) for chunk in chunks] if len(chunks) > 2 else []
        for part in (*chunks, *complements):
            if part not in known:
                if is_over():
                    return Reduced(kept, len(known), False)
                known[part] = fails(part)
            if known[part]:
                parts = 2 if part in chunks else max(len(chunks) - 1, 2)
                kept = part
                break
        else:
            if len(chunks) == len(kept):
                break
            parts = 2 * len(chunks)
    return Reduced(kept, len(known), True)


def _split(items: Sequence[int], parts: int) -> list[Part]:
    """So many runs of neighbours, equally long but for one."""
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [tuple(items[low:high]) for low, high in itertools.pairwise(edges)]
