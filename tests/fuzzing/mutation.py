"""Damage to files that still look like what they are: bytes, JSON and YAML trees, ONNX graphs, zip members.

Everything is drawn from one `random.Random`, so that a seed, hypothesis or a coverage-guided fuzzer can drive it.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from random import Random
from typing import Any

import yaml

INTERESTING = (
    0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**40, 2**53, 2**62,
    2**63 - 1, -(2**63), 2**63, 2**64 - 1, 10**30, 10**400,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a" * 5000, "../../../../etc/passwd", "/etc/passwd", "~/.bashrc", "..", ".", "-1", "nan", "1e999",
    "0x10", "true", "null", "\ud7ff", "\uffff", "é" * 50, "*", "${HOME}", "{{7*7}}", "<script>alert(1)</script>",
    "__import__('os').system('true')", "os:system", "1x1x1", "9" * 5000 + "x1", "scalar", "99999999999x99999999999",
    "1_0x3", "2038-01-19", "int8", "onnxruntime", "\x1b[2J", "$(touch x)", "a:b:c", "x" * 70000,
)  # fmt: skip
_MOST_BYTES = 4 << 20


class Canary:
    """A pickle of it calls os.system, if anything unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch gpuopt-fuzz-canary",)


def evil_pickle() -> bytes:
    """A pickle that runs a command."""
    return pickle.dumps(Canary())


def mutate(data: bytes, random: Random) -> bytes:
    """A damaged copy of a file, damaged by its form if it has one."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        way = random.random()
        data = _by_form(data, random) if way < 0.55 else _bytes(data, random)
    return data[:_MOST_BYTES]


def _by_form(data: bytes, random: Random) -> bytes:
    if data.startswith(b"PK\x03\x04"):
        return _zip(data, random)
    if data.startswith(b"\x93NUMPY"):
        return _npy(data, random)
    if data[8:9] == b"{":
        return _safetensors(data, random)
    if data.lstrip()[:1] in (b"{", b"["):
        return _document(data, random)
    if data[:1] == b"\x08":
        return onnx_graph(data, random)
    if data[:3].isascii() and data[:3].isalpha():
        return _yaml(data, random)
    return _bytes(data, random)


def _bytes(data: bytes, random: Random) -> bytes:
    buffer = bytearray(data)
    size = len(buffer)
    at = random.randrange(size + 1)
    way = random.randrange(8)
    if way == 0:
        return bytes(buffer[:at])
    if way == 1 and size:
        for _ in range(random.choice((1, 2, 8, 64))):
            buffer[random.randrange(size)] ^= 1 << random.randrange(8)
    elif way == 2:
        buffer[at:at] = random.randbytes(random.choice((1, 2, 4, 16, 512)))
    elif way == 3:
        del buffer[at : at + random.choice((1, 2, 4, 16, 512))]
    elif way == 4:
        wide = random.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
        value = random.choice(INTERESTING) % (1 << 8 * struct.calcsize(wide))
        buffer[at : at + struct.calcsize(wide)] = struct.pack(wide, value)
    elif way == 5:
        length = random.choice((1, 8, 64, 4096))
        other = random.randrange(size + 1)
        buffer[at:at] = buffer[other : other + length]
    elif way == 6:
        buffer[at:at] = random.choice(TEXTS).encode(errors="replace")
    else:
        buffer[at : at + random.choice((1, 4, 64))] = b"\0" * random.choice((0, 1, 4, 64))
    return bytes(buffer)


def value(random: Random, depth: int = 0) -> Any:
    """Some JSON value, of the kinds that parsers stumble over."""
    way = random.randrange(9 if depth < 3 else 6)
    if way == 0:
        return random.choice(INTERESTING)
    if way == 1:
        return random.choice((0.5, -0.0, 1e308, float("nan"), float("inf"), 1e-320))
    if way in (2, 3):
        return random.choice(TEXTS)
    if way == 4:
        return random.choice((None, True, False))
    if way == 5:
        return random.choice(([], {}, [[]], [{}]))
    if way == 6:
        nested: Any = []
        for _ in range(random.choice((10, 200, 3000))):
            nested = [nested] if random.random() < 0.9 else {"a": nested}
        return nested
    if way == 7:
        return [value(random, depth + 1) for _ in range(random.choice((1, 3, 300)))]
    return {random.choice(TEXTS)[:80]: value(random, depth + 1) for _ in range(3)}


def _tree(tree: Any, random: Random) -> Any:
    """One place of a nested document changed."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            places.append((node, key))
            walk(child)

    walk(tree)
    if not places or random.random() < 0.03:
        return value(random)
    parent, key = random.choice(places)
    way = random.randrange(6)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, dict):
        parent[random.choice(TEXTS)[:200] if random.random() < 0.5 else f"{key}x"] = parent.pop(key)
    elif way == 2 and isinstance(parent, list):
        parent.extend([parent[key]] * random.choice((1, 50, 3000)))
    elif way == 3 and isinstance(parent[key], (int, float)):
        parent[key] = random.choice(INTERESTING)
    else:
        parent[key] = value(random)
    return tree


