"""Checkpoints: what the safetensors package writes we read and the reverse; what is malformed is refused by name.

Expected values come from the definition of each number format, from the safetensors package, or are written out here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refmerge.checkpoint import (
    DTYPES,
    FLOATS,
    CheckpointWriter,
    decode,
    encode,
    itemsize,
    name_of,
    open_checkpoint,
    parse_size,
    promote,
    same_or_inside,
    save,
)
from refmerge.errors import InputError, ResourceError, UsageError

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` alone does not look for the folder `tests` there

from tests.reliability.corpus import MALFORMED, VALID, packed, u8

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


# --- Number formats --------------------------------------------------------------------------------------------------

# name: (stored fraction bits, exponent bias, largest finite value, has infinity)
FORMATS = {
    "F8_E4M3": (3, 7, 448.0, False),
    "F8_E5M2": (2, 15, 57344.0, True),
    "F16": (10, 15, 65504.0, True),
    "BF16": (7, 127, (2 - 2.0**-7) * 2.0**127, True),
    "F32": (23, 127, (2 - 2.0**-23) * 2.0**127, True),
}
SMALL = ["F8_E4M3", "F8_E5M2", "F16", "BF16"]


def value(code: int, dtype: str) -> float:
    """What a stored code means, from the format's definition."""
    fraction_bits, bias, _, infinite = FORMATS[dtype]
    width = 8 * itemsize(dtype)
    sign = -1.0 if code >> (width - 1) else 1.0
    fraction = code & ((1 << fraction_bits) - 1)
    top = (1 << (width - 1 - fraction_bits)) - 1
    exponent = code >> fraction_bits & top
    if infinite and exponent == top:
        return math.nan if fraction else sign * math.inf
    if not infinite and code & ((1 << (width - 1)) - 1) == (1 << (width - 1)) - 1:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - bias - fraction_bits)
    return sign * math.ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)


def nearest(x: float, dtype: str) -> float:
    """`x` rounded once to the nearest value of the format, ties to even, in rational arithmetic."""
    fraction_bits, bias, largest, infinite = FORMATS[dtype]
    if math.isnan(x):
        return x
    beyond = math.copysign(math.inf, x) if infinite else math.nan
    if math.isinf(x):
        return beyond
    if x == 0:
        return x
    exponent = max(math.frexp(x)[1] - 1, 1 - bias)
    quantum = Fraction(2) ** (exponent - fraction_bits)
    rounded = round(Fraction(x) / quantum) * quantum  # Python rounds a Fraction half to even
    return beyond if abs(rounded) > largest else math.copysign(float(rounded), x)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    out = np.empty(x.size * itemsize(dtype), np.uint8)
    encode(x, dtype, out)
    return out


