"""What one checkpoint holds: numbers by hand, blocks beside whole arrays, and the command as a user meets it."""

from __future__ import annotations

import json
import math
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import compare, inspection, open_checkpoint
from refmerge.checkpoint import save
from refmerge.cli import main

NAN, INF = float("nan"), float("inf")


def opened(folder: Path, model):
    save(model, folder / "m.safetensors", overwrite=True)
    return open_checkpoint(folder / "m.safetensors")


def test_by_hand(tmp_path):
    w = np.array([[3.0, -4.0, 0.0], [0.0, 12.0, 0.0]], np.float32)
    found = inspection.values(opened(tmp_path, {"w": w, "n": np.array([2, -1, 0, 2])})).tensors
    x = found["w"]
    assert (x.dtype, x.shape, x.nbytes) == ("F32", (2, 3), 24)
    assert (x.norm, x.low, x.high, x.largest, x.magnitude, x.zeros) == (13.0, -4.0, 12.0, 12.0, 19 / 6, 0.5)
    assert (x.nan, x.infinite, x.first, x.rank) == (0, 0, None, None)
    assert x.root_mean_square == 13 / math.sqrt(6)
    n = found["n"]
    assert (n.dtype, n.norm, n.low, n.high, n.magnitude, n.zeros) == ("I64", 3.0, -1.0, 2.0, 1.25, 0.25)


def test_what_is_not_finite_is_counted_and_found(tmp_path):
    w = np.array([[1.0, -2.0], [INF, NAN], [-INF, 0.0]], np.float32)
    found = inspection.values(opened(tmp_path, {"w": w, "fine": np.ones(3, np.float32)}))
    x = found.tensors["w"]
    assert (x.nan, x.infinite, x.first) == (1, 2, (1, 0))
    assert x.norm is None and (x.low, x.high, x.magnitude, x.zeros) == (-2.0, 1.0, 1.0, 1 / 6)
    assert [y.name for y in found.most()] == ["w", "fine"]
    assert ("NaN, inf", "1 NaN and 2 infinite entries in w; the first at w[1, 0]") in found.summary()
    assert ("one value", "in all of fine") in found.summary()
    nothing = inspection.values(opened(tmp_path, {"w": np.full(2, NAN, np.float32)})).tensors["w"]
    assert (nothing.low, nothing.high, nothing.magnitude, nothing.first) == (None, None, None, (0,))


def test_nothing_and_numbers(tmp_path):
    found = inspection.values(opened(tmp_path, {"e": np.empty((0, 3), np.float32), "s": np.array(-2.0, np.float32)}), rank=9)
    e, s = found.tensors["e"], found.tensors["s"]
    assert (e.norm, e.low, e.high, e.magnitude, e.zeros, e.root_mean_square, e.rank) == (
        0.0,
        None,
        None,
        None,
        None,
        None,
        0.0,
    )
    assert (s.norm, s.low, s.high, s.magnitude, s.first) == (2.0, -2.0, -2.0, 2.0, None)
    assert "one value" not in dict(found.summary()) and not found.by_layer()


def test_tensors_that_are_the_same(tmp_path):
    """Bytes count, and shape and precision: not zeros of both signs, and no tensors of one value."""
    w = np.array([[1.0, 0.0]], np.float32)
    model = {
        "embed": w, "head": w.copy(), "negative": np.array([[1.0, -0.0]], np.float32), "flat": w.reshape(2),
        "half": w.astype(np.float16), "ones": np.ones(4, np.float32), "more ones": np.ones(4, np.float32),
    }  # fmt: skip
    found = inspection.values(opened(tmp_path, model))
    assert found.same == (("embed", "head"),)
    assert ("same", "embed, head") in found.summary()


def test_ranks(tmp_path):
    model = {"id": np.eye(4, dtype=np.float32), "one": np.ones((3, 5), np.float32), "v": np.ones(4, np.float32)}
    found = inspection.values(opened(tmp_path, model), rank=15)
    assert found.tensors["one"].rank == pytest.approx(1) and found.tensors["v"].rank is None
    assert inspection.values(opened(tmp_path, model), rank=16).tensors["id"].rank == pytest.approx(4)
    small = inspection.values(opened(tmp_path, model), rank=14)
    assert small.too_large == ("id", "one") and small.told()["too_large"] == ["id", "one"]
    assert "too_large" not in inspection.values(opened(tmp_path, model)).told()


floats = st.floats(width=16, allow_nan=True, allow_infinity=True)


