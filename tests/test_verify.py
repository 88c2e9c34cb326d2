"""A checkpoint is compared with what its recipe makes, and what differs is named."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import refmerge
from refmerge import testing
from refmerge.checkpoint import CheckpointWriter, name_of
from refmerge.cli import main
from refmerge.errors import UsageError
from refmerge.recipe.run import run_recipe
from refmerge.registry import get
from refmerge.verify import ROUNDING, ulps, verify
from tests import mergekit_inputs

BF16 = ml_dtypes.bfloat16


def save(path, tensors):
    path.parent.mkdir(exist_ok=True)
    with CheckpointWriter(path, {k: (name_of(x.dtype), x.shape) for k, x in tensors.items()}) as writer:
        for k, x in tensors.items():
            writer.write(k, 0, np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return path


def recipe(path, method, models, base=None, native=True, dtype=None, **params):
    lines = ["refmerge: 1"] if native else []
    lines += [f"merge_method: {method}", *([f"base_model: {base}"] if base else []), "models:"]
    lines += [f"  - model: {m}" for m in models]
    lines += [f"parameters: {json.dumps(params)}"] if params else []
    lines += [f"dtype: {dtype}"] if dtype else []
    path.write_text("\n".join(lines) + "\n")
    return path


def inputs(folder, dtype=np.float32, count=2, size=70_000):
    draw = np.random.default_rng(0)
    found = []
    for k in range(count + 1):
        model = {"a": draw.standard_normal(size).astype(dtype), "b": draw.standard_normal((30, 40)).astype(dtype)}
        found.append(save(folder / f"{k}.safetensors", model | {"n": np.arange(5)}))
    return found[0], found[1:]


def flipped(path, name, index, bit):
    """The same file with one bit of one entry turned over."""
    with refmerge.open_checkpoint(path) as c:
        model = {k: np.array(x) for k, x in c.items()}
    x = model[name].reshape(-1)
    x.view(f"u{x.itemsize}")[index] ^= x.view(f"u{x.itemsize}").dtype.type(1 << bit)
    return save(path.parent / f"{name}{bit}.safetensors", model)


# --- What refmerge has made -------------------------------------------------------------------------------------------

METHODS = {
    "linear": (False, {"weight": [0.25, 0.75]}), "ties": (True, {"density": 0.3}), "slerp": (False, {"t": 0.4}),
    "dare_ties": (True, {"density": 0.5}), "breadcrumbs": (True, {"density": 0.4, "gamma": 0.1}), "model_stock": (True, {}),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_merge_verifies_to_the_bit_and_one_flipped_bit_does_not(method, dtype, tmp_path):
    based, params = METHODS[method]
    base, models = inputs(tmp_path, dtype)
    r = recipe(tmp_path / "r.yml", method, models, base if based else None, **params)
    run_recipe(r, tmp_path / "m.safetensors", threads=1)
    found = verify(tmp_path / "m.safetensors", r, threads=2)
    assert found.exact and found.ok and found.count("equal") == 3 and found.semantics == method

    for name, index, bit in (("a", 69_999, 0), ("b", 47, 8 * np.dtype(dtype).itemsize - 1), ("n", 3, 5)):
        spoilt = flipped(tmp_path / "m.safetensors", name, index, bit)
        found = verify(spoilt, r, threads=1)
        assert not found.exact and found.count("equal") == 2
        one = found.findings[name]
        assert one.differing == 1 and one.worst == {"a": (69_999,), "b": (1, 7), "n": (3,)}[name]
        assert one.verdict == ("rounding" if bit == 0 else "differs")
        assert f"{name}: 1 of" in found.text() and found.ok == (bit == 0)


def test_numbers_of_the_worst_entry(tmp_path):
    x = np.array([1, 2, 3, 4], np.float32)
    a = save(tmp_path / "a.safetensors", {"x": x})
    r = recipe(tmp_path / "r.yml", "linear", [a])
    far = save(tmp_path / "far.safetensors", {"x": np.array([1, np.nextafter(np.float32(2), np.float32(3)), 6, 4], "f4")})
    one = verify(far, r).findings["x"]
    assert (one.differing, one.beyond, one.ulps, one.worst, one.stored, one.computed) == (2, 1, 1 << 23, (2,), 6.0, 3.0)
    assert one.text() == "x: 2 of 4 entries, by 8388608 ulps of F32 at (2,): 6 stored, 3 computed"


def test_what_is_missing_or_too_much_or_of_another_shape(tmp_path):
    x = np.ones((2, 2), np.float32)
    a = save(tmp_path / "a.safetensors", {"x": x, "y": x, "z": x, "w": x})
    r = recipe(tmp_path / "r.yml", "linear", [a])
    m = save(tmp_path / "m.safetensors", {"x": x, "y": x.reshape(4), "z": x.astype(BF16), "v": x})
    found = verify(m, r)
    assert found.missing == ("w",) and found.extra == ("v",) and not found.ok
    assert found.apart == {
        "y": "F32 [4] is stored, F32 [2, 2] made",
        "z": "BF16 [2, 2] is stored, F32 [2, 2] made",
    }
    assert "missing    1: w" in found.text() and "extra      1: v" in found.text()


# --- What others have made --------------------------------------------------------------------------------------------

THEIRS = [
    case
    for method in ("ties", "linear", "task_arithmetic", "breadcrumbs", "slerp", "nearswap", "arcee_fusion")
    for case in testing.vectors(method, f"mergekit:{method}")
    if case.source.get("how") == "ran"
    and case.result == "valid"
    and not case.stats
    and {x.dtype for x in case.expect.values()} == {np.dtype(BF16)}
]


@pytest.mark.parametrize("case", THEIRS, ids=lambda c: c.id)
def test_what_mergekit_made_verifies(case, tmp_path):
    models = [save(tmp_path / f"{k}.safetensors", x) for k, x in enumerate(case.models)]
    base = None if case.base is None else save(tmp_path / "base.safetensors", case.base)
    params = {k.rstrip("_"): v for k, v in case.params.items()}
    r = recipe(tmp_path / "r.yml", case.entry.partition(":")[2], models, base, native=False, dtype="bfloat16")
    shared = {k: v for k, v in params.items() if not isinstance(v, list)}
    each = {k: v for k, v in params.items() if isinstance(v, list)}
    lines = [line for line in r.read_text().splitlines() if not line.startswith("  - model")]
    at = lines.index("models:") + 1
    for k, m in reversed(list(enumerate(models))):
        own = json.dumps({key: values[k] for key, values in each.items()})
        lines[at:at] = [f"  - model: {m}", f"    parameters: {own}"]
    r.write_text("\n".join([*lines, f"parameters: {json.dumps(shared)}", ""]))
    found = verify(save(tmp_path / "m.safetensors", case.expect), r, nonfinite="propagate")
    assert found.exact, found.text()
    assert found.semantics == case.entry + ("" if get(case.entry).widens else " in its own 16 bits")


def test_there_are_such_merges():
    assert len(THEIRS) >= 4


@pytest.fixture
def several(tmp_path, monkeypatch):
    """Several merges in bfloat16 in one file, and what mergekit-multi makes of them."""
    monkeypatch.chdir(tmp_path)
    mergekit_inputs.write(tmp_path)
    theirs = Path(__file__).parent / "data/mergekit_multi.safetensors"
    (tmp_path / "r.yml").write_text(refmerge.open_checkpoint(theirs).metadata["recipe"])
    return theirs


def test_several_merges_are_told_by_their_arithmetic(several):
    """Here everything is rounded once in each merge, there after each operation."""
    found = verify(several, "r.yml")
    assert found.exact and found.semantics == "mergekit:task_arithmetic in its own 16 bits"
    assert "as mergekit:task_arithmetic in its own 16 bits has it\nequal      39 of 39 tensors, to the bit" in found.text()
    run_recipe("r.yml", "ours")
    found = verify("ours")
    assert found.exact and found.semantics == "mergekit:task_arithmetic" and "explained" not in found.text()
    run_recipe("r.yml", "native", arithmetic="native")
    assert verify("native").semantics == "mergekit:task_arithmetic in its own 16 bits"


def test_several_merges_with_a_difference(several):
    run_recipe("r.yml", "ours")
    spoilt = flipped(Path("ours/model.safetensors"), "lm_head.weight", 3, 14)
    found = verify(spoilt, "r.yml")
    assert found.semantics == "mergekit:task_arithmetic" and found.count("equal") == 38 and not found.ok
    assert found.findings["lm_head.weight"].differing == 1


def test_ties_of_the_last_of_several_merges(tmp_path, monkeypatch):
    """Its inputs are merged in memory, and the choices are tried all the same."""
    monkeypatch.chdir(tmp_path)
    base = save(Path("base.safetensors"), {"x": np.zeros(8, np.float32)})
    save(Path("half.safetensors"), {"x": np.array([2, 2, -2, 1, 0, 0, 0, 0], np.float32) / 2})
    first = f"refmerge: 1\nname: first\nmerge_method: task_arithmetic\nbase_model: {base}\nparameters: {{lambda: 2}}\n"
    last = f"refmerge: 1\nmerge_method: mergekit:ties\nbase_model: {base}\nmodels: [{{model: first}}]\n"
    last += "parameters: {weight: 1.0, density: 0.25, normalize: false, lambda: 1.0}\n"
    Path("r.yml").write_text(f"{first}models: [{{model: half.safetensors}}]\n---\n{last}")
    for kept, verdict in (([0, 1], "equal"), ([1, 2], "ties"), ([0], "differs")):
        stored = np.where(np.isin(np.arange(8), kept), np.array([2, 2, -2, 1, 0, 0, 0, 0], np.float32), 0)
        found = verify(save(Path("m.safetensors"), {"x": stored}), "r.yml")
        assert found.findings["x"].verdict == verdict
        Path("m.safetensors").unlink()


def tied(tmp_path, kept, values=(2, 2, -2, 1, 0, 0, 0, 0), density=0.25):
    """Of eight entries a quarter, two, are to stay; three are tied for them."""
    delta = np.array(values, np.float32)
    base = save(tmp_path / "base.safetensors", {"x": np.zeros(8, np.float32)})
    model = save(tmp_path / "model.safetensors", {"x": delta})
    r = recipe(
        tmp_path / "r.yml", "mergekit:ties", [model], base, weight=1.0, density=density, normalize=False, **{"lambda": 1.0}
    )
    return verify(save(tmp_path / "m.safetensors", {"x": np.where(np.isin(np.arange(8), kept), delta, 0)}), r)


@pytest.mark.parametrize("kept, verdict", [([0, 1], "equal"), ([0, 2], "ties"), ([1, 2], "ties")])
def test_another_choice_among_ties(kept, verdict, tmp_path):
    found = tied(tmp_path, kept)
    assert found.findings["x"].verdict == verdict and found.ok


@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 3], [], [0, 1, 3]])
def test_what_no_choice_among_ties_gives(kept, tmp_path):
    found = tied(tmp_path, kept)
    assert found.findings["x"].verdict == "differs" and not found.ok


@pytest.mark.parametrize("asked, made", [("model_stock", "mergellm:model_stock"), ("mergellm:model_stock", "model_stock")])
def test_another_semantics_explains_what_differs(asked, made, tmp_path):
    base, models = inputs(tmp_path)
    run_recipe(recipe(tmp_path / "made.yml", made, models, base), tmp_path / "m.safetensors")
    found = verify(tmp_path / "m.safetensors", recipe(tmp_path / "asked.yml", asked, models, base))
    assert found.semantics == asked and not found.ok
    assert found.count("differs") == 2
    (by,) = set(found.explained.values())
    assert by in (made, "mergekit:model_stock"), "two tools that compute the same here"
    assert f"explained  2 of them to the bit by {by}" in found.text()


def test_one_tools_recipe_and_the_papers_result(tmp_path):
    """A recipe of mergekit's, run by somebody who trims over the whole model."""
    base, models = inputs(tmp_path)
    run_recipe(recipe(tmp_path / "paper.yml", "ties", models, base, density=0.3), tmp_path / "m.safetensors")
    theirs = recipe(tmp_path / "r.yml", "ties", models, base, native=False, density=0.3, weight=1.0)
    found = verify(tmp_path / "m.safetensors", theirs)
    assert found.semantics == "mergekit:ties" and set(found.explained.values()) == {"ties"}
    assert set(found.explained) == {"a", "b"}