def widened(raw: np.ndarray, dtype: str, work=np.float64) -> np.ndarray:
    out = np.empty(raw.size // itemsize(dtype), work)
    decode(raw, dtype, out)
    return out


def same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal, zeros with their signs, NaN as any NaN."""
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(
        np.signbit(a)[~np.isnan(a)], np.signbit(b)[~np.isnan(b)]
    )


def codes(dtype: str) -> np.ndarray:
    width = itemsize(dtype)
    return np.arange(1 << 8 * width).astype(f"<u{width}")


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", SMALL)
def test_every_stored_value_is_decoded_and_encoded_back(dtype, work):
    raw = codes(dtype).view(np.uint8)
    expected = np.array([value(int(code), dtype) for code in codes(dtype)], work)
    decoded = widened(raw, dtype, work)
    assert same_values(decoded, expected)
    back = stored(decoded, dtype).view(codes(dtype).dtype)
    number = ~np.isnan(expected)
    assert np.array_equal(back[number], codes(dtype)[number])
    assert np.isnan(widened(back.view(np.uint8), dtype)[~number]).all()


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", SMALL)
def test_every_border_between_neighbours(dtype, work):
    """At and on both sides of the midpoint of all pairs of neighbouring values, both signs."""
    positive = codes(dtype)[: codes(dtype).size // 2]
    values = np.array([value(int(code), dtype) for code in positive])
    finite = np.isfinite(values)
    low, low_values = positive[finite][:-1], values[finite][:-1]
    middle = ((low_values + values[finite][1:]) / 2).astype(work)
    for x, expected in [
        (np.nextafter(middle, work(0)), low),
        (middle, low + (low & 1)),
        (np.nextafter(middle, work(np.inf)), low + 1),
    ]:
        for sign in (1, -1):
            got = stored(work(sign) * x, dtype).view(low.dtype)
            assert np.array_equal(got, expected | (sign < 0) * low.dtype.type(positive.size))


BORDERS = [
    *(sign * math.nextafter(edge, to) for sign in (1, -1) for to in (0, math.inf) for edge in (
        2.0**-149, 2.0**-150, 2.0**-133, 2.0**-134, 2.0**-126, 2.0**-24, 2.0**-25, 2.0**-16, 2.0**-17, 2.0**-9,
        2.0**-10, 448.0, 464.0, 480.0, 57344.0, 61440.0, 65504.0, 65520.0, (2 - 2.0**-8) * 2.0**127,
        (2 - 2.0**-24) * 2.0**127, 1 + 2.0**-8, 1 + 2.0**-11, 1 + 2.0**-3, 1 + 2.0**-4, 1 + 2.0**-24,
    )),
    0.0, -0.0, math.inf, -math.inf, math.nan, 464.0, 61440.0, 65520.0, 5e-324, -5e-324, 1.7e308, -1.7e308,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS)
def test_borders(dtype):
    expected = np.array([nearest(x, dtype) for x in BORDERS])
    assert same_values(widened(stored(np.array(BORDERS), dtype), dtype), expected)


@pytest.mark.parametrize("dtype", FORMATS)
@given(x=st.floats(), steps=st.integers(-2, 2), near=st.integers(0, 2**32 - 1))
@example(x=1.0 + 2.0**-8 + 2.0**-40, steps=0, near=0)  # through float32 this would be a tie, and round down
@example(x=math.ldexp(1.0, -134), steps=1, near=0)
@settings(quick, max_examples=300)
def test_float64_is_rounded_once(dtype, x, steps, near):
    # Beside `x` anywhere, a point within two ulps of a midpoint of the format, where a second rounding shows.
    fraction_bits, bias, *_ = FORMATS[dtype]
    exponent = near % (2 * bias + fraction_bits + 2) - bias - fraction_bits
    middle = math.ldexp(((near >> 9) | 1 << fraction_bits + 1 | 1) & ((1 << fraction_bits + 2) - 1), exponent)
    middle /= 1 << (fraction_bits + 1)
    points = [x, -x]
    for _ in range(abs(steps)):
        middle = math.nextafter(middle, math.inf if steps > 0 else 0)
    points += [middle, -middle]
    expected = np.array([nearest(point, dtype) for point in points])
    assert same_values(widened(stored(np.array(points), dtype), dtype), expected)


@pytest.mark.parametrize("dtype", sorted(FLOATS - {"F64"}))
@given(x=hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
@quick
def test_float32_and_the_same_values_in_float64_are_stored_alike(dtype, x):
    a, b = (widened(stored(y, dtype), dtype) for y in (x, x.astype(np.float64)))
    assert same_values(a, b)
    assert same_values(a, np.array([nearest(float(value), dtype) for value in x]))


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_conversion_at_any_alignment_and_across_chunks(dtype):
    count = (1 << 16) + 3
    x = np.random.default_rng(1).standard_normal(count)
    plain = stored(x, dtype)
    for shift in range(1, itemsize(dtype)):
        room = np.zeros(plain.size + shift, np.uint8)
        encode(x, dtype, room[shift:])
        assert np.array_equal(room[shift:], plain) and not room[:shift].any()
        assert np.array_equal(widened(room[shift:], dtype), widened(plain, dtype))
    assert np.array_equal(plain.view(DTYPES[dtype]).astype(np.float64), widened(plain, dtype))


def test_conversion_refuses_what_does_not_fit():
    two, four, eight = (np.zeros(n, np.uint8) for n in (2, 4, 8))
    for raw, dtype, out in [
        (eight, "F64", np.zeros(1, np.float32)),
        (four, "I32", np.zeros(1, np.float32)),
        (four, "F32", np.zeros(2, np.float32)),
        (two, "BF16", np.zeros(1, np.float16)),
        (eight[::2], "F32", np.zeros(1, np.float32)),
        (four, "BF16", np.zeros(4, np.float32)[::2]),
        (four, "BF16", np.zeros((1, 2), np.float32)),
        (four.view(np.int8), "F32", np.zeros(1, np.float32)),
    ]:
        with pytest.raises(ValueError):
            decode(raw, dtype, out)
    with pytest.raises(ValueError):
        encode(np.zeros(2, np.float32), "BF16", two)


def test_promote_holds_all_values():
    ranges = {name: (bits, bias) for name, (bits, bias, *_) in FORMATS.items()} | {"F64": (52, 1023)}

    def holds(big, small):
        (bits, bias), (small_bits, small_bias) = ranges[big], ranges[small]
        if big == small:
            return True
        # 448 needs exponent 8, one more than an IEEE format of its width would have.
        return (
            bits >= small_bits and bias >= small_bias + (small == "F8_E4M3") and bias + bits > small_bias + small_bits
        )

    for a in ranges:
        for b in ranges:
            got = promote([a, b])
            assert got == promote([b, a]) and holds(got, a) and holds(got, b)
            smaller = [c for c in ranges if itemsize(c) < itemsize(got)]
            assert not any(holds(c, a) and holds(c, b) for c in smaller)
    assert promote(["BF16", "F16"]) == "F32"
    assert promote(["F8_E4M3", "F8_E5M2"]) == "F16"
    assert promote(["F8_E4M3", "BF16"]) == "BF16"
    for bad in ([], ["I32"], ["F32", "I64"]):
        with pytest.raises(ValueError):
            promote(bad)


def test_names_of_dtypes():
    for name, dtype in DTYPES.items():
        assert name_of(dtype) == name
    assert name_of(np.dtype(">f4")) == "F32"
    assert name_of(np.float16) == "F16"
    for bad in (np.complex64, np.dtype("M8[s]"), np.dtype("S3"), np.dtype(object), ml_dtypes.float8_e8m0fnu):
        with pytest.raises(InputError, match="no safetensors type"):
            name_of(bad)


# --- Round trips -----------------------------------------------------------------------------------------------------


def samples() -> dict[str, np.ndarray]:
    """One array of each type that holds every byte value somewhere."""
    every = np.arange(256, dtype=np.uint8)
    raw = np.concatenate([every, every[::-1], np.repeat(every, 6)])
    return {
        f"t.{name}": (raw & 1 if name == "BOOL" else raw).view(dtype).reshape(4, -1) for name, dtype in DTYPES.items()
    }


def test_ours_is_read_by_safetensors(tmp_path):
    arrays = samples()
    save(arrays, tmp_path / "x.safetensors", metadata={"note": "é"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
        assert sorted(file.keys()) == sorted(arrays)
    for name, entry in safetensors.deserialize((tmp_path / "x.safetensors").read_bytes()):
        assert f"t.{entry['dtype']}" == name
        assert entry["shape"] == list(arrays[name].shape)
        assert bytes(entry["data"]) == arrays[name].tobytes()


def test_theirs_is_read_by_us(tmp_path):
    arrays = samples()
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert list(checkpoint) == sorted(arrays) == list(checkpoint.tensors)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.directory is None and checkpoint.config is None and checkpoint.sidecars() == []
        assert checkpoint.nbytes == sum(a.nbytes for a in arrays.values())
        for name, a in arrays.items():
            assert checkpoint[name].dtype == a.dtype
            assert checkpoint[name].shape == a.shape == checkpoint.tensors[name].shape
            assert checkpoint[name].tobytes() == a.tobytes()


def test_our_bytes_are_those_of_the_official_writer(tmp_path):
    arrays = samples() | {"": np.zeros((0, 5)), "scalar": np.array(2.0, np.float32)}
    arrays['odd "\\\n\x1f\x7f é \U0001f600'] = np.arange(3, dtype=np.int8)
    save(arrays, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == safetensors.numpy.save(arrays, {"format": "pt"})


def test_any_strides_and_byte_orders(tmp_path):
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "transposed": a.T,
        "columns": a[:, ::2],
        "backwards": a[::-1],
        "broadcast": np.broadcast_to(a[0], (3, 6)),
        "fortran": np.asfortranarray(a),
        "big": a.astype(">f4"),
        "scalar": np.array(3.5),
        "empty": np.zeros((3, 0, 2), np.int16),
        "bf16": a.astype(ml_dtypes.bfloat16).T,
        "read only": np.frombuffer(a.tobytes(), np.float32),
        "bool": a > 5,
    }
    save(arrays, tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        for name, expected in arrays.items():
            assert checkpoint[name].shape == expected.shape
            assert np.array_equal(checkpoint[name], expected)


@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3),
    limit=st.integers(1, 400),
)
@settings(quick, max_examples=60)
def test_any_model_round_trips(tmp_path_factory, tensors, metadata, limit):
    target = tmp_path_factory.mktemp("model") / "out"
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in tensors.items():
        raw = rng.integers(0, 2 if dtype == "BOOL" else 256, math.prod(shape) * itemsize(dtype), np.uint8)
        arrays[name] = raw.view(DTYPES[dtype]).reshape(shape)
    save(arrays, target, max_shard_size=limit, metadata=metadata)
    with open_checkpoint(target) as checkpoint:
        assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == tensors
        assert checkpoint.metadata == {"format": "pt", **metadata}
        assert all(checkpoint[name].tobytes() == a.tobytes() for name, a in arrays.items())
        for file in {t.file for t in checkpoint.tensors.values()}:
            infos = [t for t in checkpoint.tensors.values() if t.file == file]
            assert len(infos) == 1 or sum(t.nbytes for t in infos) <= limit
            assert all(t.offset % itemsize(t.dtype) == 0 for t in infos)


def test_ranges_are_read(tmp_path):
    a = np.arange(1000, dtype=np.uint16)
    save({"a": a}, tmp_path / "x.safetensors")
    with open_checkpoint(str(tmp_path / "x.safetensors")) as checkpoint:
        for start, stop in [(0, 0), (0, 1), (7, 500), (999, 1000), (1000, 1000)]:
            out = np.empty(2 * (stop - start), np.uint8)
            checkpoint.read("a", start, stop, out)
            assert np.array_equal(out.view(np.uint16), a[start:stop])
        bytes_20 = np.empty(20, np.uint8)
        for start, stop, out in [
            (-1, 9, bytes_20),
            (995, 1005, bytes_20),
            (5, 4, bytes_20),
            (0, 9, bytes_20),
            (0, 10, np.empty(40, np.uint8)[::2]),
            (0, 10, bytes_20.view(np.int8)),
            (0, 5, bytes_20.reshape(2, 10)),
        ]:
            with pytest.raises(ValueError):
                checkpoint.read("a", start, stop, out)
        with pytest.raises(KeyError):
            checkpoint.read("b", 0, 1, bytes_20)
        assert "b" not in checkpoint and checkpoint.get("b") is None and len(checkpoint) == 1
        checkpoint.close()
        assert np.array_equal(checkpoint["a"], a)


def test_same_bytes_every_time(tmp_path):
    arrays = samples()
    metadata = {key: key for key in "zyxabc"}
    save(arrays, tmp_path / "a", max_shard_size=5000, metadata=metadata)
    reverse = dict(reversed(arrays.items())), dict(reversed(metadata.items()))
    save(reverse[0], tmp_path / "b", max_shard_size=5000, metadata=reverse[1])
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b")) and len(names) > 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


# --- Malformed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "bad.safetensors" in message and message.isprintable() and len(message) < 1000


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_our_own_checks_do_not_lean_on_the_package(tmp_path, monkeypatch, content):
    monkeypatch.setattr("refmerge.checkpoint.header._check_with_safetensors", lambda path: None)
    test_malformed_file_is_refused(tmp_path, content)


@pytest.mark.parametrize("content", [*MALFORMED.values(), *VALID.values()], ids=[*MALFORMED, *VALID])
def test_large_headers_are_read_as_small_ones(tmp_path, monkeypatch, content):
    """They are parsed into less memory, without and with the package's own check, to the same tensors and errors."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    def outcome():
        try:
            with open_checkpoint(path) as checkpoint:
                return checkpoint.tensors, checkpoint.metadata
        except InputError as error:
            return re.sub("`[ab]`", "", str(error))  # of two tensors on the same bytes, safetensors names either

    for _ in range(2):
        small = outcome()
        monkeypatch.setattr("refmerge.checkpoint.header.LARGE", 0)
        assert outcome() == small
        monkeypatch.undo()
        monkeypatch.setattr("refmerge.checkpoint.header._check_with_safetensors", lambda path: None)


@pytest.mark.parametrize("content", VALID.values(), ids=VALID.keys())
def test_unusual_but_valid_file_is_read(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with open_checkpoint(path) as checkpoint, safetensors.safe_open(path, "np") as theirs:
        assert set(checkpoint) == set(theirs.keys())
        for name, array in checkpoint.items():
            assert array.tobytes() == theirs.get_tensor(name).tobytes()
            assert array.shape == theirs.get_tensor(name).shape


@given(data=st.data())
@settings(quick, max_examples=300)
def test_mutated_header_is_refused_or_read_as_safetensors_does(tmp_path, data):
    content = bytearray(packed({"__metadata__": {"k": "v"}, "a": u8(0, 2), "b": u8(2, 4, dtype="BF16", shape=[1])}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.sampled_from([b"", *(bytes([c]) for c in b'{}[]",:0129-.eU\\ \n\0\xff')]))
        content[at : at + data.draw(st.integers(0, 2))] = new
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            ours = {name: array.tobytes() for name, array in checkpoint.items()}
    except InputError:
        return
    with safetensors.safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(ours)
    assert ours == {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(bytes(content))}


def test_illegal_booleans_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"a": u8(0, 4, dtype="BOOL")}, b"\0\1\2\1"))
    with open_checkpoint(path) as checkpoint:
        out = np.empty(2, np.uint8)
        checkpoint.read("a", 0, 2, out)
        with pytest.raises(InputError, match=r"x\.safetensors.*'a'.*BOOL"):
            checkpoint.read("a", 2, 4, out)


