"""Recipes of mergekit give what mergekit 0.1.5 gives: its results on tiny models, made by make_mergekit_cases.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from refmerge.checkpoint import open_checkpoint
from refmerge.recipe.run import run_recipe
from refmerge.recipe.tokenizers import read_vocabulary
from tests.mergekit_inputs import write

CASES = sorted((Path(__file__).parent / "data" / "mergekit").glob("*.safetensors"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write(folder)
    return folder


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_as_mergekit(models, monkeypatch, path):
    theirs = open_checkpoint(path)
    monkeypatch.chdir(models)
    (models / "r.yml").write_text(theirs.metadata["recipe"])
    ours = run_recipe("r.yml", "out", overwrite=True)
    assert ours.tensors.keys() == theirs.tensors.keys()
    config = json.loads(theirs.metadata["config"])
    assert {key: ours.config[key] for key in config} == config
    tokens = json.loads(theirs.metadata["tokens"])
    ids = read_vocabulary(ours).ids
    assert ids.keys() == tokens.keys()
    for name, want in theirs.items():
        got = ours[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            # mergekit gives new tokens their numbers in no order that could be told.
            rest = sorted(set(range(len(want))) - set(tokens.values()))
            got, want = got[[*(ids[t] for t in tokens), *rest]], want[[*tokens.values(), *rest]]
        if want.dtype == np.float32:
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7, err_msg=name)
        else:
            assert got.tobytes() == want.tobytes(), name


def test_there_are_cases():
    assert len(CASES) == 7
