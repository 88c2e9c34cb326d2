"""What diffusers makes of merged pipelines: they load, run, and hold what a merge made in PyTorch holds."""

from __future__ import annotations

import json

import pytest

from refmerge.foreign import single_names
from refmerge.recipe.run import run_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

CLIP = {
    "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 6, "max_position_embeddings": 16, "projection_dim": 8,
}  # fmt: skip
LOCAL = {"local_files_only": True}
SIZES = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 2}


def tokenizer(folder):
    """A CLIP tokenizer of six tokens."""
    folder.mkdir(exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def small(path, seed, xl=False):
    """A Stable Diffusion of a few thousand parameters, or one with two text encoders; random weights, nothing fetched."""
    torch.manual_seed(seed)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2} if xl else {}
    unet = diffusers.UNet2DConditionModel(
        **SIZES, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16 if xl else 8,
        **({"projection_class_embeddings_input_dim": 20} if xl else {}), **more,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    config = transformers.CLIPTextConfig(**CLIP)
    parts |= {"text_encoder": transformers.CLIPTextModel(config), "tokenizer": tokenizer(path.parent / "tokens")}
    if xl:
        second = transformers.CLIPTextModelWithProjection(config)
        parts |= {"text_encoder_2": second, "tokenizer_2": parts["tokenizer"]}
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(path)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts, **none).save_pretrained(path)
    return {f"{part}.{name}": x for part, m in networks(parts).items() for name, x in m.state_dict().items()}


def networks(parts):
    return {part: m for part, m in parts.items() if hasattr(m, "state_dict")}


def trimmed(tau, density):
    """Of a component's task vectors the largest entries of all its tensors, so many that density of them are left."""
    flat = torch.cat([x.flatten() for x in tau.values()])
    kept = flat.abs().sort(descending=True, stable=True).values[int(density * flat.numel()) - 1]
    return {name: torch.where(x.abs() >= kept, x, torch.zeros(())) for name, x in tau.items()}


def ties(base, models, density):
    """Trim, elect a sign, average those that have it: in PyTorch, each component by itself."""
    parts = {name.partition(".")[0] for name in base}
    merged = {}
    for part in parts:
        names = [name for name in base if name.startswith(f"{part}.") and base[name].is_floating_point()]
        taus = [trimmed({n: m[n] - base[n] for n in names}, density) for m in models]
        for n in names:
            x = torch.stack([tau[n] for tau in taus])
            agree = (x.sign() == x.sum(0).sign()) & (x != 0)
            merged[n] = base[n] + (x * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


@pytest.mark.parametrize("xl", [False, True])
def test_merged_pipelines_load_and_run(tmp_path, monkeypatch, xl):
    monkeypatch.chdir(tmp_path)
    base, a, b = (small(tmp_path / name, seed, xl) for seed, name in enumerate(("base", "a", "b")))
    (tmp_path / "linear.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    (tmp_path / "ties.yml").write_text(
        "refmerge: 1\nmerge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {density: 0.3}\n"
    )
    expected = {
        "linear": {n: (a[n] + b[n]) / 2 if a[n].is_floating_point() else a[n] for n in a},
        "ties": {**base, **ties(base, [a, b], 0.3)},
    }
    cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    for method, tensors in expected.items():
        run_recipe(f"{method}.yml", method)
        for load in (cls, diffusers.DiffusionPipeline):
            loaded = load.from_pretrained(tmp_path / method, **LOCAL)
            assert type(loaded) is cls
        found = {f"{p}.{n}": x for p, m in networks(loaded.components).items() for n, x in m.state_dict().items()}
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6, msg=f"{method}: {name}")
        loaded.set_progress_bar_config(disable=True)
        drawn = loaded("a b", num_inference_steps=1, height=16, width=16, output_type="np").images
        assert drawn.shape == (1, 16, 16, 3)


def test_a_merge_of_variants_in_shards_loads(tmp_path):
    made = []
    for seed, name in enumerate("ab"):
        made.append(small(tmp_path / name, seed))
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / name, torch_dtype=torch.float16, **LOCAL)
        (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        loaded.unet.save_pretrained(tmp_path / name / "unet", variant="fp16", max_shard_size="20KB")
    assert list((tmp_path / "a" / "unet").glob("*.index.fp16.json"))
    (tmp_path / "recipe.yml").write_text("refmerge: 1\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    run_recipe(tmp_path / "recipe.yml", tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16, **LOCAL)
    a, b = ({n.partition(".")[2]: x for n, x in m.items() if n.startswith("unet.")} for m in made)
    for name, x in loaded.unet.state_dict().items():
        assert torch.equal(x, ((a[name].half().float() + b[name].half().float()) / 2).half()), name


@pytest.mark.parametrize("xl", [False, True])
def test_the_names_of_single_files_are_those_that_diffusers_converts(xl):
    """Each module of its U-Net under our name for it in a single file, and back by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20}
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4,) * (3 if xl else 4), layers_per_block=2, cross_attention_dim=4, norm_num_groups=2,
        attention_head_dim=2, down_block_types=(down[:1] + down[1:] * 2) if xl else (down[1:] * 3 + down[:1]),
        up_block_types=(up[:1] * 2 + up[1:]) if xl else (up[1:] + up[:1] * 3), **(more if xl else {}),
    )  # fmt: skip
    weights, single = unet.state_dict(), {}
    for name, x in weights.items():
        module, _, leaf = name.rpartition(".")
        beside = f"{module.partition('.upsamplers')[0]}.attentions.0.proj_in.weight"  # where an upsampler is after attention
        place = single_names(module)[-1 if beside in weights else 0]
        single[f"model.diffusion_model.{place}.{leaf}"] = x
    converted = convert_ldm_unet_checkpoint(single, dict(unet.config))
    assert converted.keys() == weights.keys() and all(converted[name] is x for name, x in weights.items())