def test_file_cut_short_after_opening(tmp_path):
    path = tmp_path / "x.safetensors"
    save({"a": np.zeros(100, np.uint8)}, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["a"].size == 100
        checkpoint.check_unchanged()
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(InputError, match=r"x\.safetensors.*ends within tensor 'a'"):
            checkpoint["a"]
        with pytest.raises(InputError, match=r"x\.safetensors.*changed"):
            checkpoint.check_unchanged()
        checkpoint.close()
        with pytest.raises(InputError, match=r"x\.safetensors.*changed"):
            checkpoint["a"]
        path.unlink()
        with pytest.raises(InputError, match=r"x\.safetensors.*gone"):
            checkpoint.check_unchanged()


# --- Folders and indexes ---------------------------------------------------------------------------------------------


def shards(folder: Path, weight_map: object = None, **extra) -> Path:
    """A folder with two shards, a in one.safetensors and b in two.safetensors, and the index given."""
    folder.mkdir(exist_ok=True)
    (folder / "one.safetensors").write_bytes(packed({"a": u8(0, 4)}))
    (folder / "two.safetensors").write_bytes(packed({"b": u8(0, 4)}))
    index = {"metadata": {"total_size": 8}, "weight_map": weight_map, **extra}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


GOOD_MAP = {"a": "one.safetensors", "b": "two.safetensors"}


def test_sharded_folder_and_its_index(tmp_path):
    folder = shards(tmp_path / "m", GOOD_MAP)
    (folder / "unlisted.safetensors").write_bytes(b"not looked at")
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint) == ["a", "b"]
            assert checkpoint.directory == folder and checkpoint.path == path
            assert checkpoint.tensors["b"].file == folder / "two.safetensors"
            assert checkpoint["b"].tobytes() == b"\1" * 4


