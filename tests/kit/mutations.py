"""Valid inputs made slightly wrong: seeded, and aware of their structure, so that most get past the first check.

``Mutator`` changes bytes, JSON trees and protobuf messages. The same seed gives the same mutants.
"""

from __future__ import annotations

import copy
import random
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS: Final = (
    0, 1, -1, 2, 7, 255, 256, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 48) - 1, 1 << 48, 1 << 62, (1 << 63) - 3,
    (1 << 63) - 1, -(1 << 63),
)  # fmt: skip
TEXTS: Final = (
    "", "a", "..", "../../etc/passwd", "/", "\0", "job/run", "x" * 5000, "é", "\u202e", "nan", "1" * 30, "-1", "a" * 64, "{}",
)  # fmt: skip


class Mutator:
    """Makes mutants of valid inputs; one change mostly, sometimes a few."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(repr(seed))

    def changes(self) -> int:
        return self.random.choice((1, 1, 1, 2, 5))

    def bytes(self, data: bytes) -> bytes:
        """Bits flipped, parts cut out, repeated or replaced."""
        draw, mutant = self.random, bytearray(data)
        for _ in range(self.changes()):
            at = draw.randrange(len(mutant) + 1)
            end = min(len(mutant), at + draw.choice((1, 2, 4, 8, 64)))
            how = draw.randrange(6)
            if how == 0 and at < len(mutant):
                mutant[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                del mutant[at:]
            elif how == 2:
                del mutant[at:end]
            elif how == 3:
                mutant[at:at] = mutant[at:end]
            elif how == 4:
                mutant[at:end] = draw.randbytes(end - at)
            else:
                mutant[at:at] = draw.choice((b"\0", b"\xff" * 8, b"[" * 20_000, b'"', b"-", b"9" * 20))
        return bytes(mutant)

    def tree(self, value: Any) -> Any:
        """A JSON value with some places of it changed."""
        mutant = copy.deepcopy(value)
        for _ in range(self.changes()):
            mutant = self._change_somewhere(mutant)
        return mutant

    def _change_somewhere(self, root: Any) -> Any:
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, child in list(items):
                places.append((node, key))
                walk(child)

        walk(root)
        if not places or self.random.random() < 0.02:
            return self.replacement(root)
        parent, key = self.random.choice(places)
        how = self.random.randrange(8)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif how == 2:
            other, place = self.random.choice(places)
            with_it = other[place] if not isinstance(other, list) or place < len(other) else None
            parent[key] = copy.deepcopy(with_it)
        else:
            parent[key] = self.replacement(parent[key])
        return root

    def replacement(self, value: Any) -> Any:
        """Something in the place of ``value``: of its type mostly, at the limits of it."""
        draw = self.random
        if draw.random() < 0.2:
            deep: Any = []
            for _ in range(draw.choice((1, 20, 100))):
                deep = [deep]
            return draw.choice((None, True, 1.5, 1e308, "text", [], {}, {"a": 1}, [1, 2], deep, 1 << 200))
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return draw.choice((value + 1, value - 1, -value, value * 1000, draw.choice(NUMBERS)))
        if isinstance(value, str):
            return draw.choice((draw.choice(TEXTS), value[:-1], value + "x", value * 3, value.swapcase()))
        if isinstance(value, list):
            return draw.choice((value * 2, value[1:], value[::-1], [*value, None]))
        return draw.choice(NUMBERS)

    def message(self, message: Message) -> Message:
        """A protobuf message with some fields changed, at any depth."""
        mutant = copy.deepcopy(message)
        for _ in range(self.changes()):
            self._change_message(mutant)
        return mutant

    def _change_message(self, root: Message) -> None:
        found: list[tuple[Message, FieldDescriptor]] = []

        def walk(message: Message) -> None:
            for field in message.DESCRIPTOR.fields:
                found.append((message, field))
                if field.type == FieldDescriptor.TYPE_MESSAGE:
                    value = getattr(message, field.name)
                    children = value if field.is_repeated else [value] if message.HasField(field.name) else []
                    for child in children:
                        walk(child)

        walk(root)
        message, field = self.random.choice(found)
        if field.is_repeated:
            self._change_repeated(getattr(message, field.name), field)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if self.random.random() < 0.5:
                message.ClearField(field.name)
            else:
                getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, self._scalar(field))

    def _change_repeated(self, values: Any, field: FieldDescriptor) -> None:
        how, count = self.random.randrange(4), len(values)
        if how == 0 and count:
            del values[self.random.randrange(count)]
        elif how == 1 and count:
            one = copy.deepcopy(values[self.random.randrange(count)])
            values.extend([one] * self.random.choice((1, 1, 3, 100)))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            values.add()
        else:
            values.append(self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        draw = self.random
        if field.type == FieldDescriptor.TYPE_STRING:
            return draw.choice(TEXTS)
        if field.type == FieldDescriptor.TYPE_BOOL:
            return draw.random() < 0.5
        if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
            return draw.choice((0.0, -1.0, 1e308, float("nan"), float("inf")))
        if field.type == FieldDescriptor.TYPE_ENUM:
            return draw.choice((0, 1, 2, 77))
        if field.type == FieldDescriptor.TYPE_BYTES:
            return draw.randbytes(draw.choice((0, 1, 40)))
        limits = {
            FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
            FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
        }
        least, most = limits.get(field.type, (-(1 << 63), (1 << 63) - 1))
        if field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64):
            least, most = 0, (1 << 64) - 1
        return min(max(draw.choice(NUMBERS), least), most)
