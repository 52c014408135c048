"""What every sample has to fulfil: the names, shapes, dtypes and finite values that the model's inputs take."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.errors import DataError
from gpuopt.shapes import Shape, TensorSpec, format_shape

Array = npt.NDArray[Any]


def listed(names: Iterable[str]) -> str:
    """Up to five names in quotes, and how many more there are."""
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def check_names(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Compare the names in the data with those of the inputs, in any order.

    Raises:
        DataError: they differ; the hint suggests what to rename.
    """
    found, wanted = list(found), list(wanted)
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if not missing and not unexpected:
        return
    parts = [f"{word} {listed(names)}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
    hint = f"The inputs are {listed(wanted)}."
    for name in missing:
        close = difflib.get_close_matches(name, unexpected, n=1)
        if not close and len(missing) == len(unexpected) == 1:
            close = unexpected
        if close:
            hint += f"\nRename '{close[0]}' to '{name}'?"
            break
    raise DataError(f"{where} does not name the model's inputs: {', '.join(parts)}", hint)


def check_dtype(dtype: np.dtype[Any], where: str) -> None:
    """Refuse what is neither float, integer nor bool.

    Raises:
        DataError: as said.
    """
    if _kind(dtype) == "other":
        raise DataError(f"{where} has dtype {dtype}, which no input takes", "Save float, integer or bool arrays.")


def full_shape(name: str, shape: Shape, spec: TensorSpec | None, where: str) -> Shape:
    """The shape of a sample that fits the input, with a leading batch axis of 1 where it lacks one.

    Args:
        name: of the input.
        shape: as found in the data.
        spec: the input; None where it is unknown, which any shape without a 0 fits.
        where: the words for the error.

    Raises:
        DataError: the shape does not fit, or an axis has no element.
    """
    fits, expected = True, "at least one element"
    if spec is not None:
        if len(shape) == len(spec.shape) - 1:
            shape = (1, *shape)
        fits = len(shape) == len(spec.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(spec.shape, shape, strict=True)
        )
        expected = format_shape(spec.shape)
    if not fits or 0 in shape:
        raise DataError(
            f"input '{name}' of {where} has shape {format_shape(shape)}, expected {expected}",
            "Give every sample the shape that the model's input has.",
        )
    return shape


def fit(name: str, array: Array, spec: TensorSpec | None, where: str) -> Array:
    """A raw array as the input takes it: full rank, its dtype, native byte order, C order, in memory.

    Args:
        name: of the input.
        array: of any byte and memory order; may be mapped from a file.
        spec: the input; None where it is unknown, then shape and dtype stay.
        where: the words for the error.

    Raises:
        DataError: the shape does not fit; the dtype is of another kind (float, integer, bool); an
            integer is beyond the input's dtype; a value is NaN or infinite, as given or after the cast.
    """
    check_dtype(array.dtype, f"input '{name}' of {where}")
    array = array.reshape(full_shape(name, array.shape, spec, where))
    array = _cast(name, array, spec, where)
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise DataError(
                f"input '{name}' of {where} holds {bad} NaN or infinite of {array.size} values",
                "Remove the sample, or repair the preprocessing that made it.",
            )
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    return {"f": "float", "i": "integer", "u": "integer", "b": "bool"}.get(dtype.kind, "other")


def _cast(name: str, array: Array, spec: TensorSpec | None, where: str) -> Array:
    given = array.dtype
    wanted = given.newbyteorder("=")
    if spec is not None:
        # A dtype that numpy lacks, such as bfloat16, is left to whoever runs the model.
        with contextlib.suppress(TypeError):
            wanted = np.dtype(spec.dtype)
    if _kind(given) != _kind(wanted):
        hint = f"Save it as {wanted}: array.astype('{wanted}')."
        if given == np.uint8 and _kind(wanted) == "float":
            hint = (
                f"Scale and normalise the values as in training, such as array.astype('{wanted}') / 255,\n"
                "and save the result: raw bytes would give ranges far too large."
            )
        elif wanted == np.uint8 and _kind(given) == "float":
            hint = "The compiled model takes bytes: save the images before they are scaled and normalised."
        raise DataError(f"input '{name}' of {where} has dtype {given}, expected {wanted}", hint)
    if _kind(wanted) == "integer" and not np.can_cast(given, wanted):
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DataError(
                f"input '{name}' of {where} holds integers that {wanted} cannot",
                f"Keep the values in [{limits.min}, {limits.max}].",
            )
    # Mapped data are copied, for a feed may outlive the file.
    mapped = isinstance(array, np.memmap)
    with np.errstate(over="ignore"):  # What overflows is found as an infinity right after.
        return array.astype(wanted, order="C", copy=mapped, subok=False)