def test_metadata_on_which_shards_agree(tmp_path):
    folder = shards(tmp_path / "m", GOOD_MAP)
    (folder / "one.safetensors").write_bytes(packed({"__metadata__": {"k": "1", "same": "x"}, "a": u8(0, 4)}))
    (folder / "two.safetensors").write_bytes(packed({"__metadata__": {"k": "2", "other": "y"}, "b": u8(0, 4)}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.metadata == {"other": "y", "same": "x"}


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {"a": None, "b": "two.safetensors"},
        {"a": 1, "b": "two.safetensors"},
        GOOD_MAP | {"a": "../m2/one.safetensors"},
        GOOD_MAP | {"a": "sub/../one.safetensors"},
        GOOD_MAP | {"a": "..\\m2\\one.safetensors"},
        GOOD_MAP | {"a": "/one.safetensors"},
        GOOD_MAP | {"a": "\\one.safetensors"},
        GOOD_MAP | {"a": "C:one.safetensors"},
        GOOD_MAP | {"a": "\\\\host\\share\\one.safetensors"},
        GOOD_MAP | {"a": "one.safetensors\0"},
        GOOD_MAP | {"a": "one\0.safetensors"},
        GOOD_MAP | {"a": "one.bin"},
        GOOD_MAP | {"a": ""},
        GOOD_MAP | {"a": "missing.safetensors"},
        GOOD_MAP | {"a": "\x1b[2J.safetensors"},
        GOOD_MAP | {"a": "folder.safetensors"},
        GOOD_MAP | {"a": "two.safetensors"},
        GOOD_MAP | {"c": "two.safetensors"},
        {"a": "one.safetensors", "c": "two.safetensors"},
        {"a": "one.safetensors"} | {f"\x1b{i}": "one.safetensors" for i in range(50)},
    ],
    ids=lambda weight_map: ascii(weight_map)[:60],
)
def test_bad_index_is_refused(tmp_path, weight_map):
    shards(tmp_path / "m2", GOOD_MAP)
    folder = shards(tmp_path / "m", weight_map)
    (folder / "one.bin").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "folder.safetensors").mkdir()
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message and message.isprintable() and len(message) < 2000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"weight_map": {}, "weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}', "\x00"],
)
def test_index_that_is_not_strict_json(tmp_path, text):
    folder = shards(tmp_path / "m", GOOD_MAP)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_disagreement_names_a_few_tensors(tmp_path):
    folder = shards(tmp_path / "m", GOOD_MAP | {f"x{i}": "one.safetensors" for i in range(9)})
    with pytest.raises(InputError, match=r"9 tensors.*x0.*x4") as caught:
        open_checkpoint(folder)
    assert "x5" not in str(caught.value)