def _dumped(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode(errors="replace")
    except (ValueError, RecursionError):
        return b"[" * 200_000


def _document(data: bytes, random: Random) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, random)
    if random.random() < 0.05:
        return b'{"a":' * random.choice((100, 100_000)) + data
    if isinstance(tree, dict) and tree and random.random() < 0.05:
        key = random.choice(list(tree))
        return data.rstrip()[:-1] + b"," + _dumped({key: value(random)})[1:]
    return _dumped(_tree(tree, random))


def _yaml(data: bytes, random: Random) -> bytes:
    way = random.randrange(10)
    if way == 0:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True):
            bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        return bomb.encode() + data
    if way == 1:
        return data + b"\nbase: &base {a: 1}\nother:\n  <<: *base\n"
    if way == 2:
        return data + random.choice(
            (b"\nx: !!python/object/apply:os.system ['true']", b"\nx: !!binary aGk", b"\n? [a, b]\n: c",
             b"\nx: 0b" + b"1" * 100_000, b"\nx: " + b"9" * 100_000, b"\nx: 1:" + b"59:" * 5000 + b"1",
             b"\nx: 2001-99-99", b"\nx: !!timestamp x", b"\nx: 0x" + b"f" * 100_000, b"\nx: .inf", b"\nx: !!set {a, b}",
             b"\nx: !!omap [a: 1]", b"\n%YAML 9.9\n---\na: b", b"\n" + b"- " * 3000, b"\nx: " + b"[" * 3000,
             b"\nx: " + b"{a: " * 900, b"\n!!str : x", b"\nx: !<tag:yaml.org,2002:int> a", b"\nversion: 1\nversion: 2",
             b"\n\xff\xfe", b"\n--- \n...", b"\nx: !!int ''", b"\nx: !!float ''", b"\nx: !!bool maybe")
        )  # fmt: skip
    try:
        tree = yaml.safe_load(data)
        return yaml.safe_dump(_tree(tree, random)).encode(errors="replace")
    except Exception:  # the document is broken already, or too deep to be written
        return _bytes(data, random)


