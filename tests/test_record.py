"""What lies beside the weights of a merge, and what a plan says before any of them is read."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from refmerge.adapters import Adapter, Factors, write_adapter
from refmerge.checkpoint import open_checkpoint, save
from refmerge.checkpoint.reader import Checkpoint
from refmerge.cli import main
from refmerge.recipe import load_recipe
from refmerge.recipe.run import prepare_recipe, run_recipe
from refmerge.verify import verify
from tests.tiny_models import write

RECIPE = """\
# by hand
merge_method: task_arithmetic
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4], parameters: {weight: [0, 1]}}]
  - sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}, {model: c, layer_range: [5, 6]}]
parameters: {weight: 0.5}
out_dtype: bfloat16
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, layers, number in (("a", 4, 100), ("b", 4, 200), ("c", 6, 300)):
        write(name, layers, number)
    (tmp_path / "r.yml").write_text(RECIPE)
    return tmp_path


def front_of(card):
    return YAML(typ="safe", pure=True).load(card.split("---\n")[1])


def test_the_files_of_a_merge(folder):
    run_recipe("r.yml", "out")
    names = {p.name for p in (folder / "out").iterdir()}
    assert names == {
        "README.md", "config.json", "mergekit_config.yml", "model.safetensors", "refmerge_config.yaml",
        "refmerge_report.json",
    }  # fmt: skip
    assert (folder / "out/mergekit_config.yml").read_text() == RECIPE
    assert load_recipe(folder / "out/mergekit_config.yml").content == load_recipe("r.yml").content
    understood = YAML(typ="safe", pure=True).load((folder / "out/refmerge_config.yaml").read_text())
    assert understood["merge_method"] == "task_arithmetic" and understood["slices"][1]["sources"][2]["model"] == "c"
    assert understood["parameters"]["weight"] == 0.5 and understood["parameters"]["normalize"] is False
    config = json.loads((folder / "out/config.json").read_text())
    assert config == {"num_hidden_layers": 3, "dtype": "bfloat16"}


