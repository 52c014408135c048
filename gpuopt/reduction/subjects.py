"""What is reduced: a graph that fails, or a graph whose outputs differ from another's."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from gpuopt import onnx_model
from gpuopt.errors import GpuoptError, UsageError
from gpuopt.reduction.attempts import Attempts, Check, signature
from gpuopt.reduction.files import GRAPH_FILE, LIMITS_FILE, OTHER_FILE, VALUES_FILE
from gpuopt.reduction.halving import Part
from gpuopt.reduction.subgraph import Piece, Pieces, with_random_weights, without_origin
from gpuopt.storage import write_json
from gpuopt.tolerance import Limits

if TYPE_CHECKING:
    import onnx_ir as ir


class Failing:
    """A graph that a stage does not take."""

    def __init__(self, pieces: Pieces, attempts: Attempts) -> None:
        self.pieces = pieces
        self.attempts = attempts

    def error_of(self, part: Part) -> GpuoptError | None:
        """How a part fails; None if it does not, or cannot stand alone."""
        piece = self.pieces.piece(part)
        return None if piece is None else self.attempts.error_of(piece)

    def write(self, part: Part, wanted: str, keep_weights: bool, folder: Path) -> tuple[Piece, bool]:
        """Write the part, as `reduced.onnx`.

        Args:
            wanted: the failure's signature.

        Returns:
            The part, and whether it fails with the weights that were written, tried in a new process.
        """
        piece = self.pieces.piece(part)
        assert piece is not None  # it was tried
        graph = without_origin(piece.model)
        piece = replace(piece, model=graph if keep_weights else with_random_weights(graph))
        self.attempts.again()
        found = self.attempts.error_of(piece)
        onnx.save(piece.model, str(folder / GRAPH_FILE))
        return piece, found is not None and signature(found) == wanted


class Differing:
    """A graph whose outputs differ from those of another with the same names, or of its own optimized form.

    Both get, at the border of a part, the values that the whole graph has there on random inputs.

    Args:
        other: the other graph; None: the graph as ONNX Runtime optimizes it.

    Raises:
        GpuoptError: the graph does not run.
        UsageError: the two graphs have no output in common.
    """

    def __init__(self, pieces: Pieces, attempts: Attempts, other: Path | None, limits: Limits) -> None:
        self.pieces = pieces
        self.attempts = attempts
        self._folder = attempts.scratch
        write_json(self._folder / LIMITS_FILE, asdict(limits))
        self._other = None if other is None else _read(other)
        whole = pieces.piece(tuple(range(len(pieces.nodes))))
        if whole is None:
            raise UsageError("a tensor of the graph has no known type or shape", "Run ONNX's shape inference over it.")
        if self._other is not None:
            theirs = {value.name for value in self._other.graph.outputs}
            if not theirs & {value.name for value in whole.model.graph.output}:
                raise UsageError("the two graphs have no output of the same name", "Compare graphs of one model.")
        self._values = self._recorded(whole)

    def error_of(self, part: Part) -> GpuoptError | None:
        """How the outputs of a part differ; None if they do not, or the other graph has no such part."""
        piece = self.pieces.piece(part)
        return None if piece is None else self._error_of(piece, self._values)

    def write(self, part: Part, wanted: str, keep_weights: bool, folder: Path) -> tuple[Piece, bool]:
        """As `Failing.write`; the weights of two graphs belong together, and stay."""
        piece = self.pieces.piece(part)
        assert piece is not None  # it was tried
        piece = replace(piece, model=without_origin(piece.model))
        if not keep_weights and self._other is None:
            piece = replace(piece, model=with_random_weights(piece.model))
        self.attempts.again()
        values = self._values
        if not keep_weights:
            # The values at the border come from the weights of the whole graph.
            with contextlib.suppress(GpuoptError):
                values = self._recorded(piece)
        found = self._error_of(piece, values)
        onnx.save(piece.model, str(folder / GRAPH_FILE))
        if (other := self._other_part(piece)) is not None:
            onnx.save(without_origin(other), str(folder / OTHER_FILE))
        shutil.copyfile(values, folder / VALUES_FILE)
        return piece, found is not None and signature(found) == wanted

    def _error_of(self, piece: Piece, values: Path) -> GpuoptError | None:
        beside = {VALUES_FILE: values, LIMITS_FILE: self._folder / LIMITS_FILE}
        if self._other is not None:
            other = self._other_part(piece)
            if other is None:
                return None
            onnx.save(other, str(self._folder / OTHER_FILE))
            beside[OTHER_FILE] = self._folder / OTHER_FILE
        return self.attempts.error_of(piece, beside)

    def _other_part(self, piece: Piece) -> onnx.ModelProto | None:
        """The part of the other graph between the same tensors."""
        if self._other is None:
            return None
        known = {value.name for node in self._other.graph for value in node.outputs}
        known |= {value.name for value in self._other.graph.inputs}
        outputs = [value.name for value in piece.model.graph.output if value.name in known]
        inputs = [value.name for value in piece.model.graph.input if value.name in known]
        if not outputs or set(outputs) & set(inputs):
            return None
        import onnx_ir as ir

        try:
            part = ir.convenience.extract(self._other.graph, inputs, outputs)
        except ValueError:
            return None
        return ir.to_proto(ir.Model(part, ir_version=self._other.ir_version))

    def _recorded(self, piece: Piece) -> Path:
        """The values of every tensor of a piece on random inputs."""
        check = Check("record", self.attempts.check.recipe)
        return self.attempts.record(piece, check, self._folder / f"{self.attempts.tries}.npz")


def _read(path: Path) -> ir.Model:
    import onnx_ir

    model: ir.Model = onnx_ir.from_proto(onnx_model.with_types(onnx_model.load_untrusted(path)))
    return model


def open_pieces(graph: Path) -> onnx.ModelProto:
    """A graph of the user's, its nodes in order.

    Raises:
        ModelError: it is no ONNX graph.
        UsageError: it has a cycle.
    """
    model = onnx_model.load_untrusted(graph)
    try:
        return onnx_model.sort_topologically(model)
    except ValueError as error:
        raise UsageError(f"{graph}: {error}", "Save or export the model again.") from error
