"""Makes tests/data/mergekit anew: `python -m tests.make_mergekit_cases PATH/TO/mergekit-yaml`, of mergekit 0.1.5.

Each file holds the tensors that mergekit wrote, and in its header the recipe, the tokens and what config.json says.
tests/data/mergekit_multi.safetensors is what mergekit-multi makes in bfloat16 of several merges in one file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from refmerge.checkpoint import open_checkpoint, save
from tests.mergekit_inputs import write

CASES = {
    "slices": """\
merge_method: linear
slices:
  - sources:
      - {model: ./a, layer_range: [0, 3], parameters: {weight: [0, 1]}}
      - model: ./b
        layer_range: [1, 4]
        parameters:
          weight:
            - {filter: layers.2., value: 0.7}
            - {filter: mlp, value: [0.3, 0.9]}
    parameters: {weight: 0.4}
  - sources: [{model: ./base, layer_range: [3, 4]}, {model: ./a, layer_range: [0, 1], parameters: {weight: [5, 7]}}]
  - sources:
      - {model: ./a, layer_range: [0, 2]}
      - {model: ./b, layer_range: [2, 4]}
      - {model: ./base, layer_range: [1, 3]}
parameters: {weight: [1, 2]}
dtype: float32
""",
    "frankenmerge": """\
merge_method: passthrough
slices:
  - sources: [{model: ./base, layer_range: [0, 3]}]
  - sources:
      - model: ./a
        layer_range: [1, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: [0.25, 0.75]}
            - {value: 1.0}
dtype: float32
out_dtype: bfloat16
""",
    "slerp": """\
slices:
  - sources: [{model: ./a, layer_range: [0, 4]}, {model: ./b, layer_range: [0, 4]}]
merge_method: slerp
base_model: ./a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: float32
""",
    "modules": """\
merge_method: ties
base_model: ./base
modules:
  default:
    models:
      - {model: ./a, parameters: {density: [1, 0.3], weight: 0.6}}
      - {model: ./b}
    parameters: {weight: {filter: self_attn, value: 0.3}, density: 0.5}
parameters: {weight: 1, normalize: true, lambda: 0.9}
dtype: float32
""",
    "union": """\
merge_method: task_arithmetic
base_model: ./base
models: [{model: ./a, parameters: {weight: 0.5}}, {model: ./code, parameters: {weight: 0.25}}]
tokenizer:
  source: union
  pad_to_multiple_of: 4
  tokens:
    "<|im|>": {source: {kind: model_token, model: ./base, token: a}, force: true}
    "{": {source: {kind: zero}}
    "!": {source: {kind: model_token, model: ./a, token_id: 12}}
dtype: float32
""",
    "averaged": """\
merge_method: linear
models: [{model: ./a}, {model: ./b}, {model: ./code}]
parameters: {weight: 1}
tokenizer_source: ./code
dtype: float32
""",
    "base": """\
merge_method: linear
base_model: ./base
models: [{model: ./code, parameters: {weight: 0.3}}, {model: ./base, parameters: {weight: 0.7}}]
tokenizer_source: base
dtype: float32
""",
}  # fmt: skip
SEVERAL = """\
name: first
merge_method: task_arithmetic
base_model: ./base
models: [{model: ./a, parameters: {weight: 0.6}}, {model: ./b, parameters: {weight: 0.7}}]
dtype: bfloat16
---
name: second
merge_method: linear
models: [{model: first, parameters: {weight: 0.35}}, {model: ./b, parameters: {weight: 0.8}}]
dtype: bfloat16
---
merge_method: task_arithmetic
base_model: first
models: [{model: second, parameters: {weight: 1.3}}, {model: ./base, parameters: {weight: -0.4}}]
dtype: bfloat16
"""
KEYS = ("num_hidden_layers", "vocab_size", "dtype")


def main(program: str) -> None:
    folder = Path(__file__).parent / "data" / "mergekit"
    for name, recipe in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            write(Path(place))
            (Path(place) / "r.yml").write_text(recipe)
            subprocess.run([program, "r.yml", "./out", "--quiet"], cwd=place, check=True)
            made = open_checkpoint(f"{place}/out")
            tokenizer = json.loads((Path(place) / "out/tokenizer.json").read_text())
            tokens = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
            config = {key: made.config[key] for key in KEYS}
            facts = {
                "recipe": recipe,
                "tokens": json.dumps(tokens),
                "config": json.dumps(config),
                "made_by": "mergekit 0.1.5",
            }
            save(dict(made), folder / f"{name}.safetensors", metadata=facts, overwrite=True)
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        (Path(place) / "r.yml").write_text(SEVERAL)
        multi = str(Path(program).with_name("mergekit-multi"))
        subprocess.run([multi, "r.yml", "-I", "./first", "--out-path", "./out", "--quiet"], cwd=place, check=True)
        facts = {"recipe": SEVERAL, "made_by": "mergekit 0.1.5"}
        made = open_checkpoint(f"{place}/out")
        save(dict(made), folder.with_name("mergekit_multi.safetensors"), metadata=facts, overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
