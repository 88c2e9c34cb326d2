"""Adapters of image models, whose modules are found by rule in a base."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refmerge import InputError, UsageError
from refmerge.adapted import adapted
from refmerge.adapters import read_adapter, write_adapter
from refmerge.checkpoint import open_checkpoint, save
from refmerge.procedures.adapters.lora_merge import lora_merge
from refmerge.recipe.run import run_recipe

# diffusers' name of a module of the U-Net, and where the first Stable Diffusion's single file has it.
PLACES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.3.resnets.1.conv1": "input_blocks.11.0.in_layers.2",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
    "up_blocks.3.resnets.2.conv2": "output_blocks.11.0.out_layers.3",
    "conv_out": "out.2",
}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def flat(name):
    return name.replace(".", "_")


def factors(name, value, down="lora_down", up="lora_up", alpha=None, r=2):
    """A change of 2 x 3 whose first row is value * r, times alpha / r."""
    x = {f"{name}.{down}.weight": np.full((r, 3), value, np.float32)}
    x[f"{name}.{up}.weight"] = np.array([[1] * r, [0] * r], np.float32)
    return x | ({} if alpha is None else {f"{name}.alpha": np.array(alpha, np.float32)})


def test_kohyas_names_in_a_single_file(tmp_path):
    base = {f"model.diffusion_model.{ldm}.weight": np.zeros((2, 3), np.float16) for ldm in PLACES.values()}
    base["cond_stage_model.transformer." + TEXT + ".weight"] = np.zeros((2, 3), np.float16)
    base["first_stage_model.conv_in.weight"] = np.zeros((2, 3), np.float16)
    save(base, tmp_path / "sd.safetensors")
    lora = {}
    for i, name in enumerate(PLACES):
        lora |= factors(f"lora_unet_{flat(name)}", i + 1.0, alpha=1)
    save({**lora, **factors(f"lora_te_{flat(TEXT)}", 0.5)}, tmp_path / "lora.safetensors")
    read = adapted(tmp_path / "sd.safetensors", tmp_path / "lora.safetensors")
    for i, ldm in enumerate(PLACES.values()):
        assert read[f"model.diffusion_model.{ldm}.weight"].tolist() == [[i + 1.0] * 3, [0.0] * 3]
    assert read["cond_stage_model.transformer." + TEXT + ".weight"].tolist() == [[1.0] * 3, [0.0] * 3]
    assert not read["first_stage_model.conv_in.weight"].any()


def test_kohyas_names_of_a_single_file_in_a_pipeline(tmp_path):
    """As adapters of Stable Diffusion XL are mostly trained: the single file's names, and two text encoders."""
    newer = TEXT.removeprefix("text_model.")  # transformers 5 saves one kind of text encoder without it
    parts = {"unet": [*PLACES], "text_encoder": [newer], "text_encoder_2": [TEXT]}
    for part, names in parts.items():
        weights = {f"{name}.weight": np.zeros((2, 3), np.float16) for name in names}
        save(weights, tmp_path / "sd" / part, extra_files={"config.json": b"{}"})
    classes = {part: ["diffusers", part] for part in parts}
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(classes))
    lora = {}
    for i, ldm in enumerate(PLACES.values()):
        lora |= factors(f"lora_unet_{flat(ldm)}", i + 1.0, alpha=1)
    lora |= factors(f"lora_te1_{flat(TEXT)}", 0.5) | factors(f"lora_te2_{flat(TEXT)}", 3.0)
    save(lora, tmp_path / "lora.safetensors")
    read = adapted(open_checkpoint(tmp_path / "sd"), tmp_path / "lora.safetensors")
    for i, name in enumerate(PLACES):
        assert read[f"unet.{name}.weight"].tolist() == [[i + 1.0] * 3, [0.0] * 3]
    assert [read[f"{n}.weight"][0, 0] for n in (f"text_encoder.{newer}", f"text_encoder_2.{TEXT}")] == [1.0, 6.0]


