"""What a model file is, decided by its content, and whether reading it could run code.

Nothing here imports torch: the answer is needed before anything of the file is loaded.
"""

from __future__ import annotations

import ast
import enum
import io
import json
import lzma
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

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
_PICKLE_MAGIC = b"\x80"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_TORCH_PICKLES = 5
"""A file of torch's old format: magic number, version, system, the object, its storages' names; then raw storages."""

_MAX_PICKLE_BYTES = 64 << 20
_MAX_CHECKED_BYTES = 256 << 20
_SMALL_BYTES, _MOST_FACTOR = 64 << 20, 8
"""An archive that unpacks to more than both is a bomb."""
_MAX_SAFETENSORS_HEADER = 100 << 20
_UNREADABLE = "? unreadable"
_DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError, ValueError
)  # fmt: skip

# What a tensor-only pickle may name: the same idea as torch's weights_only loading.
_TENSOR_GLOBALS = re.compile(
    r"(collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch [A-Za-z0-9]*Storage"
    r"|torch (Tensor|Size|device|bfloat16|float16|float32|float64|uint8|int8|int16|int32|int64|bool)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\.storage (UntypedStorage|TypedStorage)"
    r"|(__builtin__|builtins) set)"
)

# Members of an exported program that torch reads as plain bytes; all others are checked or refused.
_RAW_MEMBER = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|version"
    r"|\.data/\w+|\.format_version|\.storage_alignment|extra/.+|extra_files/.+",
    re.ASCII,
)
_PAYLOAD_PATH = re.compile(r"(weight|tensor)_\d+", re.ASCII)
# Names end up in Python source that torch generates, so no string may hold what ends or calls something.
_PLAIN_TEXT = re.compile(r"""[^\\'"()\[\]{}`\x00-\x1f]*""")
# An exported program's calls: torch's own operators and arithmetic on symbolic sizes.
_SAFE_TARGET = re.compile(
    r"torch\.ops\.higher_order\.[a-z]\w*|torch\.ops\.(?!load_library\.|import_module\.)\w+\.\w+\.(?!__)\w+"
    r"|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|xor|not_|lshift|rshift|getitem)"
    r"|math\.[a-z]\w*|torch\.(_)?sym_\w+",
    re.ASCII,
)
_SAFE_EXPRESSION = re.compile(r"[\w\s+\-*/%(),.<>=&|~!]*", re.ASCII)
_EXPRESSION_NAMES = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_QUOTED_SYMBOL = re.compile(r"'([a-z]+\d+)'", re.ASCII)
_SAFE_EXPRESSION_NAME = re.compile(
    r"([a-z]+\d+|oo|int_oo|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not"
    r"|True|False|Integer|Symbol|Rational|Abs|floor|ceiling|Piecewise|ModularIndexing|Where|TruncToInt|ToFloat|IntTrueDiv"
    r"|FloatTrueDiv|PowByNatural|FloatPow|RoundToInt|TruncToFloat|Identity|integer|positive|negative|nonnegative)",
    re.ASCII,
)
_GUARD_NODES = (
    ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Call, ast.Attribute, ast.Subscript,
    ast.Name, ast.Constant, ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop,
)  # fmt: skip
_GUARD_ATTRIBUTES = {
    "torch": re.compile(r"sym_[a-z]+"),
    "math": re.compile(r"[a-z]+[0-9]*"),
    "": re.compile(r"size|stride|storage_offset|shape|ndim|numel"),
}


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
    if head.startswith(_PICKLE_MAGIC):
        with path.open("rb") as stream:
            found = _foreign_globals_of_old(stream.read(_MAX_PICKLE_BYTES))
        if _UNREADABLE not in found or size > _MAX_PICKLE_BYTES:
            return _kind_of_pickle(found)
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
        except Exception as error:  # whatever a damaged or hostile file makes the readers raise
            return [f"a program description that cannot be checked ({type(error).__name__}: {error})"]
    return []


