"""What a model file is, decided by its content, and whether reading it could run code.

Nothing here imports torch: the answer is needed before anything of the file is loaded.
"""

from __future__ import annotations

import enum
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuopt.errors import ModelError
from gpuopt.storage import storage_errors


class ModelKind(enum.Enum):
    """The kinds of model input."""

    TORCHSCRIPT = "TorchScript archive"
    EXPORTED_PROGRAM = "exported program"
    PICKLED_MODULE = "pickled nn.Module"
    STATE_DICT = "state dict"
    SAFETENSORS = "safetensors"
    ONNX = "ONNX"
    FACTORY = "factory"


_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_PICKLE_MAGIC = b"\x80"
_MAX_JSON_BYTES = 256 << 20
_MAX_SAFETENSORS_HEADER = 100 << 20

# What a tensor-only pickle may name: the same idea as torch's weights_only loading.
_TENSOR_GLOBALS = re.compile(
    r"^(collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch [A-Za-z0-9]*Storage"
    r"|torch (Size|device|bfloat16|float16|float32|float64|uint8|int8|int16|int32|int64|bool)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\.storage (UntypedStorage|TypedStorage))$"
)

# An exported program's calls: torch's own operators and arithmetic on symbolic sizes.
_SAFE_TARGET = re.compile(
    r"^(torch\.ops\.[A-Za-z_]\w*\.[\w.]+|_operator\.[a-z_]+|math\.[a-z]+|torch\.sym_[a-z]+|torch\._sym_[a-z]+"
    r"|torch\.utils\._sympy\.functions\.\w+|operator\.[a-z_]+)$"
)
_SAFE_EXPRESSION = re.compile(r"^[\w\s+\-*/%(),.<>=&|~!]*$")
_EXPRESSION_NAMES = re.compile(r"[A-Za-z_]\w*")
_QUOTED_SYMBOL = re.compile(r"'([a-z]+\d+)'")
_SAFE_EXPRESSION_NAME = re.compile(
    r"^([su]\d+|[a-z]+\d+|zuf\d+|oo|int_oo|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not"
    r"|True|False|Integer|Symbol|Rational|Abs|floor|ceiling|Piecewise|ModularIndexing|Where|TruncToInt|ToFloat|IntTrueDiv"
    r"|FloatTrueDiv|PowByNatural|FloatPow|RoundToInt|TruncToFloat|Identity|integer|positive|negative|nonnegative)$"
)


def detect(path: Path) -> ModelKind:
    """The kind of a model file.

    Raises:
        StorageError: the file cannot be read.
        ModelError: it is empty, truncated, or of no kind that gpuopt reads.
    """
    with storage_errors("read", path):
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(16)
    if size == 0:
        raise ModelError(f"{path} is empty", "Save or download the model again.")
    if head.startswith(_ZIP_MAGIC):
        return _detect_zip(path)
    if _is_safetensors(path, head, size):
        return ModelKind.SAFETENSORS
    if head.startswith(_LEGACY_PICKLE_MAGIC):
        with path.open("rb") as stream:
            return _kind_of_pickle(stream.read(64 << 20))
    if _is_onnx(path):
        return ModelKind.ONNX
    raise ModelError(
        f"{path} is not a model that gpuopt reads",
        "It reads TorchScript, .pt2, pickled modules, state dicts, safetensors and ONNX. The file may be truncated.",
    )


def hazards(path: Path, kind: ModelKind) -> list[str]:
    """What in the file would run code when it is loaded; empty if nothing would.

    A pickled module always does. An exported program does not as long as it holds plain tensors,
    torch's own operators and plain arithmetic on its sizes: torch.export.load unpickles and
    evaluates what it finds, so everything else counts.
    """
    if kind is ModelKind.PICKLED_MODULE:
        return sorted(_foreign_globals_of(path)) or ["a pickle of unknown content"]
    if kind is ModelKind.EXPORTED_PROGRAM:
        try:
            return sorted(set(_program_hazards(path)))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            zipfile.BadZipFile,
            OSError,
        ) as error:
            return [f"a program description that cannot be checked ({type(error).__name__}: {error})"]
    return []