@pytest.mark.parametrize(
    ("place", "part"),
    [("conditioner.embedders.1.model.", "lora_te2_"), ("cond_stage_model.model.", "lora_te_"), ("", "lora_te2_")],
)
def test_the_text_encoder_of_open_clip(tmp_path, place, part):
    """Queries, keys and values in one tensor: 2 x 3 each, of which keys stay as they are."""
    layer, theirs = f"{place}transformer.resblocks.3.", "text_model_encoder_layers_3_"
    base = {f"{layer}{n}.weight": np.zeros((2, 3), np.float32) for n in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")}
    base |= {f"{layer}attn.in_proj_weight": np.zeros((6, 3), np.float32), f"{layer}attn.in_proj_bias": np.zeros(6)}
    save(base, tmp_path / "sd.safetensors")
    lora = factors(f"{part}{theirs}self_attn_q_proj", 1.0, alpha=1) | factors(f"{part}{theirs}self_attn_v_proj", 2.0, r=1)
    for i, name in enumerate(("self_attn_out_proj", "mlp_fc1", "mlp_fc2")):
        lora |= factors(f"{part}{theirs}{name}", i + 3.0, alpha=1)
    save(lora, tmp_path / "lora.safetensors")
    read = adapted(tmp_path / "sd.safetensors", tmp_path / "lora.safetensors")
    assert read[f"{layer}attn.in_proj_weight"].tolist() == [[x] * 3 for x in (1.0, 0.0, 0.0, 0.0, 2.0, 0.0)]
    assert [read[f"{layer}{n}.weight"][0, 0] for n in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")] == [3.0, 4.0, 5.0]
    save(lora | factors(f"{part}{theirs}self_attn_q.proj", 1.0), tmp_path / "twice.safetensors")
    with pytest.raises(InputError, match=r"self_attn_q.proj', .*self_attn_q_proj' fit the same modules"):
        adapted(tmp_path / "sd.safetensors", tmp_path / "twice.safetensors")


def test_block_weights_of_an_adapter(tmp_path):
    """As people say which blocks an adapter is to change: weights by filters on the base's names."""
    base = {f"model.diffusion_model.{b}.weight": np.full((2, 3), 8, np.float16) for b in ("input_blocks.1.1.q", "out.2")}
    base |= {"cond_stage_model.transformer.q.weight": np.full((2, 3), 8, np.float16), "betas": np.ones(2, np.float32)}
    save(base, tmp_path / "sd.safetensors")
    lora = factors("lora_unet_down_blocks_0_attentions_0_q", 1.0, alpha=1) | factors("lora_unet_conv_out", 2.0, alpha=1)
    save(lora | factors("lora_te_q", 1.0), tmp_path / "lora.safetensors")
    (tmp_path / "recipe.yml").write_text(
        "refmerge: 1\nmerge_method: task_arithmetic\nbase_model: sd.safetensors\nmodels:\n"
        "  - model: sd.safetensors+lora.safetensors\n    parameters:\n      weight:\n"
        "        - {filter: input_blocks.1., value: 1}\n        - {filter: cond_stage_model., value: 0}\n"
        "        - {value: 0.5}\n"
    )
    merged = run_recipe(tmp_path / "recipe.yml", tmp_path / "out.safetensors")
    assert merged["model.diffusion_model.input_blocks.1.1.q.weight"].tolist() == [[9.0] * 3, [8.0] * 3]
    assert merged["model.diffusion_model.out.2.weight"].tolist() == [[9.0] * 3, [8.0] * 3]
    assert merged["cond_stage_model.transformer.q.weight"].tolist() == [[8.0] * 3] * 2


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_diffusers_names_in_a_part(tmp_path, down, up):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save({f"{name}.weight": np.zeros((2, 3), np.float32)}, tmp_path / "unet.safetensors")
    lora = factors(f"unet.{name}", 1.0, down, up) | factors(f"text_encoder.{TEXT}", 1.0, down, up)
    save(lora, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"no module for 'text_encoder.*part \(--part\) says which"):
        adapted(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors")
    read = adapted(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors", part="unet")
    assert read[f"{name}.weight"].tolist() == [[2.0] * 3, [0.0] * 3]
    with pytest.raises(UsageError, match="has no part 'vae', only text_encoder, unet"):
        adapted(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors", part="vae")


def test_the_older_processors(tmp_path):
    save({f"a.{m}.weight": np.zeros((2, 3), np.float32) for m in ("to_q", "to_out.0")}, tmp_path / "unet.safetensors")
    lora = {}
    for i, module in enumerate(("to_q", "to_out")):
        x = factors("n", i + 1.0)
        for part in ("down", "up"):
            lora[f"unet.a.processor.{module}_lora.{part}.weight"] = x[f"n.lora_{part}.weight"]
    save(lora, tmp_path / "lora.safetensors")
    read = adapted(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors")
    assert [read[f"a.{m}.weight"][0, 0] for m in ("to_q", "to_out.0")] == [2, 4]


def test_diffusers_metadata_has_the_scaling(tmp_path):
    save({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "unet.safetensors")
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save(factors("unet.a", 1.0, "lora_A", "lora_B"), tmp_path / "lora.safetensors", metadata=told)
    assert adapted(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors")["a.weight"][0, 0] == 6


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ('{"unet.lora_alpha": "6"}', "alpha of 'unet.a' is '6', and no number"),
        ('{"unet.alpha_pattern": {"[": 6}}', r"pattern '\[' is no regular expression"),
        ('{"unet.alpha_pattern": [6]}', "alpha_pattern is no mapping"),
        ('{"unet.use_rslora": true}', "sets 'unet.use_rslora'"),
    ],
)
def test_metadata_that_make_no_sense(tmp_path, told, message):
    save(factors("unet.a", 1.0, "lora_A", "lora_B"), tmp_path / "l.safetensors", metadata={"lora_adapter_metadata": told})
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "l.safetensors")


def test_merged_in_their_own_layout(tmp_path):
    """1 * 1 * 2 / 2 and 2 * 3 * 2 / 2, without a base."""
    for name, value, alpha in (("a", 1.0, 1), ("b", 2.0, 3)):
        save(factors("lora_unet_x_y", value, alpha=alpha), tmp_path / f"{name}.safetensors")
    merged = lora_merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], weights=[1, 1], combination_type="cat")
    write_adapter(merged, tmp_path / "m.safetensors")
    assert sorted(open_checkpoint(tmp_path / "m.safetensors")) == [
        "lora_unet_x_y.alpha", "lora_unet_x_y.lora_down.weight", "lora_unet_x_y.lora_up.weight",
    ]  # fmt: skip
    assert read_adapter(tmp_path / "m.safetensors").delta("lora_unet_x_y").tolist() == [[7.0] * 3, [0.0] * 3]
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        write_adapter(merged, tmp_path / "m")
    save(factors("unet.x", 1.0, "lora_A", "lora_B", alpha=1), tmp_path / "d.safetensors")
    with pytest.raises(UsageError, match=r"has no scaling, and those of 'unet\.x' are not 1"):
        write_adapter(read_adapter(tmp_path / "d.safetensors"), tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_unet_x.dora_scale": np.ones((2, 1))}, "'lora_unet_x.dora_scale' are no LoRA factors"),
        ({"lora_unet_z.lora_down.weight": np.ones((2, 3))}, "without their other half: 'lora_unet_z'"),
        (factors("lora_unet_z_q", 1.0), "no module for 'lora_unet_z_q'"),
        (factors("lora_te1_x", 1.0), "fit the same modules of the base"),
    ],
)
def test_what_does_not_fit(tmp_path, more, message):
    save({"x.weight": np.zeros((2, 3), np.float32)}, tmp_path / "base.safetensors")
    save(factors("lora_unet_x", 1.0) | more, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=message):
        adapted(tmp_path / "base.safetensors", tmp_path / "lora.safetensors")


def test_pefts_file_stands_for_its_folder(tmp_path):
    lora = {f"base_model.model.x.lora_{half}.weight": np.ones(shape) for half, shape in (("A", (2, 3)), ("B", (2, 2)))}
    (tmp_path / "lora").mkdir()
    save(lora, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    assert read_adapter(tmp_path / "lora" / "adapter_model.safetensors").modules["x"].scaling == 2
    save({"x.weight": np.zeros((2, 3), np.float32)}, tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match="this is PEFT's of one"):
        adapted(tmp_path / "base.safetensors", tmp_path / "lora", part="unet")