def _detect_zip(path: Path) -> ModelKind:
    try:
        with zipfile.ZipFile(path) as archive:
            if min((member.header_offset for member in archive.infolist()), default=0):
                # What is left of a cut archive may end with a whole archive that lay inside it.
                raise ValueError("its table of contents is missing")
            if min((info.header_offset for info in archive.infolist()), default=0):
                raise zipfile.BadZipFile("it ends with an archive that lay inside it")
            unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > max(_SMALL_BYTES, _MOST_FACTOR * path.stat().st_size):
                raise ValueError(f"it unpacks to {unpacked >> 20} MiB, and torch compresses nothing")
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            if "archive_format" in names or "serialized_exported_program.json" in names:
                return ModelKind.EXPORTED_PROGRAM
            if "constants.pkl" in names:
                return ModelKind.TORCHSCRIPT
            if "data.pkl" in names:
                found = _foreign_globals(_read(archive, archive.namelist()[names.index("data.pkl")]))
                if _UNREADABLE in found:
                    raise ValueError("data.pkl is no whole pickle")
                return _kind_of_pickle(found)
    except _DAMAGED_ZIP as error:
        raise ModelError(
            f"{path} is truncated or damaged: {error}",
            "Save or download the model again; compare its size and checksum.",
        ) from error
    raise ModelError(
        f"{path} is a zip archive, but of no kind that torch writes",
        "It holds neither constants.pkl (TorchScript), archive_format (.pt2) nor data.pkl (torch.save).",
    )


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _MAX_CHECKED_BYTES:
        raise ValueError(f"{name} has {size} bytes, too many to be checked")
    return archive.read(name)


def _kind_of_pickle(foreign_globals: set[str]) -> ModelKind:
    return ModelKind.PICKLED_MODULE if foreign_globals else ModelKind.STATE_DICT


def _foreign_globals_of(path: Path) -> set[str]:
    with path.open("rb") as stream:
        data = stream.read(_MAX_PICKLE_BYTES)
    if not data.startswith(_ZIP_MAGIC):
        return _foreign_globals_of_old(data)
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return set().union(*(_foreign_globals(_read(archive, name)) for name in members))


def _foreign_globals_of_old(data: bytes) -> set[str]:
    return _foreign_globals(data, _TORCH_PICKLES if _TORCH_MAGIC in data[:16] else 1)


def _foreign_globals(data: bytes, pickles: int = 1) -> set[str]:
    """Names that pickles, one behind the other, import beyond what tensors need.

    `?` stands before what cannot be followed.
    """
    found: set[str] = set()
    stream = io.BytesIO(data)
    try:
        for _ in range(pickles):
            found |= _globals_of_next_pickle(stream)
    except (ValueError, IndexError):
        found.add(_UNREADABLE)
    return {name.replace(" ", ".", 1) if name[0] != "?" else name for name in found if not _is_tensor_global(name)}


def _is_tensor_global(name: str) -> bool:
    return _TENSOR_GLOBALS.fullmatch(name) is not None


def _globals_of_next_pickle(stream: BinaryIO) -> set[str]:
    found: set[str] = set()
    memo: dict[int, str | None] = {}
    # What the last steps pushed on the pickle machine's stack: a string, or None for anything else.
    pushed: list[str | None] = [None, None]
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
            continue
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = pushed[-1]
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            value = memo.get(int(str(argument)))
        else:
            value = argument if "UNICODE" in name and isinstance(argument, str) else None
        if name == "GLOBAL":
            found.add(str(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = pushed[-2:]
            found.add("? STACK_GLOBAL" if module is None or attribute is None else f"{module} {attribute}")
        elif name in ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            found.add(f"? {name}")
        pushed = [pushed[-1], value]
    return found


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
        except (ValueError, RecursionError):
            return False
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} is a damaged safetensors file: its header describes no tensors",
            "Save or download the model again.",
        ) from error
    if size < 8 + length + max(ends, default=0):
        raise ModelError(f"{path} is a truncated safetensors file", "Save or download the model again.")
    return True


def _is_onnx(path: Path) -> bool:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        # Without the format onnx goes by the file's suffix and parses, say, a `.json` as text.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return False
    return bool(model.ir_version and model.graph.node and model.opset_import)


def _program_hazards(path: Path) -> Iterator[str]:
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        yield from _archive_hazards(stream, archive)
        old = "serialized_exported_program.json" in archive.namelist()
        for name in archive.namelist():
            relative = name if old else name.partition("/")[2] or name
            if _RAW_MEMBER.fullmatch(relative):
                continue
            if relative.startswith("models/") or relative.endswith(".json"):
                yield from _json_hazards("", json.loads(_read(archive, name).decode()))
            elif relative.endswith(".pt"):
                yield from (f"{found} in {relative}" for found in _payload_hazards(_read(archive, name)))
            else:
                yield f"unknown content: {relative}"