def test_tensor_in_two_shards(tmp_path):
    folder = shards(tmp_path / "m", GOOD_MAP)
    (folder / "two.safetensors").write_bytes(packed({"a": u8(0, 2), "b": u8(2, 4)}))
    with pytest.raises(InputError, match=r"'a' is both in .*one.* and in .*two"):
        open_checkpoint(folder)


@posix
@pytest.mark.parametrize("as_folder", [True, False])
def test_fifo_and_device_do_not_block(tmp_path, as_folder):
    folder = shards(tmp_path / "m", GOOD_MAP | {"a": "fifo.safetensors"})
    os.mkfifo(folder / "fifo.safetensors")
    with pytest.raises(InputError, match=r"fifo\.safetensors'?: not a regular file"):
        open_checkpoint(folder if as_folder else folder / "fifo.safetensors")


@posix
def test_links_stay_within_the_folder_or_the_hub_cache(tmp_path):
    outside = tmp_path / "outside"
    shards(outside, GOOD_MAP)

    within = shards(tmp_path / "within", GOOD_MAP)
    (within / "one.safetensors").rename(within / "data")
    (within / "one.safetensors").symlink_to("data")
    with open_checkpoint(within) as checkpoint:
        assert len(checkpoint) == 2

    linked = shards(tmp_path / "linked", GOOD_MAP)
    (linked / "one.safetensors").unlink()
    (linked / "one.safetensors").symlink_to(outside / "one.safetensors")
    through = shards(tmp_path / "through", GOOD_MAP | {"a": "sub/one.safetensors"})
    (through / "sub").symlink_to(outside)
    circle = shards(tmp_path / "circle", GOOD_MAP)
    (circle / "one.safetensors").unlink()
    (circle / "one.safetensors").symlink_to("one.safetensors")
    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").symlink_to(outside / "one.safetensors")
    configured = shards(tmp_path / "configured", GOOD_MAP)
    (outside / "config.json").write_text("{}")
    (configured / "config.json").symlink_to(outside / "config.json")
    for folder in (linked, through, circle, single, configured):
        with pytest.raises(InputError, match=folder.name):
            open_checkpoint(folder)

    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    shards(snapshot, GOOD_MAP)
    for name in [*GOOD_MAP.values(), "model.safetensors.index.json"]:
        (snapshot / name).rename(cache / "blobs" / name[:3])
        (snapshot / name).symlink_to(f"../../blobs/{name[:3]}")
    with open_checkpoint(snapshot) as checkpoint:
        assert len(checkpoint) == 2
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(outside / "one.safetensors")
    with pytest.raises(InputError, match="link out of its folder"):
        open_checkpoint(snapshot)


def test_what_a_folder_may_hold(tmp_path):
    def folder(*names: str) -> Path:
        path = tmp_path / str(len(os.listdir(tmp_path)))
        path.mkdir()
        for name in names:
            (path / name).write_bytes(packed({"a": u8(0, 4)}) if name.endswith(".safetensors") else b"{}")
        return path

    for names in [("model.safetensors",), ("model.safetensors", "other.safetensors"), ("diffusion.safetensors",)]:
        with open_checkpoint(folder(*names)) as checkpoint:
            assert list(checkpoint) == ["a"]
    for names, said in [
        ((), "no weights"),
        (("config.json",), "no weights"),
        (("pytorch_model.bin",), r"pytorch_model\.bin.*only safetensors"),
        (("x.gguf", "y.pt"), r"x\.gguf.*y\.pt.*only safetensors"),
        (("a.safetensors", "b.safetensors"), "2 safetensors files"),
        (("adapter_config.json",), "PEFT adapter"),
        (("adapter_config.json", "adapter_model.safetensors"), r"PEFT adapter.*adapter_model\.safetensors"),
        (("model.safetensors", "model.safetensors.index.json"), "both model.safetensors and .*index.json"),
    ]:
        with pytest.raises(InputError, match=said):
            open_checkpoint(folder(*names))


def test_paths_that_lead_nowhere(tmp_path):
    for path, said in [
        (tmp_path / "missing", "no such file"),
        ("some-org/some-model", "no such file"),
        (Path("some-org/some-model"), "no such file"),
        (str(tmp_path / "a\0b"), "cannot be opened"),
        (tmp_path / "x.bin", r"only \.safetensors"),
        (tmp_path / "x.bin" / "y", "cannot be opened"),
    ]:
        (tmp_path / "x.bin").write_bytes(b"")
        with pytest.raises(InputError, match=said):
            open_checkpoint(path)


def test_config(tmp_path):
    folder = shards(tmp_path / "m", GOOD_MAP)
    (folder / "config.json").write_text('{"hidden_size": 4, "eps": 1e-5, "limit": Infinity}')
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == {"hidden_size": 4, "eps": 1e-5, "limit": math.inf}
    for bad in ("", "[]", '{"a": 1, "a": 2}', "{'a': 1}", '{"a": [' * 50_000):
        (folder / "config.json").write_text(bad)
        with pytest.raises(InputError, match=r"config\.json"):
            open_checkpoint(folder)