def test_distances():
    def bits(*values, dtype=np.float32):
        return np.array(values, dtype).view(np.uint8)

    up = np.nextafter(np.float32(1), np.float32(2))
    tiny = np.float32(1e-45)
    a, b = bits(1.0, 0.0, np.nan, tiny, np.nan, np.inf), bits(up, -0.0, np.nan, -tiny, 1.0, np.finfo("f4").max)
    assert ulps(a, b, "F32").tolist() == [1, 1, 0, 2, np.iinfo(np.uint64).max, 1]
    assert ulps(bits(1.0, -np.inf, dtype="f8"), bits(1.0, np.inf, dtype="f8"), "F64").tolist()[0] == 0
    assert ulps(bits(-np.inf, dtype="f8"), bits(np.inf, dtype="f8"), "F64")[0] > ROUNDING
    assert ulps(bits(1, 2, dtype="i4"), bits(1, 9, dtype="i4"), "I32").tolist() == [0, 1]


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    a = save(tmp_path / "a.safetensors", {"x": np.arange(4, dtype=np.float32)})
    r = recipe(tmp_path / "r.yml", "linear", [a])
    run = CliRunner().invoke
    assert run(main, ["verify", str(a), "--recipe", str(r)]).exit_code == 0
    near = save(tmp_path / "near.safetensors", {"x": np.nextafter(np.arange(4, dtype=np.float32), np.float32(9))})
    got = run(main, ["verify", str(near), "--recipe", str(r)])
    assert got.exit_code == 0 and "rounding   1, 4 ulps at most" in got.output
    assert run(main, ["verify", str(near), "--recipe", str(r), "--exact"]).exit_code == 1
    got = run(main, ["verify", str(near), "--recipe", str(r), "--json"])
    assert json.loads(got.output)["tensors"]["x"]["verdict"] == "rounding"
    far = save(tmp_path / "far.safetensors", {"x": np.zeros(4, np.float32)})
    assert run(main, ["verify", str(far), "--recipe", str(r)]).exit_code == 1
    (tmp_path / "bare").mkdir()
    save(tmp_path / "bare" / "model.safetensors", {"x": np.zeros(4, np.float32)})
    with pytest.raises(UsageError, match=r"no mergekit_config\.yml beside the weights: --recipe says how it was made"):
        verify(tmp_path / "bare")
    (tmp_path / "bare" / "mergekit_config.yml").write_text(
        f"merge_method: linear\nmodels:\n  - model: {a}\n    parameters: {{weight: 1}}\n"
    )
    assert not verify(tmp_path / "bare").ok