def _archive_hazards(stream: BinaryIO, archive: zipfile.ZipFile) -> Iterator[str]:
    """What could make torch's zip reader see other members than Python's.

    torch finds members without regard to case, takes no note of bytes before the archive, and reads
    names up to their real end.
    """
    names = archive.namelist()
    if len({name.lower() for name in names}) != len(names):
        yield "two members of one name"
    if any(info.orig_filename != info.filename for info in archive.infolist()):
        yield "a member with a disguised name"
    stream.seek(0, io.SEEK_END)
    size = stream.tell()
    stream.seek(max(0, size - 98))
    tail = stream.read().rjust(98, b"\0")
    start = directory = struct.unpack("<I", tail[-6:-2])[0]
    if tail[-42:-38] == b"PK\x06\x07":
        directory = struct.unpack("<Q", tail[48:56])[0]
        pointer = struct.unpack("<Q", tail[-34:-26])[0]
        whole = tail.startswith(b"PK\x06\x06") and pointer == size - 98 and start in (directory, 0xFFFFFFFF)
    else:
        whole = True
    if not (whole and tail[-22:-18] == b"PK\x05\x06" and directory == archive.start_dir):
        yield "a zip archive of unusual layout"


def _payload_hazards(data: bytes) -> Iterator[str]:
    if not data:
        return
    if not data.startswith(_ZIP_MAGIC):
        yield "a pickle of an old format"
        return
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream) as archive:
        yield from _archive_hazards(stream, archive)
        for name in archive.namelist():
            if name.lower().endswith(".pkl"):
                yield from sorted(_foreign_globals(_read(archive, name)))


def _json_hazards(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if value.get("use_pickle"):
            yield f"pickled content: {value.get('path_name')}"
        for name, item in value.items():
            yield from _text_hazards("", name)
            # Metadata is kept as text: source lines, module paths.
            if name != "metadata" or not isinstance(item, dict) or not all(isinstance(v, str) for v in item.values()):
                yield from _json_hazards(name, item)
    elif isinstance(value, list):
        for item in value:
            yield from _json_hazards(key, item)
    elif isinstance(value, str):
        yield from _text_hazards(key, value)


def _text_hazards(key: str, text: str) -> Iterator[str]:
    if key == "expr_str":
        yield from _expression_hazards(text)
    elif key == "guards_code":
        yield from _guard_hazards(text)
    elif key in ("in_spec", "out_spec"):
        yield from _structure_hazards(json.loads(text)) if text else ()
    elif key == "target" and not _SAFE_TARGET.fullmatch(text):
        yield f"a call of {text}"
    elif key == "path_name" and not _PAYLOAD_PATH.fullmatch(text):
        yield f"an object that is no tensor: {text}"
    elif not _PLAIN_TEXT.fullmatch(text):
        yield f"the text {text[:60]!r}"


def _structure_hazards(value: Any) -> Iterator[str]:
    """What is wrong with a description of nested inputs or outputs; contexts are JSON inside JSON."""
    if isinstance(value, dict):
        if "__enum__" in value or "default_factory_module" in value:
            yield "an import named by its inputs or outputs"
        for name, item in value.items():
            yield from _text_hazards("", name)
            if name == "context" and isinstance(item, str):
                try:
                    item = json.loads(item)
                except ValueError:
                    yield from _text_hazards("", item)
                    continue
            yield from _structure_hazards(item)
    elif isinstance(value, list):
        for item in value:
            yield from _structure_hazards(item)
    elif isinstance(value, str):
        yield from _text_hazards("", value)


def _expression_hazards(expression: str) -> Iterator[str]:
    plain = _QUOTED_SYMBOL.sub(r"\1", expression)
    names = _EXPRESSION_NAMES.findall(plain)
    if not _SAFE_EXPRESSION.fullmatch(plain) or not all(map(_SAFE_EXPRESSION_NAME.fullmatch, names)):
        yield f"the expression {expression[:60]!r}"


def _guard_hazards(code: str) -> Iterator[str]:
    """torch runs a program's conditions on its input shapes as Python code."""
    try:
        nodes = list(ast.walk(ast.parse(code, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        nodes = []
    if not nodes or not all(map(_is_safe_in_guard, nodes)):
        yield f"the condition {code[:60]!r}"


def _is_safe_in_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("L", "torch", "math", "max", "min") or _SAFE_EXPRESSION_NAME.fullmatch(node.id) is not None
    if isinstance(node, ast.Attribute):
        root = node.value.id if isinstance(node.value, ast.Name) else ""
        return _GUARD_ATTRIBUTES.get(root, _GUARD_ATTRIBUTES[""]).fullmatch(node.attr) is not None
    if isinstance(node, ast.Call):
        return not node.keywords and isinstance(node.func, (ast.Attribute, ast.Name))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _PLAIN_TEXT.fullmatch(node.value) is not None
    return isinstance(node, _GUARD_NODES)


def files_of(path: Path) -> list[Path]:
    """The model file and, for ONNX, the external data that it names, as far as it is there."""
    with path.open("rb") as stream:
        head = stream.read(9)
    if head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)) or head[8:9] == b"{":
        return [path]
    from gpuopt.onnx_model import external_files

    return [path, *external_files(path)]