def test_sidecars(tmp_path):
    folder = shards(tmp_path / "m", GOOD_MAP)
    carried = ["LICENSE", "NOTICE.txt", "chat_template.jinja", "config.json", "merges.txt", "modeling_x.py",
               "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
    left = ["README.md", ".gitattributes", "pytorch_model.bin", "x.gguf", "x.pt", "x.onnx", "tf_model.h5",
            "pytorch_model.bin.index.json", "refmerge_report.json", "mergekit_config.yml"]  # fmt: skip
    for name in carried + left:
        (folder / name).write_text("{}")
    (folder / "sub").mkdir()
    with open(folder / "large.dat", "wb") as file:
        file.truncate(64 << 20)
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(64 << 20)
    with open_checkpoint(folder) as checkpoint:
        assert [path.name for path in checkpoint.sidecars()] == sorted(carried)


# --- Writing ---------------------------------------------------------------------------------------------------------

PLAN = {"a": ("F32", (6,)), "b": ("U8", (2, 3)), "c": ("BF16", (0, 4)), "d": ("I64", ())}


def fill(writer: CheckpointWriter, plan=None) -> None:
    for name, (dtype, shape) in (plan or PLAN).items():
        writer.write(name, 0, np.ones(math.prod(shape) * itemsize(dtype), np.uint8))


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_hub_layout(tmp_path):
    with CheckpointWriter(tmp_path / "new" / "deep" / "out", PLAN, max_shard_size=25) as writer:
        assert not (tmp_path / "new" / "deep" / "out").exists()
        fill(writer)
    out = tmp_path / "new" / "deep" / "out"
    assert listing(out.parent) == ["out"]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert listing(out) == [*names, "model.safetensors.index.json"]
    assert json.loads((out / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 24 + 6 + 0 + 8},
        "weight_map": {"a": names[0], "b": names[1], "c": names[1], "d": names[1]},
    }
    with open_checkpoint(out) as checkpoint:
        assert checkpoint["d"].shape == () and checkpoint["b"].tobytes() == b"\1" * 6


def test_one_tensor_larger_than_a_shard_and_no_tensors(tmp_path):
    plan = {"a": ("U8", (100,)), "b": ("U8", (5,)), "c": ("U8", (5,))}
    with CheckpointWriter(tmp_path / "out", plan, max_shard_size=10) as writer:
        fill(writer, plan)
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    save({}, tmp_path / "none")
    assert listing(tmp_path / "none") == ["model.safetensors"]
    with open_checkpoint(tmp_path / "none") as checkpoint:
        assert len(checkpoint) == 0


@posix
def test_more_shards_than_open_files(tmp_path):
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
import numpy as np
from refmerge.checkpoint import save
save({{str(i): np.zeros(4, np.uint8) for i in range(50)}}, {str(tmp_path / "out")!r}, max_shard_size=4)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert len({tensor.file for tensor in checkpoint.tensors.values()}) == 50


def test_sidecars_and_extra_files_are_written(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(os.urandom(5 << 20))
    (source / "config.json").write_text("old")
    extra = {"config.json": b"new"}
    with CheckpointWriter(tmp_path / "out", {}, sidecars=sorted(source.iterdir()), extra_files=extra) as writer:
        extra["report.json"] = b"last"
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors", "report.json", "tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == b"new"
    assert (tmp_path / "out" / "report.json").read_bytes() == b"last"
    assert not writer.partial.exists()


@pytest.mark.parametrize(
    "name", ["../x", "/x", "sub/x", "a\\b", "", ".", "..", "a\0", "x.safetensors", "model.safetensors.index.json"]
)
def test_extra_file_names(tmp_path, name):
    with pytest.raises(UsageError):
        CheckpointWriter(tmp_path / "out", {}, extra_files={name: b""})
    late: dict[str, bytes] = {}
    with pytest.raises(UsageError):
        with CheckpointWriter(tmp_path / "out", {}, extra_files=late):
            late[name] = b""
    assert listing(tmp_path) == []


def test_sidecars_that_cannot_be_copied(tmp_path):
    with pytest.raises(InputError, match="missing"):
        CheckpointWriter(tmp_path / "out", {}, sidecars=[tmp_path / "missing"])
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "x").write_text("")
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="'x'"):
        CheckpointWriter(tmp_path / "out", {}, sidecars=[tmp_path / "x", tmp_path / "1" / "x"])
    with pytest.raises(UsageError, match="single"):
        CheckpointWriter(tmp_path / "out.safetensors", {}, sidecars=[tmp_path / "x"])
    assert listing(tmp_path) == ["1", "x"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"__metadata__": ("U8", (1,))},
        {"a\0": ("U8", (1,))},
        {"\ud800": ("U8", (1,))},
        {"a": ("C64", (1,))},
        {"a": ("u8", (1,))},
        {"a": ("U8", (-1,))},
        {"a": ("U8", (2**48 + 1, 0))},
        {"a": ("U8", (2**48, 0, 2**48))},
        {"a" * 1025: ("U8", (1,))},
        {"a": ("U8", (1,) * 33)},
    ],
    ids=ascii,
)
def test_tensors_that_no_file_can_hold(tmp_path, tensors):
    with pytest.raises(UsageError):
        CheckpointWriter(tmp_path / "new" / "out", tensors)
    assert listing(tmp_path) == []


