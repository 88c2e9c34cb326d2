"""diffusers pipelines: folders of several components, each merged as a model of its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import refmerge
from refmerge import InputError, UsageError
from refmerge.checkpoint import open_checkpoint, save
from refmerge.cli import main
from refmerge.recipe.run import prepare_recipe, run_recipe

posix = pytest.mark.skipif(os.name != "posix", reason="needs links")
KINDS = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "scheduler": "DDIMScheduler",
    "tokenizer": "CLIPTokenizer", "safety_checker": "StableDiffusionSafetyChecker",
}  # fmt: skip
SHAPES = {"down_blocks.0.w": (4, 3), "down_blocks.1.w": (2, 5), "conv_in.w": (7,)}


def arrays(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(folder: Path, seed: int = 0, weights=("unet", "vae", "text_encoder"), more=("scheduler", "tokenizer"), **kinds):
    """A pipeline. kinds: component -> another class, or None for [null, null]."""
    for k, part in enumerate(weights):
        name = "model.safetensors" if part in ("text_encoder", "safety_checker") else "diffusion_pytorch_model.safetensors"
        config = {"config.json": json.dumps({"_class_name": KINDS[part], "torch_dtype": "float32", "width": 4}).encode()}
        save(arrays(10 * seed + k), folder / part, extra_files=config, weights=name)
    for part in more:
        (folder / part).mkdir(parents=True)
        (folder / part / f"{part}_config.json").write_text(json.dumps({"steps": 1000}))
    classes = {part: ["diffusers", KINDS[part]] for part in (*weights, *more)}
    classes |= {part: [None, None] if kind is None else ["diffusers", kind] for part, kind in kinds.items()}
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def index(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yml"
    path.write_text(text)
    return path


TWO = "refmerge: 1\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n"


@pytest.fixture
def two(tmp_path):
    return [write(tmp_path / name, seed, safety_checker=None) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("size", ["5GB", 80])
def test_each_component_is_merged_and_the_rest_is_copied(tmp_path, two, size):
    """Tensors are called unet.<name> in a merge, and <name> in the files, as diffusers has it."""
    with refmerge.merge(two, "linear", out=tmp_path / "out", max_shard_size=size) as merged:
        for k, part in enumerate(("unet", "vae", "text_encoder")):
            for name in SHAPES:
                expected = (arrays(k)[name] + arrays(10 + k)[name]) * np.float32(0.5)
                np.testing.assert_array_equal(merged[f"{part}.{name}"], expected)
                np.testing.assert_array_equal(open_checkpoint(tmp_path / "out" / part)[name], expected)
    assert index(tmp_path / "out") == index(two[0])
    if size == "5GB":
        assert files(tmp_path / "out") == files(two[0])
    else:
        found = [f for f in files(tmp_path / "out") if f.startswith("vae/")]
        stem = "vae/diffusion_pytorch_model"
        assert found == [
            "vae/config.json", *(f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)),
            f"{stem}.safetensors.index.json",
        ]  # fmt: skip
        listed = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())["weight_map"]
        assert sorted(listed) == sorted(SHAPES)


def test_a_component_of_a_pipeline_is_a_model_by_itself(tmp_path):
    """Thresholds over the model, and places of layers, are those of the component merged alone."""
    for k, name in enumerate("abc"):
        write(tmp_path / name, k)
    of = "refmerge: 1\nmerge_method: ties\nbase_model: a{0}\nmodels: [{{model: b{0}}}, {{model: c{0}}}]\n"
    of += "parameters: {{density: 0.4, lambda: [0.5, 1.5]}}\n"
    merged = run_recipe(recipe(tmp_path, of.format("")), tmp_path / "out")
    for part in ("unet", "vae"):
        alone = run_recipe(recipe(tmp_path, of.format(f"/{part}")), tmp_path / part)
        for name in SHAPES:
            np.testing.assert_array_equal(merged[f"{part}.{name}"], alone[name])


def test_parameters_by_component_and_tensor(tmp_path, two):
    text = TWO.replace("{model: b}", "{model: b, parameters: {weight: [{filter: vae., value: 0}, {filter: "
                       "unet.down_blocks.1., value: 3}, {value: 1}]}}")  # fmt: skip
    merged = run_recipe(recipe(tmp_path, text + "parameters: {weight: 1}\n"), tmp_path / "out")
    first, second = arrays(0), arrays(10)
    np.testing.assert_array_equal(merged["vae.conv_in.w"], arrays(1)["conv_in.w"])
    x, y = (of["down_blocks.1.w"] for of in (first, second))
    np.testing.assert_allclose(merged["unet.down_blocks.1.w"], (x + 3 * y) / 4, rtol=1e-5)
    np.testing.assert_allclose(merged["unet.conv_in.w"], (first["conv_in.w"] + second["conv_in.w"]) / 2, rtol=1e-6)


def test_components_of_another_model_and_none(tmp_path, two):
    write(tmp_path / "c", 7, weights=("vae", "safety_checker"))
    (tmp_path / "a" / "vae" / "config.json").unlink()
    text = TWO + "out_dtype: float16\ncomponents: {vae: c, safety_checker: ./c, text_encoder: null, scheduler: b}\n"
    merged = run_recipe(recipe(tmp_path, text), tmp_path / "out")
    assert {name.partition(".")[0] for name in merged} == {"unet", "vae", "safety_checker"}
    np.testing.assert_array_equal(merged["vae.conv_in.w"], arrays(70)["conv_in.w"])
    assert merged.tensors["vae.conv_in.w"].dtype == "F32" and merged.tensors["unet.conv_in.w"].dtype == "F16"
    said = index(tmp_path / "out")
    assert said["text_encoder"] == [None, None] and said["safety_checker"] == ["diffusers", KINDS["safety_checker"]]
    dtypes = [json.loads((tmp_path / f"out/{p}/config.json").read_text())["torch_dtype"] for p in ("unet", "vae")]
    assert dtypes == ["float16", "float32"]
    told = json.loads((tmp_path / "out" / "refmerge_report.json").read_text())
    taken = {"vae": "c", "safety_checker": "./c", "scheduler": "b", "tokenizer": "a"}
    assert {part: os.path.normpath(m) for part, m in told["components"].pop("taken").items()} == {
        part: os.path.normpath(m) for part, m in taken.items()
    }
    assert told["components"] == {"merged": ["unet"], "left_out": ["text_encoder"]}
    assert told["tensors"]["vae.conv_in.w"]["copied"]
    assert told["inputs"]["c"][0]["file"] == "safety_checker/model.safetensors"
    found = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--exact"])
    assert found.exit_code == 0, found.output


def test_all_that_does_not_fit_is_one_error(tmp_path, two):
    write(tmp_path / "c", 2, weights=("unet", "vae", "safety_checker"), vae="VQModel", scheduler="EulerDiscreteScheduler")
    c = tmp_path / "c"
    with pytest.raises(InputError) as error:
        refmerge.merge([two[0], c], "linear", out=tmp_path / "out")
    for part in (
        f"safety_checker (missing from {two[0]}, StableDiffusionSafetyChecker in {c})",
        f"scheduler (DDIMScheduler in {two[0]}, EulerDiscreteScheduler in {c})",
        f"text_encoder (CLIPTextModel in {two[0]}, missing from {c})", f"vae (AutoencoderKL in {two[0]}, VQModel in {c})",
        "components: {name: model}", "--missing base",
    ):  # fmt: skip
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"alike: vae \(AutoencoderKL in [^;]*VQModel in [^;]*\); "):
        refmerge.merge([two[0], c], "linear", missing="base", out=tmp_path / "out")
    merged = refmerge.merge([two[0], c], "linear", missing="base", components={"vae": c}, out=tmp_path / "out")
    said = index(tmp_path / "out")
    assert [said[p][1] for p in ("safety_checker", "scheduler", "text_encoder", "vae")] == [
        None, "DDIMScheduler", "CLIPTextModel", "VQModel",
    ]  # fmt: skip
    np.testing.assert_array_equal(merged["text_encoder.conv_in.w"], arrays(2)["conv_in.w"])
    np.testing.assert_array_equal(merged["vae.conv_in.w"], arrays(21)["conv_in.w"])
    refmerge.merge([two[0], c], "linear", missing="skip", components={"vae": None}, out=tmp_path / "left")
    assert sorted(part for part, said in index(tmp_path / "left").items() if said == [None, None]) == [
        "safety_checker", "text_encoder", "vae",
    ]  # fmt: skip


def test_files_that_differ_are_noted(tmp_path, two):
    (two[1] / "scheduler" / "scheduler_config.json").write_text('{"steps": 1000, "prediction_type": "v_prediction"}')
    (two[1] / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "torch_dtype": "x", "width": 4}')
    (two[1] / "tokenizer" / "vocab.json").write_text('{"a": 1}')
    (two[1] / "tokenizer" / "config.json").write_text("{}")  # which makes no network of it
    (two[0] / "tokenizer" / "vocab.json").write_text('{"a": 2}')
    resolved, _ = prepare_recipe(recipe(tmp_path, TWO))
    a, b = two
    assert list(resolved.notes) == [
        f"scheduler/scheduler_config.json of {b} differs in prediction_type: that of {a} is kept",
        f"tokenizer/vocab.json of {b} differs: that of {a} is kept",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("components: {foo: null}", "no model has 'foo' .known here: scheduler, text_encoder, tokenizer, unet, vae"),
        ("components: {foo: a}", "has no 'foo' .it has scheduler"),
        ("components: {unet: a/unet}", "has no 'unet' .it has none: it is no pipeline"),
        ("components: {unet: ./none}", "none.*no such file"),
        ("components: {unet: 3}", "line 4, column 14: 'unet' must be text, not 3"),
        ("components: {}", "components' is empty"),
        ("tokenizer_source: base", "a diffusers pipeline of several networks, and tokenizer can be said of one alone"),
        ("chat_template: chatml", "chat_template can be said of one alone: merge it by the path of its folder"),
        ("layers: 'x.{}.'", "slices, modules or layers can be said of one alone"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, two, more, message):
    with pytest.raises((InputError, UsageError), match=message):
        run_recipe(recipe(tmp_path, TWO + more + "\n"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_a_pipeline_does_not_belong(tmp_path, two):
    with pytest.raises(InputError, match=r"a is a diffusers pipeline of several components, and .*unet is none: one comp"):
        refmerge.merge([two[0], two[1] / "unet"], "linear")
    with pytest.raises(UsageError, match="components are those of diffusers pipelines, and no model is one"):
        refmerge.merge([p / "unet" for p in two], "linear", components={"vae": None})
    with pytest.raises(UsageError, match=r"a pipeline of several components is a folder, and '.*x.safetensors' is a file"):
        refmerge.merge(two, "linear", out=tmp_path / "x.safetensors")
    mine = tmp_path / "m.yml"
    mine.write_text(TWO.replace("refmerge: 1\n", "components: {vae: a}\n"))
    with pytest.raises(UsageError, match="'components' belongs to native recipes"):
        run_recipe(mine, tmp_path / "out")


def test_variants_and_shards_are_read(tmp_path, two):
    """The plain weights where there are some, else those of the only variant; and both ways of counting its shards."""
    a, b = two
    fp16 = {name: x.astype(np.float16) for name, x in arrays(0).items()}
    save(fp16, tmp_path / "x.safetensors")
    shutil.copy(tmp_path / "x.safetensors", a / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(tmp_path / "x.safetensors", a / "vae" / "diffusion_pytorch_model.non_ema.safetensors")
    (a / "unet" / "diffusion_pytorch_model.safetensors").rename(a / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.rmtree(b / "unet")
    save(arrays(10), b / "unet", max_shard_size=80, weights="diffusion_pytorch_model.safetensors",
         extra_files={"config.json": b"{}"})  # fmt: skip
    for old in list((b / "unet").glob("*.safetensors*")):
        new = old.name.replace("-of-00002.", "-of-00002.fp16.").replace("index.json", "index.fp16.json")
        text = old.read_bytes() if "index" not in new else old.read_bytes().replace(b"-of-00002.", b"-of-00002.fp16.")
        old.unlink()
        (b / "unet" / new).write_bytes(text)
    save(arrays(1), a / "loose.safetensors")  # a single-file checkpoint beside the components is another model
    merged = refmerge.merge(two, "linear", out=tmp_path / "out")
    np.testing.assert_array_equal(merged["unet.conv_in.w"], (arrays(0)["conv_in.w"] + arrays(10)["conv_in.w"]) * 0.5)
    np.testing.assert_array_equal(merged["vae.conv_in.w"], (arrays(1)["conv_in.w"] + arrays(11)["conv_in.w"]) * 0.5)
    assert files(tmp_path / "out") == sorted(
        ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
        + [f"{p}/config.json" for p in ("text_encoder", "unet", "vae")]
        + [f"{p}/diffusion_pytorch_model.safetensors" for p in ("unet", "vae")] + ["text_encoder/model.safetensors"]
    )  # fmt: skip
    (a / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"vae': weights of the variants fp16, non_ema, and none that are plain"):
        open_checkpoint(a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": "UNet"}, None),  # a setting, and no component
        ({"../unet": ["x", "Y"]}, "'../unet' is no component"),
        ({"unet": ["x"]}, "'unet' is no component"),
        ({"unet": ["x", 3]}, "'unet' is no component"),
        ({"prior": ["x", "Y"]}, r"component prior \('Y'\) has no folder"),
        ([], "not a JSON object"),
        (dict.fromkeys(KINDS), "names no components"),
    ],
)
def test_indexes_that_make_no_sense(tmp_path, change, message):
    folder = write(tmp_path / "a")
    said = [] if change == [] else {**index(folder), **change}
    (folder / "model_index.json").write_text(json.dumps(said))
    if message is None:
        assert {name.partition(".")[0] for name in open_checkpoint(folder)} == {"vae", "text_encoder"}
        return
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_all_that_is_wrong_with_a_pipeline_is_told_at_once(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError) as error:
        open_checkpoint(folder)
    for part in ("2 problems", "unet': holds no weights", "vae': holds only 'diffusion_pytorch_model.bin'"):
        assert part in str(error.value)


@posix
def test_nothing_outside_of_a_pipeline_is_read(tmp_path, two):
    other = two[1] / "unet"
    shutil.rmtree(two[0] / "unet")
    (two[0] / "unet").symlink_to(other)
    with pytest.raises(InputError, match="a link out of its folder"):
        open_checkpoint(two[0])
    (two[0] / "unet").unlink()
    (two[0] / "unet").symlink_to(".")
    with pytest.raises(InputError, match="a component, and a pipeline itself"):
        open_checkpoint(two[0])


def test_only_what_is_plainly_a_pipeline_is_overwritten(tmp_path, two):
    out = tmp_path / "out"
    refmerge.merge(two, "linear", out=out)
    refmerge.merge(two, "linear", out=out, overwrite=True)
    for strange in (out / "pictures", out / "unet" / "old"):
        strange.mkdir()
        with pytest.raises(UsageError, match="has folders in it, which overwriting would remove"):
            refmerge.merge(two, "linear", out=out, overwrite=True)
        strange.rmdir()
    (out / "vae" / "x").write_text("")
    refmerge.merge(two, "linear", out=out, overwrite=True)
    assert not (out / "vae" / "x").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


def test_several_merges_in_one_file(tmp_path, two):
    write(tmp_path / "c", 2)
    text = TWO + "name: half\nout_dtype: float64\n---\n" + TWO.replace("{model: a}", "{model: half}").replace(": b", ": c")
    merged = run_recipe(recipe(tmp_path, text + "out_dtype: float32\n"), tmp_path / "out")
    x = [arrays(10 * k)["conv_in.w"].astype(float) for k in range(3)]
    np.testing.assert_allclose(merged["unet.conv_in.w"], (x[0] + x[1]) / 4 + x[2] / 2, rtol=1e-6)
    assert index(tmp_path / "out") == index(two[0])


def test_an_adapter_in_a_pipeline(tmp_path, two):
    """diffusers' and kohya's names begin with the component, too."""
    for name in ("unet.down_blocks.0.w", "text_encoder.down_blocks.0.w"):
        for p in two:
            weights = dict(open_checkpoint(p / name.partition(".")[0]))
            path = next((p / name.partition(".")[0]).glob("*.safetensors"))
            path.unlink()
            save({**weights, "attn.to_q.weight": np.zeros((2, 3), np.float32)}, path)
    lora = {}
    for part in ("unet_attn_to_q", "te_attn_to_q"):
        lora[f"lora_{part}.lora_down.weight"] = np.ones((1, 3), np.float32)
        lora[f"lora_{part}.lora_up.weight"] = np.array([[1], [2]], np.float32)
    save(lora, tmp_path / "lora.safetensors")
    merged = run_recipe(recipe(tmp_path, TWO.replace("model: b", "model: b+lora.safetensors")), tmp_path / "out")
    for part in ("unet", "text_encoder"):
        assert merged[f"{part}.attn.to_q.weight"].tolist() == [[0.5] * 3, [1.0] * 3]
    assert index(tmp_path / "out") == index(two[0])


def test_scaled_weights_of_a_component(tmp_path, two):
    import ml_dtypes

    for p in two:
        (p / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        eight = {"w": np.full((2, 2), 2, ml_dtypes.float8_e4m3fn), "w_scale": np.float32(0.25).reshape(())}
        save(eight, p / "unet" / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "UNet2DConditionModel", "quantization_config": {"quant_method": "fp8"}}
        (p / "unet" / "config.json").write_text(json.dumps(config))
    merged = refmerge.merge(two, "linear", out=tmp_path / "out")
    assert merged["unet.w"].tolist() == [[0.5, 0.5]] * 2 and merged.tensors["unet.w"].dtype == "BF16"
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text()) == {"_class_name": "UNet2DConditionModel"}


def test_the_command_line(tmp_path, two, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, TWO + "components: {vae: b}\n")
    run = CliRunner().invoke
    told = run(main, ["plan", "recipe.yml"]).output
    assert "components  text_encoder, unet merged\n            scheduler, tokenizer of a\n            vae of b\n" in told
    facts = json.loads(run(main, ["plan", "recipe.yml", "--json", "--no-time", "--tensor", "vae.conv*"]).output)
    assert facts["arranged"] == {
        "merged": ["text_encoder", "unet"], "taken": {"scheduler": "a", "tokenizer": "a", "vae": "b"}, "left_out": [],
    }  # fmt: skip
    assert [(t["name"], t["method"]) for t in facts["listed"]] == [("vae.conv_in.w", "copy")]
    assert run(main, ["merge", "recipe.yml", "out", "--resume", "-q"]).exit_code == 0
    told = run(main, ["inspect", "out"]).output
    assert "unet: UNet2DConditionModel, 3 tensors" in told and "scheduler: DDIMScheduler\n" in told
    facts = json.loads(run(main, ["inspect", "out", "--json"]).output)
    assert facts["files"][-1] == "vae/diffusion_pytorch_model.safetensors"
    assert "9 in both" in run(main, ["compare", "a", "out"]).output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card
    kept = (tmp_path / "out" / "refmerge_config.yaml").read_text()
    assert "components: {vae: ../b}" in kept