def _safetensors(data: bytes, random: Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = _document(data[8 : 8 + length], random)
    length = random.choice(INTERESTING) % 2**64 if random.random() < 0.2 else len(header)
    return struct.pack("<Q", length) + header + data[8 + struct.unpack("<Q", data[:8])[0] :]


def _npy(data: bytes, random: Random) -> bytes:
    shape = random.choice(
        ("(2, 3, 16, 16)", "(99999999999,)", "(0,)", "()", "(-1,)", "(2**40, 2**40)", "(1,)*64", "(True,)", "(1.5,)",
         "(4611686018427387904, 4)", "(9" + "9" * 3000 + ",)", "[1]", "((1,),)", "None", "(1, 0, 9999999999999)")
    )  # fmt: skip
    dtype = random.choice(
        ("'<f4'", "'|O'", "'<f8'", "'|V9999999'", "'<U99999999'", "[('a', '<f4')]", "'>i2'", "'|b1'", "'<M8[s]'",
         "'<c16'",
         "'|S0'", "'(9999,9999)f4'", "None", "{'names': ['a'], 'formats': ['O']}", "'" + "f" * 3000 + "'", "'<f2'")
    )  # fmt: skip
    order = random.choice(("False", "False", "True", "None", "1"))
    header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if random.random() < 0.1:
        header = random.choice(("(" * 5000, "{" * 300, "__import__('os').system('true')", "9" * 60_000, "\0", "{}"))
    encoded = header.encode() + b"\n"
    version = random.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    length = len(encoded) if random.random() < 0.9 else random.choice(INTERESTING)
    wide = "<H" if version == b"\x01\x00" else "<I"
    prefix = struct.pack(wide, length % (1 << 8 * struct.calcsize(wide)))
    body = evil_pickle() if "O" in dtype and random.random() < 0.5 else data[-random.choice((0, 1, 128, 6144)) :]
    return b"\x93NUMPY" + version + prefix + encoded + body


def _zip(data: bytes, random: Random) -> bytes:
    """The archive written anew with one member damaged, doubled, renamed, swollen or gone."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged already
        return _bytes(data, random)
    if not members:
        return _bytes(data, random)
    index = random.randrange(len(members))
    name, content = members[index]
    way = random.randrange(8)
    if way == 0:
        del members[index]
    elif way == 1:
        members.append((name, content))
    elif way == 2:
        members[index] = (
            random.choice(("../../out", "/tmp/out", name.upper(), name + "\0x", " ", "a" * 3000)),
            content,
        )
    elif way == 3:
        # A bomb: what unpacks to far more than the file has.
        members[index] = (name, content[:128] + b"\0" * (random.choice((1, 1, 4, 4, 16, 16, 16, 300)) << 20))
    elif way == 4:
        members[index] = (name, evil_pickle())
    else:
        members[index] = (name, _by_form(content, random) if random.random() < 0.6 else _bytes(content, random))
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    if way == 3:
        method = zipfile.ZIP_DEFLATED
    stream = io.BytesIO()
    try:
        import warnings

        with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
            warnings.simplefilter("ignore")
            for one, bytes_ in members:
                archive.writestr(one, bytes_)
    except (ValueError, OverflowError):
        return _bytes(data, random)
    return stream.getvalue()


def onnx_graph(data: bytes, random: Random) -> bytes:
    """The model with one thing in its graph that no exporter writes."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import TensorProto

    try:
        model = onnx.load_from_string(data)
    except (DecodeError, ValueError):
        return _bytes(data, random)
    graph = model.graph
    way = random.randrange(16)
    try:
        if way == 0 and graph.input:
            dims = random.choice(graph.input).type.tensor_type.shape.dim
            random.choice(dims).dim_value = random.choice(INTERESTING[:-3])
        elif way == 1 and graph.initializer:
            random.choice(graph.initializer).dims.append(random.choice(INTERESTING[:-3]))
        elif way == 2 and graph.initializer:
            tensor = random.choice(graph.initializer)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            for key, told in (
                ("location", random.choice((*TEXTS[:12], "model.onnx", "link", "data.bin", "/dev/zero", "folder"))),
                ("offset", str(random.choice(INTERESTING))),
                ("length", str(random.choice(INTERESTING))),
            ):
                if random.random() < 0.8:
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, told
        elif way == 3 and graph.node:
            # A cycle: a node reads what a later one makes, or its own output.
            random.choice(graph.node).input[0] = random.choice(graph.node).output[0]
        elif way == 4 and graph.initializer:
            random.choice(graph.initializer).data_type = random.choice((0, 2, 7, 8, 10, 16, 17, 22, 99, -1))
        elif way == 5 and graph.node:
            random.choice(graph.node).op_type = random.choice(("Loop", "If", "Scan", "NoSuchOperator", "", "Einsum"))
        elif way == 6 and graph.node:
            inner = graph.node.add()
            inner.op_type = "If"
            body = inner.attribute.add()
            body.name, body.type = "then_branch", onnx.AttributeProto.GRAPH
            for _ in range(random.choice((1, 30, 90))):
                nested = body.g.node.add()
                nested.op_type = "If"
                body = nested.attribute.add()
                body.name, body.type = "then_branch", onnx.AttributeProto.GRAPH
        elif way == 7 and graph.node:
            node = random.choice(graph.node)
            if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.i = random.choice(INTERESTING[:-3])
                attribute.ints.append(random.choice(INTERESTING[:-3]))
                attribute.type = random.choice((0, 1, 2, 3, 4, 5, 6, 7, 11))
        elif way == 8:
            random.choice(model.opset_import).version = random.choice(INTERESTING[:-3])
        elif way == 9:
            model.ir_version = random.choice(INTERESTING[:-3])
        elif way == 10 and graph.output:
            random.choice(graph.output).name = random.choice(TEXTS)[:300]
        elif way == 11 and graph.input:
            random.choice(graph.input).type.tensor_type.elem_type = random.choice((0, 2, 8, 9, 14, 16, 99))
        elif way == 12 and graph.node:
            del random.choice(graph.node).input[:]
        elif way == 13 and graph.input:
            random.choice(graph.input).ClearField("type")
        elif way == 14:
            graph.input.extend(list(graph.input))
            graph.initializer.extend(list(graph.initializer))
        else:
            del graph.node[random.randrange(len(graph.node) + 1) :]
    except (ValueError, IndexError, TypeError, OverflowError):
        return _bytes(data, random)
    made: bytes = model.SerializeToString()
    return made
