"""Files that are no valid safetensors, each wrong in one way, and files that are unusual and valid."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator


def u8(begin: int, end: int, **changes: object) -> dict[str, object]:
    """A tensor of bytes as a header describes it."""
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


def packed(header: object, data: bytes = b"\1" * 4, length: int | None = None) -> bytes:
    """A file: length, header (JSON, or bytes as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


T = b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
MALFORMED = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "length only": struct.pack("<Q", 8),
    "header length 0": packed(b""),
    "header longer than file": packed({"a": u8(0, 4)}, length=1000),
    "header length 2**64-1": packed({"a": u8(0, 4)}, length=2**64 - 1),
    "header length over the limit": packed({"a": u8(0, 4)}, length=25_000_001),
    "header over the limit": packed(b'{"__metadata__":{"x":"' + b"x" * 25_000_000 + b'"}}', b""),
    "bad UTF-8": packed(b'{"\xff":' + T + b"}"),
    "truncated JSON": packed(b'{"a":' + T),
    "array at top": packed(b"[]", b""),
    "string at top": packed(b'"a"', b""),
    "leading space": packed(b' {"a":' + T + b"}"),
    "BOM": packed(b'\xef\xbb\xbf{"a":' + T + b"}"),
    "UTF-16": packed('{"a":1}'.encode("utf-16")),
    "NUL after JSON": packed(b'{"a":' + T + b"}\0"),
    "junk after JSON": packed(b'{"a":' + T + b"}{}"),
    "JSON NaN": packed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}'),
    "JSON Infinity": packed(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,Infinity]}}'),
    "lone surrogate": packed(b'{"\\ud800":' + T + b"}"),
    "same name, same offsets": packed(b'{"a":' + T + b',"a":' + T + b"}"),
    "same name by an escape": packed(b'{"a":' + T + b',"\\u0061":' + T + b"}"),
    "same name, other offsets": packed(b'{"a":' + T + b',"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}', b"\1" * 8),
    "field twice": packed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
    "__metadata__ twice": packed(b'{"__metadata__":{},"__metadata__":{},"a":' + T + b"}"),
    "metadata key twice": packed(b'{"__metadata__":{"k":"1","k":"2"},"a":' + T + b"}"),
    "metadata of an integer": packed({"__metadata__": {"k": 1}, "a": u8(0, 4)}),
    "metadata nested": packed({"__metadata__": {"k": {}}, "a": u8(0, 4)}),
    "metadata a list": packed({"__metadata__": ["k"], "a": u8(0, 4)}),
    "metadata null value": packed({"__metadata__": {"k": None}, "a": u8(0, 4)}),
    "full overlap": packed({"a": u8(0, 4), "b": u8(0, 4)}),
    "partial overlap": packed({"a": u8(0, 3), "b": u8(2, 4)}),
    "hole": packed({"a": u8(0, 1), "b": u8(2, 4)}),
    "first offset not 0": packed({"a": u8(1, 4)}),
    "trailing bytes": packed({"a": u8(0, 4)}, b"\1" * 5),
    "trailing bytes without tensors": packed({}, b"\1"),
    "truncated data": packed({"a": u8(0, 4)}, b"\1" * 3),
    "end before begin": packed({"a": u8(0, 4, data_offsets=[4, 0])}),
    "negative offset": packed({"a": u8(0, 4, data_offsets=[-4, 0])}),
    "negative dim": packed({"a": u8(0, 4, shape=[-4])}),
    "two negative dims": packed({"a": u8(0, 4, shape=[-2, -2])}),
    "size mismatch": packed({"a": u8(0, 4, shape=[3])}),
    "size mismatch by dtype": packed({"a": u8(0, 4, dtype="F32")}),
    "shape overflow": packed({"a": u8(0, 0, shape=[2**32, 2**32])}, b""),
    "shape overflow by dtype": packed({"a": u8(0, 0, shape=[2**62], dtype="F32")}, b""),
    "shape overflow times 0": packed({"a": u8(0, 0, shape=[2**63, 2**63, 0])}, b""),
    "huge dim beside 0": packed({"a": u8(0, 0, shape=[10**18, 0])}, b""),
    "0 beside a dim of 2**63": packed({"a": u8(0, 0, shape=[0, 2**63])}, b""),
    "dims too many for an array beside 0": packed({"a": u8(0, 0, shape=[2**48, 0, 2**48])}, b""),
    "dim over u64": packed({"a": u8(0, 0, shape=[0, 2**64])}, b""),
    "dim of 5000 digits": packed(b'{"a":{"dtype":"U8","shape":[0,' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', b""),
    "float dim": packed({"a": u8(0, 4, shape=[4.0])}),
    "float dim 4e0": packed(b'{"a":{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}}'),
    "string dim": packed({"a": u8(0, 4, shape=["4"])}),
    "boolean dim": packed({"a": u8(0, 4, shape=[4, True])}),
    "null dim": packed({"a": u8(0, 4, shape=[4, None])}),
    "shape not a list": packed({"a": u8(0, 4, shape=4)}),
    "boolean offset": packed({"a": u8(0, 1, data_offsets=[False, True])}, b"\1"),
    "float offset": packed({"a": u8(0, 4, data_offsets=[0, 4.0])}),
    "unknown dtype": packed({"a": u8(0, 4, dtype="U4")}),
    "lowercase dtype": packed({"a": u8(0, 4, dtype="u8")}),
    "dtype a list": packed({"a": u8(0, 4, dtype=["U8"])}),
    "unsupported F4": packed({"a": u8(0, 4, dtype="F4", shape=[8])}),
    "odd number of F4": packed({"a": u8(0, 4, dtype="F4", shape=[7])}),
    "unsupported F6": packed({"a": u8(0, 3, dtype="F6_E2M3", shape=[4])}, b"\1" * 3),
    "unsupported F8_E8M0": packed({"a": u8(0, 4, dtype="F8_E8M0")}),
    "unsupported C64": packed({"a": u8(0, 8, dtype="C64", shape=[1])}, b"\1" * 8),
    "missing dtype": packed({"a": {"shape": [4], "data_offsets": [0, 4]}}),
    "missing offsets": packed({"a": {"dtype": "U8", "shape": [4]}}),
    "extra field": packed({"a": u8(0, 4, strides=[1])}),
    "one offset": packed({"a": u8(0, 4, data_offsets=[4])}),
    "three offsets": packed({"a": u8(0, 4, data_offsets=[0, 4, 4])}),
    "tensor a list": packed({"a": []}, b""),
    "tensor null": packed({"a": None}, b""),
    "zero-size tensor at a wrong offset": packed({"a": u8(0, 4), "b": u8(2, 2)}),
    "zero-size tensor past the end": packed({"a": u8(0, 4), "b": u8(9, 9)}),
    "33 dims": packed({"a": u8(0, 1, shape=[1] * 33)}, b"\1"),
    "2000 dims": packed({"a": u8(0, 1, shape=[1] * 2000)}, b"\1"),
    "NUL in a name": packed({"../../etc/passwd\0": u8(0, 4)}),
    "nested 100,000 deep": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "100,001 tensors": packed(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)) + b"}",
        b"",
    ),
    "control characters in a name": packed({"\x1b[2J\u202e\n": u8(0, 4, strides=[1])}),
    "control characters in a dtype": packed({"a": u8(0, 4, dtype="\x1b[2J\u202e\n")}),
}