def test_the_report(folder):
    run_recipe("r.yml", "out", max_shard_size=100)
    report = json.loads((folder / "out/refmerge_report.json").read_text())
    assert report["inputs"].keys() == {"a", "b", "c"}
    given = report["inputs"]["c"][0]
    assert given["file"] == "model.safetensors"
    assert given["sha256"] == hashlib.sha256((folder / "c/model.safetensors").read_bytes()).hexdigest()
    assert [f["file"] for f in report["outputs"]] == sorted(p.name for p in (folder / "out").glob("*.safetensors"))
    for f in report["outputs"]:
        content = (folder / "out" / f["file"]).read_bytes()
        assert (f["bytes"], f["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    tensor = report["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert tensor["from"] == [["b", "model.layers.3.mlp.up_proj.weight"], "a"]
    assert (tensor["dtype"], tensor["shape"]) == ("BF16", [2, 3])
    assert report["parameters"][tensor["parameters"]]["weight"] == [1.0]
    assert report["parameters"][report["tensors"]["model.layers.2.mlp.up_proj.weight"]["parameters"]]["weight"] == [0.5, 0.5]
    assert report["tensors"].keys() == set(open_checkpoint("out").tensors)


def test_what_was_asked_for_beside_the_recipe(folder):
    (folder / "r.yml").write_text("refmerge: 1\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nseed: 4\n")
    run_recipe("r.yml", "out", seed=7, dtype="float64", missing="skip")
    report = json.loads((folder / "out/refmerge_report.json").read_text())
    assert (report["seed"], report["options"]) == (7, {"dtype": "float64", "missing": "skip"})
    assert "seed: 7\n" in (folder / "out/refmerge_config.yaml").read_text()


@pytest.mark.parametrize(("hashes", "there"), [(None, True), (True, True), (False, False)])
def test_hashes(folder, hashes, there):
    run_recipe("r.yml", "out", hashes=hashes)
    report = json.loads((folder / "out/refmerge_report.json").read_text())
    assert all(("sha256" in f) == there for f in [*report["outputs"], *report["inputs"]["a"]])


def test_a_file_in_the_hubs_cache_bears_its_hash_as_its_name(folder):
    cache = folder / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/abc").mkdir(parents=True)
    (folder / "a/model.safetensors").rename(cache / "blobs" / ("0f" * 32))
    (cache / "snapshots/abc/model.safetensors").symlink_to(cache / "blobs" / ("0f" * 32))
    (folder / "r.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {cache}/snapshots/abc}}]\n")
    run_recipe("r.yml", "out", hashes=False)
    report = json.loads((folder / "out/refmerge_report.json").read_text())
    assert report["inputs"][f"{cache}/snapshots/abc"][0]["sha256"] == "0f" * 32
    assert front_of((folder / "out/README.md").read_text())["base_model"] == ["org/name"]


def test_the_recipe_in_each_files_header(folder):
    run_recipe("r.yml", "out", max_shard_size=100)
    written = json.loads(open_checkpoint("out").metadata["refmerge_recipe"])
    assert written["merge_method"] == "task_arithmetic" and written["slices"][0]["sources"][1]["model"] == "b"
    run_recipe("r.yml", "one.safetensors")
    assert json.loads(open_checkpoint("one.safetensors").metadata["refmerge_recipe"]) == written


def test_the_same_merge_leaves_the_same_files(folder):
    for out in ("x", "y"):
        run_recipe("r.yml", out, threads=1 if out == "x" else 2)
    for path in (folder / "x").iterdir():
        assert path.read_bytes() == (folder / "y" / path.name).read_bytes(), path.name


def test_the_card(folder):
    for name, licence in (("a", "mit"), ("b", "mit"), ("c", "mit")):
        (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    (folder / "r.yml").write_text(RECIPE + "# ``` a fence\n")
    run_recipe("r.yml", "out")
    card = (folder / "out/README.md").read_text()
    assert front_of(card) == {"library_name": "transformers", "tags": ["merge", "refmerge"], "license": "mit"}
    assert "- `b`\n- `c`\n- `a`, the base\n" in card
    assert "\n````yaml\n# by hand\n" in card and card.count("````") == 2
    (folder / "b/README.md").write_text("---\nlicense: other\n---\n")
    run_recipe("r.yml", "out", overwrite=True)
    assert "license" not in front_of((folder / "out/README.md").read_text())


def test_a_native_recipe_has_no_file_of_mergekits(folder):
    (folder / "r.yml").write_text("refmerge: 1\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    run_recipe("r.yml", "out")
    assert not (folder / "out/mergekit_config.yml").exists()
    assert "With its own semantics." in (folder / "out/README.md").read_text()
    report = json.loads((folder / "out/refmerge_report.json").read_text())
    assert report["tensors"]["lm_head.weight"]["from"] == ["a", "b"]


@pytest.mark.parametrize("native", [False, True])
def test_the_recipe_with_its_defaults_makes_the_same(folder, native):
    (folder / "sub").mkdir()
    if native:
        text = "refmerge: 1\nmerge_method: ties\nbase_model: ../a\nmodels: [{model: ../b}]\nparameters: {density: 0.5}\n"
        text = f"name: x\n{text}---\nrefmerge: 1\nmerge_method: linear\nmodels: [{{model: x}}, {{model: {folder}/a}}]\n"
        (folder / "sub/r.yml").write_text(text)
    else:
        (folder / "sub/r.yml").write_text(RECIPE)
    run_recipe("sub/r.yml", "deep/out")
    filled = (folder / "deep/out/refmerge_config.yaml").read_text()
    assert ("../../b" in filled and f"{folder}/a" in filled) == native
    run_recipe("deep/out/refmerge_config.yaml", "again")
    assert (folder / "again/refmerge_report.json").exists()
    one, other = open_checkpoint("deep/out"), open_checkpoint("again")
    assert {n: x.tobytes() for n, x in one.items()} == {n: x.tobytes() for n, x in other.items()}
    assert ask("verify", "deep/out")[0] == 0


def test_stages_are_recorded_in_the_last_one(folder):
    text = "merge_method: passthrough\nmodels: [{model: x}]\n---\nname: x\n" + RECIPE
    (folder / "r.yml").write_text(text)
    run_recipe("r.yml", "out")
    assert (folder / "out/mergekit_config.yml").read_text() == text
    written = json.loads(open_checkpoint("out").metadata["refmerge_recipe"])
    assert [r.get("name") for r in written] == ["x", None]
    report = json.loads((folder / "out/refmerge_report.json").read_text())
    assert report["inputs"].keys() == {"a", "b", "c"}, "x is never written"
    assert all(files[0]["sha256"] for files in report["inputs"].values())
    run_recipe("r.yml", "other", intermediates="kept")
    kept = json.loads((folder / "other/refmerge_report.json").read_text())
    assert kept["inputs"].keys() == {"a", "b", "c", "x"} and kept["inputs"]["x"][0]["sha256"]
    assert json.loads((folder / "kept/x/refmerge_report.json").read_text())["inputs"] == report["inputs"]
    assert kept | {"inputs": None} == report | {"inputs": None}


# --- plans


def ask(*args):
    result = CliRunner().invoke(main, args)
    return result.exit_code, result.output


@pytest.fixture
def unread(monkeypatch):
    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)


def test_a_plan_reads_no_weight(folder, unread):
    status, told = ask("plan", "r.yml", "--no-time", "--tensor", "*.1.mlp*")
    assert status == 0
    lines = told.splitlines()
    assert lines[:4] == [
        "method      mergekit:task_arithmetic (as mergekit has it: a recipe without refmerge: 1 at its top)",
        "models      b", f"{'':12}c", "base        a",
    ]  # fmt: skip
    assert lines[4:6] == ["layers      0-1 from b 2-3, a 0-1", "layers      2-2 from b 1-1, c 5-5, a 1-1"]
    assert lines[6].startswith("tensors     9 merged, 0 copied")
    assert "parameters" in lines[6] and "reads" in lines[7] and "writes" in lines[8] and "memory" in lines[9]
    assert "as many as the first slice has" in lines[10]
    assert lines[11].startswith("model.layers.1.mlp.up_proj.weight BF16[2, 3] mergekit:task_arithmetic weight=(1.0,) ")


def test_whose_semantics_a_plan_says(folder, unread):
    models = "merge_method: {}\nbase_model: a\nmodels: [{{model: b}}]\nparameters: {{weight: 1}}\n"
    for top, method, said in (
        ("", "task_arithmetic", "mergekit:task_arithmetic (as mergekit has it: a recipe without refmerge: 1 at its top)"),
        ("refmerge: 1\n", "mergekit:task_arithmetic", "mergekit:task_arithmetic (as mergekit has it)"),
        ("refmerge: 1\n", "task_arithmetic", "task_arithmetic (as the paper has it)"),
    ):
        text = top + models.format(method)
        (folder / "w.yml").write_text(text if ":" in said.split()[0] else text.replace("weight", "lambda"))
        status, told = ask("plan", "w.yml", "--no-time")
        assert told.splitlines()[0] == f"method      {said}" and status == 0
        assert json.loads(ask("plan", "w.yml", "--no-time", "--json")[1])["semantics"] == ("refmerge" if top else "mergekit")


def test_a_plan_of_no_such_tensor_and_of_little_memory(folder, unread):
    status, told = ask("plan", "r.yml", "--no-time", "--tensor", "*.9.mlp*")
    assert status == 0 and "refmerge: no tensor of the result has a name that '*.9.mlp*' matches" in told
    status, told = ask("plan", "r.yml", "--no-time", "--max-memory", "1.5.0GB")
    assert status == 2 and told.startswith("refmerge: --max-memory: not a size: '1.5.0GB'; write it like 5GB")
    # The largest tensor of the result has 15 entries; the last slice merges three models and the first two.
    status, told = ask("plan", "r.yml", "--no-time", "--max-memory", "100B", "--threads", "2")
    assert status == 5 and "\n" not in told.strip()
    assert "needs tensor 'lm_head.weight' in blocks on 2 threads: --max-memory 1kB is the least, and 100 bytes" in told
    assert told.strip().endswith(" are given; fewer --threads need less")
    status, told = ask("plan", "r.yml", "--no-time", "--max-memory", "1kB", "--json")
    assert status == 0 and json.loads(told)["figures"]["block_memory"] < 5000


def test_models_and_output_are_told_together(folder, unread):
    (folder / "out").mkdir()
    top = "merge_method: linear\nparameters: {weight: 1}\n"
    (folder / "m.yml").write_text(f"{top}models: [{{model: x}}, {{model: y}}, {{model: a}}]\n")
    status, told = ask("merge", "m.yml", "out")
    assert status == 3 and told.splitlines()[0] == "refmerge: 3 problems"
    assert "'x': no such" in told and "'y': no such" in told and "out': exists" in told
    write("d", 2, 0)
    (folder / "m.yml").write_text(f"{top}models: [{{model: a}}, {{model: d}}]\n")
    status, told = ask("merge", "m.yml", "out")
    assert status == 2 and "2 problems" in told and "out': exists" in told and "is missing from d and present in a" in told


def test_a_plan_for_programs(folder, unread):
    status, told = ask("plan", "r.yml", "--json", "--no-time", "--tensor", "*.1.mlp*")
    assert status == 0
    found = json.loads(told)
    assert found["semantics"] == "mergekit" and len(found["slices"]) == 2
    # Of b and a twice three tensors a layer; of the second slice two, two and two; and what comes before and after.
    one = 4 * 6
    assert found["figures"]["bytes_read"] == 2 * (2 * 2 * one) + 3 * (2 * one) + 2 * (4 * 15) + 2 * (4 * (3 + 15))
    assert found["figures"]["bytes_written"] == (3 * 2 * one + 4 * (15 + 3 + 15)) // 2
    (listed,) = found["listed"]
    assert listed["from"] == [
        "b: tensor 'model.layers.3.mlp.up_proj.weight'", "a: tensor 'model.layers.1.mlp.up_proj.weight'",
    ]  # fmt: skip
    assert listed["parameters"]["weight"] == [1.0] and listed["parameters"]["lambda"] == 1.0


def test_a_plan_of_stages(folder, unread):
    (folder / "r.yml").write_text("merge_method: passthrough\nmodels: [{model: x}]\n---\nname: x\n" + RECIPE)
    status, told = ask("plan", "r.yml", "--no-time")
    assert status == 0
    assert told.index("--- x\n") < told.index("--- the result\nmethod      mergekit:passthrough")
    found = json.loads(ask("plan", "r.yml", "--json", "--no-time")[1])
    assert [s["name"] for s in found["stages"]] == ["x"] and found["models"] == ["x"]
    assert "result      merged in memory as it is read, not written" in told
    assert found["stages"][0]["written"] is None and found["stages"][0]["figures"]["bytes_written"] == 0
    both = "merge_method: linear\nmodels: [{model: x}, {model: y}]\nparameters: {weight: 1}\n"
    other = "name: y\nmerge_method: passthrough\nmodels: [{model: x}]\n"
    (folder / "r.yml").write_text(f"{both}---\n{other}---\nname: x\n" + RECIPE)
    told = ask("plan", "r.yml", "--no-time")[1]
    assert "result      written first: several merges read it" in told and told.count("merged in memory") == 1


def test_a_plan_of_vocabularies(folder):
    for name, tokens in (("d", "xy"), ("e", "yz")):
        data = {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}, "added_tokens": []}
        files = {"tokenizer.json": json.dumps(data).encode(), "config.json": b'{"vocab_size": 2}'}
        save({"embed.weight": np.ones((2, 2), np.float32)}, name, extra_files=files)
    text = "merge_method: linear\nmodels: [{model: d}, {model: e}]\nparameters: {weight: 1}\ntokenizer_source: union\n"
    (folder / "r.yml").write_text(text)
    told = ask("plan", "r.yml", "--no-time")[1]
    assert f"vocabulary  union: 3 tokens in 3 rows\n{'':12}1 are in all of d, e, 2 are given to others\n" in told
    found = json.loads(ask("plan", "r.yml", "--no-time", "--json")[1])["vocabulary"]["tables"][0]
    assert found["others"]["x"] == {"id": 0, "in": ["e"], "from": [{"model": "d", "row": 0}]}
    run_recipe("r.yml", "out")
    assert json.loads((folder / "out/refmerge_report.json").read_text())["vocabulary"]["tables"] == [found]


def test_a_recipe_beside_the_weights_finds_its_models_from_there(folder):
    """A native recipe's paths are relative to its folder, those of adapters too, also behind an absolute one."""
    shape = open_checkpoint("a")["lm_head.weight"].shape
    factors = Factors(np.ones((1, shape[1]), np.float32), np.ones((shape[0], 1), np.float32), 1.0)
    write_adapter(Adapter({"lm_head": factors}), folder / "lora")
    models = f"[{{model: {folder}/a+./lora}}, {{model: ./b+lora}}]"
    (folder / "r.yml").write_text(f"refmerge: 1\nmerge_method: linear\nmodels: {models}\n")
    run_recipe("r.yml", "deep/out")
    found = YAML(typ="safe", pure=True).load((folder / "deep/out/refmerge_config.yaml").read_text())
    assert [m["model"] for m in found["models"]] == [f"{folder}/a+../../lora", "../../b+../../lora"]
    assert verify("deep/out").exact


def test_all_that_is_wrong_with_the_inputs_at_once(folder):
    (folder / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: no}, {model: a}, {model: nor}]\nparameters: {weight: 1}\n"
    )
    status, told = ask("plan", "r.yml")
    assert status == 3
    assert told.splitlines() == [
        "refmerge: 2 problems", "  'no': no such file or directory", "  'nor': no such file or directory",
    ]  # fmt: skip
    b = {n: np.array(x) for n, x in open_checkpoint("b").items()}
    b["model.norm.weight"] = np.ones(4, np.float32)
    b["model.layers.0.mlp.up_proj.weight"] = np.ones((3, 3), np.float32)
    del b["model.layers.3.mlp.up_proj.weight"]
    b["ids"] = np.arange(3)
    save(b, "b", overwrite=True)
    a = {n: np.array(x) for n, x in open_checkpoint("a").items()}
    save({**a, "ids": np.arange(1, 4)}, "a", overwrite=True)
    (folder / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    status, told = ask("plan", "r.yml")
    assert status == 3
    lines = told.splitlines()
    assert lines[0] == "refmerge: 3 problems", "integers are read and compared where nothing else is wrong"
    for part in ("'model.layers.3.mlp.up_proj.weight' is missing from b", "[3, 3] in b", "[4] in b"):
        assert any(part in line for line in lines), part
    assert not (folder / "out").exists()


def test_a_parameter_that_has_no_value_for_some_tensors(folder):
    (folder / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: {filter: mlp, value: 1}}\n"
    )
    status, told = ask("plan", "r.yml")
    assert status == 2
    assert told.startswith("refmerge: 7 problems\n  parameter weight of a has no value for tensor 'lm_head.weight'")


def test_notes_are_told_when_merging(folder):
    resolved, _ = prepare_recipe("r.yml")
    status, told = ask("merge", "r.yml", "out", "--no-hash")
    assert status == 0 and f"note: {resolved.notes[0]}" in told
