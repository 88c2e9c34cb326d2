"""LiNeS: blocks by name, the line itself, and the recipe that says the same in layers of a gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import UsageError, call, merge, run_recipe
from refmerge.checkpoint import save
from refmerge.methods.task_vectors.lines import depth

RECIPE = Path(__file__).parent.parent / "spec" / "recipes" / "lines.yml"
RELAXED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.weight", 0.0), ("model.layers.3.mlp.0.weight", 1.0), ("h.1.w", 1 / 3), ("a.02.w", 2 / 3),
        ("model.embed_tokens.weight", 0.0), ("0.weight", 0.0), ("heads.2", 0.0), ("conv1.2b.w", 0.0), ("w", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_depth(name, expected):
    assert depth(name, 4, ("*",)) == expected
    assert depth(name, 4, ("other.*",)) == 0.0


def test_a_block_too_many_is_refused():
    with pytest.raises(UsageError, match=r"'h\.4\.w' is of block 4, and 4 are counted from 0"):
        call("lines", [[1.0]], [0.0], name="h.4.w", blocks=4, beta=1.0)
    assert depth("h.4.w", 4, ("layers.*",)) == 0.0
    assert depth("h.0.w", 1, ("*",)) == 1.0


@RELAXED
@given(
    st.integers(0, 11), st.sampled_from([0.0, 0.25, 1.0, -1.0]), st.sampled_from([0.0, 0.5, 2.0]), st.integers(1, 4)
)  # fmt: skip
def test_it_is_task_arithmetic_with_a_lambda_of_each_block(block, alpha, beta, count):
    base, *models = np.random.default_rng(block).standard_normal((count + 1, 6))
    got = call("lines", models, base, name=f"blocks.{block}.w", blocks=12, alpha=alpha, beta=beta)
    expected = call("task_arithmetic", models, base, lambda_=alpha + beta * block / 11)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    theirs = call("official:lines", models, base, name=f"blocks.{block}.w", num_blocks=12, alpha=alpha, beta=beta)
    np.testing.assert_allclose(theirs, expected, rtol=1e-12, atol=1e-14)


def test_the_recipe_is_the_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)), "model.norm.weight"]
    made = [{n: draw.standard_normal((3, 4)).astype(np.float32) for n in names} for _ in range(3)]
    for folder, tensors in zip(("base", "math", "code"), made):
        Path(folder).mkdir()
        save(tensors, f"{folder}/model.safetensors")
        Path(folder, "config.json").write_text('{"model_type": "llama"}')
    Path("lines.yml").write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    merged = run_recipe("lines.yml", "merged")
    expected = merge(made[1:], "lines", base=made[0], blocks=5, alpha=0.25, beta=0.75)
    for name in names:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6)
