"""The commands on adapters, on numbers that can be followed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from refmerge.adapters import Adapter, Factors, read_adapter, write_adapter
from refmerge.checkpoint import open_checkpoint, save
from refmerge.cli import main


def diagonal(*entries):
    """A change diag(entries), of as high a rank as it has entries that are not zero."""
    rows = np.eye(len(entries), dtype=np.float32)[np.flatnonzero(entries)]
    return Adapter({"m.q": Factors(rows, rows.T * np.array(entries, np.float32)[:, None])})


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"m.q.weight": np.ones((3, 3), np.float32), "m.n.weight": np.ones(3, np.float32)}, "base")
    tuned = np.ones((3, 3), np.float32) + np.diag([4, 3, 0]).astype(np.float32)
    save({"m.q.weight": tuned, "m.n.weight": np.array([1, 2, 3], np.float32)}, "tuned")
    write_adapter(diagonal(4, 0, 0), "a")
    write_adapter(diagonal(0, 3, 0), "b")
    return tmp_path


def run(*words, status=0):
    result = CliRunner().invoke(main, [str(w) for w in words])
    assert result.exit_code == status, result.output
    return result.output


def changes(path):
    return np.diag(read_adapter(path).delta("m.q")).round(5).tolist()


def test_extracted(there):
    """Of diag(4, 3) rank 1 keeps 4, and is off by 3 of 5."""
    told = run("extract", "base", "tuned", "out", "--rank", 1, "--rest", "save")
    assert "1 modules of rank 1, 1 tensors whole to out" in told
    assert "0.6  rank 1  m.q" in told
    assert changes("out") == [4, 0, 0]
    assert read_adapter("out").saved["m.n.weight"].tolist() == [1, 2, 3]
    found = json.loads(run("extract", "base", "tuned", "two", "--energy", 0.9, "--rest", "skip", "--json"))
    assert found["modules"]["m.q"]["rank"] == 2
    assert "--rest save" in run("extract", "base", "tuned", "three", "--rank", 1, status=3)
    assert "give one of rank and energy" in run("extract", "base", "tuned", "three", "--rest", "skip", status=2)
    assert not (there / "three").exists()


def test_tables_are_known_by_their_names(there):
    base = {"m.embed_tokens.weight": np.zeros((4, 2), np.float32), "m.x.weight": np.zeros((4, 2), np.float32)}
    save(base, "e0")
    save({name: x + 1 for name, x in base.items()}, "e1")
    run("extract", "e0", "e1", "out", "--rank", 1)
    assert {name: f.embedding for name, f in read_adapter("out").modules.items()} == {"m.embed_tokens": True, "m.x": False}
    run("extract", "e0", "e1", "other", "--rank", 1, "--embeddings", "m.x")
    assert {name: f.embedding for name, f in read_adapter("other").modules.items()} == {"m.embed_tokens": False, "m.x": True}


def test_what_did_not_change_is_left_out(there):
    base = {"m.q.weight": np.ones((3, 3), np.float32), "m.k.weight": np.ones((3, 3), np.float32)}
    save(base, "same")
    save({**base, "m.q.weight": np.zeros((3, 3), np.float32)}, "other")
    run("extract", "same", "other", "out", "--rank", 2)
    assert list(read_adapter("out").modules) == ["m.q"]
    assert "changes nothing" in run("extract", "same", "same", "none", "--rank", 2, status=2)


def test_applied(there):
    assert "2 tensors to out, 1 of them changed by 2 adapters" in run(
        "apply", "base", "a", "b", "out", "--weight", 0.5, "--weight", -1
    )
    assert np.diag(open_checkpoint("out")["m.q.weight"]).tolist() == [3, -2, 1]
    assert "2 weights for 1 adapters" in run("apply", "base", "a", "again", "--weight", 1, "--weight", 1, status=2)
    assert "exists" in run("apply", "base", "a", "out", status=2)
    run("apply", "base", "a", "out", "--overwrite")
    assert "never written to" in run("apply", "base", "a", "base", "--overwrite", status=2)


def test_merged(there):
    run("adapter", "merge", "a", "b", "sum", "--weight", 0.5, "--weight", 2, "--type", "cat")
    assert changes("sum") == [2, 6, 0]
    run("adapter", "merge", "a", "b", "one", "--rank", 1)
    assert changes("one") == [4, 0, 0]
    assert "ties needs density" in run("adapter", "merge", "a", "b", "x", "--type", "ties", status=2)
    assert "'average'" in run("adapter", "merge", "a", "b", "x", "--type", "average", status=2)
    assert "never written to" in run("adapter", "merge", "a", "b", "a", "--overwrite", status=2)


def test_merged_by_any_method(there):
    """Of the changes 4 and 3 TIES keeps the largest ninth of each, and takes half."""
    ties = ("--method", "ties", "--set", "density=0.12", "--set", "lambda=0.5")
    told = run("adapter", "merge", "a", "b", "out", *ties, "--rank", 1)
    assert changes("out") == [2, 0, 0]
    assert "0.6  rank 1  m.q" in told
    weighed = ("--method", "linear", "--weight", 1, "--weight", 3, "--set", "normalize=true", "--energy", 1)
    run("adapter", "merge", "a", "b", "two", *weighed)
    assert changes("two") == [1, 2.25, 0]
    assert "no parameter 'densty'" in run(
        "adapter", "merge", "a", "b", "x", "--method", "ties", "--set", "densty=1", "--rank", 1, status=2
    )
    assert "not 'density'" in run("adapter", "merge", "a", "b", "x", "--method", "ties", "--set", "density", status=2)
    assert "are for --method" in run("adapter", "merge", "a", "b", "x", "--set", "density=1", status=2)


def test_composed(there):
    write_adapter(diagonal(1, 1, 1), "c")
    run("adapter", "compose", "a", "b", "mean")
    assert changes("mean") == [2, 1.5, 0]
    run("adapter", "compose", "a", "less", "--operation", "negate", "--scale", 0.5)
    assert changes("less") == [-2, 0, 0]
    run("adapter", "compose", "a", "b", "c", "analogy", "--operation", "analogy", "--weight", 1, "--weight", 1)
    assert changes("analogy") == [1.5, 1, -0.5]  # half of a, b and -c: the weights sum to 1
    assert "negate takes 1 module, not 2" in run("adapter", "compose", "a", "b", "x", "--operation", "negate", status=2)


def test_refactored(there):
    run("adapter", "merge", "a", "b", "sum", "--type", "cat")
    assert "0.6  rank 1  m.q" in run("adapter", "refactor", "sum", "low", "--rank", 1)
    assert changes("low") == [4, 0, 0]
    found = json.loads(run("adapter", "refactor", "sum", "same", "--energy", 1, "--json"))
    assert found["modules"]["m.q"]["rank"] == 2
    assert found["modules"]["m.q"]["relative"] < 1e-6


def test_one_line_for_what_is_wrong(there):
    for words, status in (
        (("apply", "base", "nowhere", "out"), 3),
        (("adapter", "refactor", "nowhere", "out", "--rank", 1), 3),
        (("extract", "nowhere", "tuned", "out", "--rank", 1), 3),
        (("adapter", "merge", "a", "b", "out.safetensors"), 2),
    ):
        told = run(*words, status=status)
        assert told.startswith("refmerge: ")
        assert told.count("\n") == 1
