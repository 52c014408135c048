"""Samples that a function of the user yields."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from gpuopt import user_code
from gpuopt.calibration.readers.base import Inputs, RawSample, SampleReader
from gpuopt.calibration.readers.checks import Array, listed
from gpuopt.errors import DataError, described

CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""How `package.module:callable` is written."""


class CallableReader(SampleReader):
    """Calls the function anew for every iteration."""

    def __init__(self, data: str, inputs: Inputs, limit: int | None) -> None:
        super().__init__(f"callable {data}", inputs, None, limit)
        self._data, self._function = data, _load_function(data)

    def _samples(self) -> Iterator[RawSample]:
        index = 0
        try:
            samples = self._function()
            if inspect.isgenerator(samples) and inspect.getgeneratorstate(samples) != inspect.GEN_CREATED:
                raise DataError(
                    f"calibration data '{self._data}' gives a generator that was used already",
                    "Samples are read more than once: make a new generator in every call.",
                )
            for sample in samples:
                yield self._arrays(sample, index), self._data
                index += 1
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"calibration data '{self._data}' failed at sample {index}: {described(error)}",
                "Run the function by itself: it takes no argument and yields dicts of arrays.",
            ) from error

    def _arrays(self, sample: Any, index: int) -> dict[str, Array]:
        if isinstance(sample, Mapping):
            return {str(name): _copied(value) for name, value in sample.items()}
        values = list(sample) if isinstance(sample, (tuple, list)) else [sample]
        names = list(self._inputs)
        if not names:
            names = ["input"] if len(values) == 1 else [f"input{i}" for i in range(len(values))]
        if len(values) != len(names):
            raise DataError(
                f"sample {index} of '{self._data}' has {len(values)} value(s) for {len(names)} input(s)",
                f"Yield the inputs only, in this order: {listed(names)}; or a dict by name.",
            )
        return {name: _copied(value) for name, value in zip(names, values, strict=True)}


def _load_function(data: str) -> Callable[[], Iterable[Any]]:
    module_name, _, name = data.partition(":")
    try:
        module = user_code.imported(module_name)
    except (Exception, SystemExit) as error:
        # As `imported` tells of a file's name.
        called = module_name.removesuffix(".py") if getattr(error, "name", "") == module_name else module_name
        raise DataError(
            f"calibration data '{data}': importing {module_name} failed: {described(error)}",
            f"Run python -c 'import {called}' in {Path.cwd()}; if a path was meant, it does not exist.",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        raise DataError(
            f"calibration data '{data}': {module_name} has no callable '{name}'",
            f"Did you mean '{close[0]}'?" if close else "Define a function that yields samples.",
        )
    return cast(Callable[[], Iterable[Any]], function)


def _copied(value: Any) -> Array:
    """An array of its own: generators like to fill one buffer again and again."""
    return np.asarray(value).copy()