VALID = {
    "no tensors": packed({}, b""),
    "only metadata": packed({"__metadata__": {"k": "v"}}, b""),
    "metadata empty": packed({"__metadata__": {}, "a": u8(0, 4)}),
    "zero-size tensors": packed({"a": u8(0, 0), "b": u8(0, 4), "c": u8(4, 4, shape=[0, 7])}),
    "padded": packed(b'{"a":' + T + b"}      "),
    "empty name": packed({"": u8(0, 4)}),
    "name like a path": packed({"../../etc/passwd": u8(0, 4)}),
    "32 dims": packed({"a": u8(0, 4, shape=[1] * 31 + [4])}),
    "unaligned F32": packed({"a": u8(0, 1), "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}, b"\1" * 5),
    "names in another order than offsets": packed({"b": u8(2, 4), "a": u8(0, 2)}),
}


_PIECES = [bytes([c]) for c in b"{}[]\",:0129-.eU\\ \n\0\x1b\x7f\xff"] + [
    b'"a"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b"18446744073709551616", b"-1", b"1e9", b"null",
    b"true", b"NaN", b"{}", b"[]", b"\\u0000", b"\\ud800", b"\xf0\x9f", b'"F32"', b'"BOOL"', b",",
]  # fmt: skip


def _seeds() -> list[bytes]:
    """What is mutated: all files of the corpus that are small, and a valid one of several dtypes."""
    two = {"w": u8(0, 4, dtype="F32", shape=[1]), "m": u8(4, 6, dtype="BF16", shape=[1, 1])}
    tensors = {"__metadata__": {"format": "pt"}} | two | {"b": u8(6, 8, dtype="BOOL"), "e": u8(8, 8)}
    several = packed(tensors, b"\0\0\x80\x3f\x80\x3f\1\0")
    return [several] * 20 + [content for content in [*MALFORMED.values(), *VALID.values()] if len(content) < 4096]


def mutant(number: int) -> bytes:
    """One mutated file, the same for a number always: bytes of the header or its length flipped, inserted, taken out,
    doubled, or one field of a valid header set to something else."""
    draw = random.Random(number)
    content = bytearray(draw.choice(_SEEDS))
    if draw.random() < 0.4:
        return _wrong_field(draw)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        at = draw.randrange(len(content) + 1)
        match draw.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                content[at:at] = draw.choice(_PIECES)
            case 2:
                del content[at : at + draw.randint(1, 8)]
            case 3:
                content[at:at] = content[at : at + draw.randint(1, 40)]
            case 4:
                content[at : at + 1] = draw.choice(_PIECES)
            case _:
                content[:8] = struct.pack("<Q", max(0, len(content) - 8 - draw.randint(0, 9)))
    if draw.random() < 0.5 and len(content) > 8:  # else a header that has grown is mostly refused for its length alone
        end = content.rfind(b"}") + 1
        content[:8] = struct.pack("<Q", max(0, end - 8))
    return bytes(content)


_SEEDS = _seeds()
_VALUES = (
    0, 1, -1, 2, 3, 4, 8, 2**31,
    2**32, 2**48, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 2**64, 1.5, True, None,
    "", "4", [], {}, [[]],
)  # fmt: skip


def _wrong_field(draw: random.Random) -> bytes:
    """A random valid header with one thing in it replaced, or in one of ten none."""
    header: dict[str, object] = {}
    end = 0
    for name in draw.sample(["a", "b", "c", "a.b", "\u00e9", "x" * 300], draw.randint(1, 5)):
        dtype, size = draw.choice([("U8", 1), ("BF16", 2), ("F32", 4), ("I64", 8), ("BOOL", 1), ("F8_E4M3", 1)])
        shape = [draw.choice([0, 1, 2, 3]) for _ in range(draw.randint(0, 4))]
        count = size
        for dim in shape:
            count *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    if draw.random() < 0.1:
        return packed(dict(draw.sample(list(header.items()), len(header))), b"\0" * end)
    fields = header[draw.choice(list(header))]
    assert isinstance(fields, dict)
    key = draw.choice(["dtype", "shape", "data_offsets", "other"])
    value = draw.choice(_VALUES)
    if key in ("shape", "data_offsets") and fields[key] and draw.random() < 0.7:
        fields[key] = list(fields[key])
        fields[key][draw.randrange(len(fields[key]))] = value
    else:
        fields[key] = value
    return packed(header, b"\0" * max(0, end + draw.choice([0, 0, 0, 1, -1])))


def grown(count: int) -> Iterator[bytes]:
    """The corpus, and mutants until there are so many."""
    yield from MALFORMED.values()
    yield from (mutant(n) for n in range(count - len(MALFORMED)))