def _detect_zip(path: Path) -> ModelKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            if "archive_format" in names or "serialized_exported_program.json" in names:
                return ModelKind.EXPORTED_PROGRAM
            if "constants.pkl" in names:
                return ModelKind.TORCHSCRIPT
            if "data.pkl" in names:
                member = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                return _kind_of_pickle(archive.read(member))
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise ModelError(
            f"{path} is truncated or damaged: {error}",
            "Save or download the model again; compare its size and checksum.",
        ) from error
    raise ModelError(
        f"{path} is a zip archive, but of no kind that torch writes",
        "It holds neither constants.pkl (TorchScript), archive_format (.pt2) nor data.pkl (torch.save).",
    )


def _kind_of_pickle(data: bytes) -> ModelKind:
    return ModelKind.PICKLED_MODULE if _foreign_globals(data) else ModelKind.STATE_DICT


def _foreign_globals_of(path: Path) -> set[str]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            return _foreign_globals(archive.read(member))
    with path.open("rb") as stream:
        return _foreign_globals(stream.read(64 << 20))


def _foreign_globals(data: bytes) -> set[str]:
    """Names that a pickle imports beyond what tensors need; `?` where the stream cannot be followed."""
    found: set[str] = set()
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.add(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                found.add(" ".join(strings[-2:]))
            elif opcode.name in ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                found.add(f"? {opcode.name}")
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, IndexError, UnicodeDecodeError):
        found.add("? unreadable")
    return {name.replace(" ", ".", 1) for name in found if not _TENSOR_GLOBALS.match(name)}


def _is_safetensors(path: Path, head: bytes, size: int) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    if not 2 <= length <= min(_MAX_SAFETENSORS_HEADER, size - 8):
        if length <= _MAX_SAFETENSORS_HEADER:
            raise ModelError(
                f"{path} is a truncated safetensors file: its header says {length} bytes, the file has {size - 8}",
                "Save or download the model again.",
            )
        return False
    with path.open("rb") as stream:
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if size < 8 + length + max(ends, default=0):
        raise ModelError(f"{path} is a truncated safetensors file", "Save or download the model again.")
    return True


def _is_onnx(path: Path) -> bool:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return False
    return bool(model.ir_version and model.graph.node)


def _program_hazards(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            yield "two members of one name"
            return
        for name in names:
            info = archive.getinfo(name)
            if name.endswith((".json", ".pt")) and info.file_size > _MAX_JSON_BYTES:
                yield f"{name}, too large to be checked"
            elif name.endswith(".json"):
                yield from _json_hazards(name, json.loads(archive.read(name)))
            elif "/aotinductor/" in name or name.endswith((".so", ".py")):
                yield f"compiled or source code: {name}"
            elif "custom_obj" in name or name.endswith((".pt", ".pkl")):
                yield from _payload_hazards(name, archive.read(name))


def _payload_hazards(name: str, data: bytes) -> Iterator[str]:
    import io

    if data.startswith(_ZIP_MAGIC):
        with zipfile.ZipFile(io.BytesIO(data)) as inner:
            if len(set(inner.namelist())) != len(inner.namelist()):
                yield f"two members of one name in {name}"
            for member in inner.namelist():
                if member.endswith(".pkl"):
                    yield from (f"{found} in {name}" for found in sorted(_foreign_globals(inner.read(member))))
    elif data:
        yield from (f"{found} in {name}" for found in sorted(_foreign_globals(data)))


def _json_hazards(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _json_hazards(name, item)
    if not isinstance(value, dict):
        return
    target = value.get("target")
    if isinstance(target, str) and "inputs" in value and not _SAFE_TARGET.match(target):
        yield f"a call of {target}"
    expression = value.get("expr_str")
    if isinstance(expression, str):
        yield from _expression_hazards(expression)
    if value.get("use_pickle"):
        yield f"pickled content: {value.get('path_name')}"
    for item in value.values():
        yield from _json_hazards(name, item)


def _expression_hazards(expression: str) -> Iterator[str]:
    plain = _QUOTED_SYMBOL.sub(r"\1", expression)
    names = _EXPRESSION_NAMES.findall(plain)
    if not _SAFE_EXPRESSION.match(plain) or not all(map(_SAFE_EXPRESSION_NAME.match, names)):
        yield f"the expression {expression[:60]!r}"