def test_impossible_metadata(tmp_path):
    for metadata in ({"a": "\ud800"}, {"a": 1}, {1: "a"}):
        with pytest.raises(UsageError):
            CheckpointWriter(tmp_path / "out", {}, metadata=metadata)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_existing_target(tmp_path, target):
    save({"a": np.zeros(3, np.int8)}, tmp_path / target)
    with pytest.raises(UsageError, match="exists"):
        CheckpointWriter(tmp_path / target, PLAN)

    with pytest.raises(KeyboardInterrupt):
        with CheckpointWriter(tmp_path / target, PLAN, overwrite=True) as writer:
            fill(writer)
            raise KeyboardInterrupt
    with open_checkpoint(tmp_path / target) as checkpoint:
        assert list(checkpoint) == ["a"] and checkpoint["a"].dtype == np.int8

    with CheckpointWriter(tmp_path / target, PLAN, overwrite=True) as writer:
        fill(writer)
    with open_checkpoint(tmp_path / target) as checkpoint:
        assert list(checkpoint) == sorted(PLAN)
    assert listing(tmp_path) == [target]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_target_that_appears_meanwhile_is_kept(tmp_path, target):
    with pytest.raises(UsageError, match="exists"):
        with CheckpointWriter(tmp_path / target, {}):
            save({"a": np.zeros(3, np.int8)}, tmp_path / target)
    with open_checkpoint(tmp_path / target) as checkpoint:
        assert list(checkpoint) == ["a"]
    assert listing(tmp_path) == [target]