@given(
    values=st.lists(floats, max_size=300), dtype=st.sampled_from([np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_as_whole_arrays(tmp_path_factory, values, dtype):
    x = np.array(values, np.float64).astype(dtype)
    wide = x.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "BLOCK", 64)
        got = inspection.values(opened(tmp_path_factory.mktemp("blocks"), {"x": x})).tensors["x"]
    assert got.nan == np.isnan(wide).sum() and got.infinite == np.isinf(wide).sum()
    odd = np.flatnonzero(~np.isfinite(wide))
    assert got.first == ((int(odd[0]),) if odd.size else None)
    assert (got.low, got.high) == ((finite.min(), finite.max()) if finite.size else (None, None))
    assert got.magnitude == (pytest.approx(math.fsum(np.abs(finite)) / finite.size, rel=1e-15) if finite.size else None)
    assert got.norm == (None if odd.size else pytest.approx(math.sqrt(math.fsum(wide * wide)), rel=1e-15))
    assert got.zeros == ((wide == 0).mean() if wide.size else None)


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    checkpoint = opened(tmp_path, {"w": np.ones(1 << 23, np.float16)})
    inspection.values(checkpoint)
    tracemalloc.start()
    inspection.values(checkpoint)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 << 20  # of 16 MiB, 64 in float64


# --- The command ------------------------------------------------------------------------------------------------------


def network(layers: int):
    draw = np.random.default_rng(0)
    model = {"embed.weight": draw.normal(size=(6, 4)).astype(np.float32)}
    for n in range(layers):
        model[f"h.{n}.attn.q.weight"] = (n + 1) * draw.normal(size=(4, 4)).astype(np.float32)
        model[f"h.{n}.mlp.fc.weight"] = draw.normal(size=(8, 4)).astype(np.float32)
    return model


def run(*arguments):
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_the_command(tmp_path):
    path = tmp_path / "m.safetensors"
    save(network(3), path)
    got = run(path)
    assert got.exit_code == 0 and "h.0.attn.q.weight" in got.output and "norm" not in got.output
    got = run(path, "--values", "--rank", "--top", 2, "--by", "zeros")
    assert got.exit_code == 0 and "7 tensors" in got.output and "tensors, by zeros" in got.output
    assert sum(".weight" in line for line in got.output.splitlines()) == 2
    told = json.loads(run(path, "--values", "--json", "--tensor", "h.*").output)
    assert set(told["tensors"]) == {name for name in network(3) if name.startswith("h.")}
    norm = float(np.linalg.norm(network(3)["h.2.attn.q.weight"].astype(np.float64)))
    assert told["tensors"]["h.2.attn.q.weight"]["norm"] == pytest.approx(norm) and told["same"] == []
    assert told["tensors"]["h.2.attn.q.weight"]["file"] == "m.safetensors"
    assert told["layers"]["h."]["attention"]["2"]["root_mean_square"] == pytest.approx(norm / 4)


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.heads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(key in ("src", "href") for key, _ in attrs)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.rows[-1].append(data)
        if self.open and self.open[-1] == "th":
            self.heads.append(data)


def test_the_page(tmp_path):
    model = network(3) | {"odd<&>": np.array([1.0, NAN], np.float32), "tied.weight": network(3)["embed.weight"]}
    path, out = tmp_path / "m.safetensors", tmp_path / "m.html"
    save(model, path)
    assert run(path, "--values", "--html", out).exit_code == 0
    text = out.read_text(encoding="utf-8")
    page = Parsed(text)
    assert text.count("<svg") == 2 and "odd&lt;&amp;&gt;" in text and "embed.weight, tied.weight" in text
    assert page.rows[1][0] == "odd<&>" and page.rows[1][-1] == "[1]"
    assert page.heads[:4] == ["tensor", "shape", "dtype", "bytes"] and len(page.rows) == 1 + len(model)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rank"], "--rank wants --values"),
        (["--html", "x.html"], "--html wants --values"),
        (["--values", "--by", "rank"], "--by rank wants --rank"),
        (["--values", "--rank-limit", "4"], "--rank-limit wants --rank"),
        (["--values", "--html", "x.txt"], "--html writes HTML, and x.txt does not end in .html"),
        (["--values", "--html", "no/x.html"], "no/x.html cannot be written: it is in no folder that exists"),
    ],
)
def test_refusals(tmp_path, arguments, said):
    save({"w": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    got = run(tmp_path / "m.safetensors", *arguments)
    assert got.exit_code == 2 and said in got.output


def test_diff_is_compare(tmp_path):
    save({"w": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    save({"w": np.zeros(2, np.float32)}, tmp_path / "b.safetensors")
    both = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--json"]
    one, other = (CliRunner().invoke(main, [name, *both]) for name in ("diff", "compare"))
    assert one.exit_code == 0 and one.output == other.output
