"""Run in an environment with tritonclient: what its descriptors say, and whether configurations parse.

Reads `{"configs": {name: text}}` from stdin; prints `{"table": ..., "errors": {name: message}, "texts": {name: text}}`,
`texts` being the configurations as Triton's own classes print them.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def table(descriptor: Any) -> dict[str, Any]:
    """Every message and enum below a descriptor: its fields as (number, name, type, repeated, oneof)."""
    found: dict[str, Any] = {}

    def of_enum(enumeration: Any) -> None:
        found[enumeration.full_name] = [[value.name, value.number] for value in enumeration.values]

    def of(message: Any) -> None:
        if message.full_name in found:
            return
        found[message.full_name] = [
            [
                field.number,
                field.name,
                field.message_type.full_name if field.message_type else
                field.enum_type.full_name if field.enum_type else str(field.type),
                field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED,
                field.containing_oneof.name if field.containing_oneof else "",
            ]
            for field in sorted(message.fields, key=lambda field: field.number)
        ]  # fmt: skip
        for field in message.fields:
            if field.message_type:
                of(field.message_type)
            if field.enum_type:
                of_enum(field.enum_type)
        for nested in message.nested_types:
            of(nested)
        for nested in message.enum_types:
            of_enum(nested)

    of(descriptor)
    return found


def main() -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    asked = json.load(sys.stdin)
    errors, texts = {}, {}
    for name, text in asked["configs"].items():
        try:
            texts[name] = text_format.MessageToString(text_format.Parse(text, model_config_pb2.ModelConfig()))
        except text_format.ParseError as error:
            errors[name] = str(error)
    json.dump({"table": table(model_config_pb2.ModelConfig.DESCRIPTOR), "errors": errors, "texts": texts}, sys.stdout)


if __name__ == "__main__":
    main()