def test_folders_that_are_not_a_model_are_not_overwritten(tmp_path):
    for name, entry in [("notes", "diary.txt"), ("repository", "model.safetensors")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / entry).write_text("mine")
    (tmp_path / "repository" / ".git").mkdir()
    for name in ("notes", "repository"):
        with pytest.raises(UsageError, match="remove it yourself"):
            CheckpointWriter(tmp_path / name, {}, overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save({}, tmp_path / "empty", overwrite=True)
    assert listing(tmp_path / "empty") == ["model.safetensors"]


@posix
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_special_files_and_wrong_kinds_are_not_replaced(tmp_path, overwrite):
    save({}, tmp_path / "real")
    save({}, tmp_path / "real.safetensors")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    before = listing(tmp_path)
    for name in ("link", "link.safetensors", "dangling.safetensors", "fifo.safetensors", "folder.safetensors", "file"):
        with pytest.raises(UsageError, match=name):
            CheckpointWriter(tmp_path / name, {}, overwrite=overwrite)
    for target in (tmp_path / "file" / "out", "/", str(tmp_path / "a\0b")):
        with pytest.raises(UsageError):
            CheckpointWriter(target, {}, overwrite=overwrite)
    assert listing(tmp_path) == before


def test_incomplete_output_is_refused(tmp_path):
    with pytest.raises(ValueError, match="20 bytes of 2 tensors have not been written: 'a', 'd'"):
        with CheckpointWriter(tmp_path / "out", PLAN) as writer:
            fill(writer, {"b": PLAN["b"]})
            writer.write("a", 1, b"\0" * 12)
    assert listing(tmp_path) == []


def test_writes_are_checked(tmp_path):
    plan = PLAN | {"flag": ("BOOL", (2,))}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        for name, start, raw in [
            ("a", 0, b"\0" * 25),
            ("a", 0, b"\0" * 28),
            ("a", 1, b"\0" * 24),
            ("a", -1, b"\0" * 4),
            ("a", 0, b"\0" * 3),
            ("flag", 0, b"\0\2"),
        ]:
            with pytest.raises(ValueError):
                writer.write(name, start, raw)
        with pytest.raises(KeyError):
            writer.write("z", 0, b"")
        fill(writer, plan)
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", 0, b"\0" * 4)
    for again in (lambda: writer.write("a", 0, b"\0" * 4), writer.commit):
        with pytest.raises(ValueError, match="committed or aborted"):
            again()
    writer.abort()
    assert listing(tmp_path) == ["out"]


def test_abort_leaves_nothing(tmp_path):
    for target in ("new/deep/out", "out.safetensors"):
        writer = CheckpointWriter(tmp_path / target, PLAN)
        fill(writer)
        assert listing(tmp_path) != []
        writer.abort()
        writer.abort()
        assert listing(tmp_path) == []


@posix
def test_modes_follow_the_umask(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.chmod(tmp_path / "config.json", 0o600)
    before = os.umask(0o027)
    try:
        save({"a": np.zeros(3)}, tmp_path / "out", sidecars=[tmp_path / "config.json"], extra_files={"report": b""})
        save({"a": np.zeros(3)}, tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "out.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


LIMITED = """
import resource, signal, sys
import numpy as np
from refmerge.checkpoint import CheckpointWriter
from refmerge.errors import ResourceError
import os
if sys.argv[2] == "late":  # without preallocation the disk is found full only by a write
    del os.posix_fallocate
    from refmerge.checkpoint.files import PositionedFile
    PositionedFile.preallocate = lambda self, size: None
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    extra = {"report": b"x" * int(sys.argv[4])}
    with CheckpointWriter(sys.argv[1], {"a": ("U8", (1 << 20,))}, extra_files=extra) as writer:
        writer.write("a", 0, np.zeros(1 << 20, np.uint8))
except ResourceError as error:
    print(error)
    sys.exit(error.status)
"""


@posix
@pytest.mark.parametrize("when, limit, report", [("early", 4096, 0), ("late", 100_000, 0), ("early", 2 << 20, 3 << 20)])
def test_full_disk(tmp_path, when, limit, report):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "new" / "out"), when, str(limit), str(report)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 5, result.stderr
    assert "out" in result.stdout and "cannot be written" in result.stdout
    assert listing(tmp_path) == []


def test_no_room_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(ResourceError, match="free"):
        CheckpointWriter(tmp_path / "new" / "out", {"a": ("U8", (2**48,))})
    assert listing(tmp_path) == []


def test_killed_process_leaves_nothing_that_looks_finished(tmp_path):
    for target in ("out", "out.safetensors"):
        program = f"""
import os
from refmerge.checkpoint import CheckpointWriter
writer = CheckpointWriter({str(tmp_path / target)!r}, {{"a": ("U8", (3,))}})
writer.write("a", 0, b"abc")
os._exit(9)
"""
        assert subprocess.run([sys.executable, "-c", program]).returncode == 9
        assert not (tmp_path / target).exists()
        (left,) = listing(tmp_path)
        assert left.startswith(f".{target}.partial-") and not left.endswith(".safetensors")
        save({}, tmp_path / target)
        (tmp_path / target).rename(tmp_path.parent / f"{tmp_path.name}-{target}")
        if (tmp_path / left).is_dir():
            (tmp_path / left / "model.safetensors").unlink()
            (tmp_path / left).rmdir()
        else:
            (tmp_path / left).unlink()


@pytest.mark.parametrize("call", ["replace", "rename", "fsync", "mkdir"])
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_failing_calls_leave_the_old_output(tmp_path, monkeypatch, call, target):
    """Each such call fails in turn; after any of them the target is the old or the new model, whole."""
    old, new = np.zeros(3, np.int8), np.ones(3, np.int8)
    save({"a": old}, tmp_path / target)
    original, failed = getattr(os, call), True
    nth = 0
    while failed:
        nth, count, failed = nth + 1, 0, False

        def failing(*args, **kwargs):
            nonlocal count, failed
            count += 1
            if count == nth:  # noqa: B023
                failed = True
                raise OSError(5, "Input/output error")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save({"a": new}, tmp_path / target, overwrite=True)
            except ResourceError:
                assert failed
        with open_checkpoint(tmp_path / target) as checkpoint:
            assert checkpoint["a"].tobytes() in (old.tobytes(), new.tobytes())
        assert listing(tmp_path) == [target]


@pytest.fixture(params=["positioned", "fallback"])
def way(request, monkeypatch):
    """Once with the system's positioned calls, once as on a system that lacks them."""
    if request.param == "fallback":
        for name in ("preadv", "pwrite", "posix_fallocate", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"):
            monkeypatch.delattr(os, name, raising=False)
    return request.param


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_threads(tmp_path, way, target):
    count, block = 50_000, 501
    arrays = {f"t{i}": np.random.default_rng(i).standard_normal(count).astype(np.float32) for i in range(6)}
    plan = {name: ("F32", a.shape) for name, a in arrays.items()}
    jobs = [(name, start) for start in range(0, count, block) for name in arrays]
    with CheckpointWriter(tmp_path / target, plan, max_shard_size="500KB") as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: writer.write(*job, arrays[job[0]][job[1] : job[1] + block].view(np.uint8)), jobs))

    with open_checkpoint(tmp_path / target) as checkpoint, ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)

        def check(job):
            name, start = job
            if job in jobs[:8]:
                barrier.wait()
            stop = min(start + block, count)
            out = np.empty(4 * (stop - start), np.uint8)
            checkpoint.read(name, start, stop, out)
            return np.array_equal(out.view(np.float32), arrays[name][start:stop])

        assert all(pool.map(check, jobs))


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    def dribble(call):
        return lambda descriptor, data, offset: call(
            descriptor, [data[0][:7]] if isinstance(data, list) else data[:7], offset
        )

    if hasattr(os, "preadv"):
        monkeypatch.setattr(os, "preadv", dribble(os.preadv))
        monkeypatch.setattr(os, "pwrite", dribble(os.pwrite))
    a = np.arange(1000, dtype=np.uint16)
    save({"a": a}, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert np.array_equal(checkpoint["a"], a)


# --- Sizes and places ------------------------------------------------------------------------------------------------


def test_sizes():
    for text, size in [
        ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GB", 1_500_000_000), ("2GiB", 2**31), ("10 KiB", 10240),
        (123, 123), ("123", 123), ("7B", 7), ("1tb", 10**12), ("0.1GB", 10**8),
    ]:  # fmt: skip
        assert parse_size(text) == size
    for bad in ("", "GB", "-1GB", "1e9", "5 gigabytes", "1,5GB", "0", 0, -1, "0.5B", "1.0000000001KB", True, 1.5, None,
                "NaN", "٣GB", "5GB\n"):  # fmt: skip
        with pytest.raises(UsageError):
            parse_size(bad)


def test_same_or_inside(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "x.safetensors").write_bytes(b"")
    for target, path, expected in [
        ("in", "in", True),
        ("in/new/out", "in", True),
        ("in/sub/../out", "in", True),
        ("input", "in", False),
        ("out", "in", False),
        (".", "in", False),
        ("in/x.safetensors", "in/x.safetensors", True),
        ("in/x.safetensors", "in", True),
        ("in", "missing", False),
    ]:
        assert same_or_inside(tmp_path / target, tmp_path / path) is expected
    if os.name == "posix":
        (tmp_path / "link").symlink_to("in")
        os.link(tmp_path / "in" / "x.safetensors", tmp_path / "hard.safetensors")
        assert same_or_inside(tmp_path / "link" / "out", str(tmp_path / "in"))
        assert same_or_inside(tmp_path / "hard.safetensors", tmp_path / "in" / "x.safetensors")
