"""What people's checkpoints look like: 8-bit weights with scales, and models of the Hub in its cache.

Expected values are computed here from the formats' definitions, entry by entry.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import refmerge
from refmerge.api import prepare
from refmerge.checkpoint import hub, open_checkpoint, save
from refmerge.checkpoint.scaled import as_values
from refmerge.errors import InputError, UsageError
from refmerge.recipe.run import run_recipe

posix = pytest.mark.skipif(os.name != "posix", reason="needs links")
E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)


def eight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 30).astype(E4M3)


def spread(scale: np.ndarray, shape: tuple[int, ...], down: int, across: int) -> np.ndarray:
    """The scale of each entry, by its place."""
    out = np.empty(shape, np.float32)
    for at in np.ndindex(shape):
        out[at] = scale[(*at[:-2], at[-2] // down, at[-1] // across)]
    return out


def write(folder: Path, arrays: dict[str, np.ndarray], config: dict | None = None) -> Path:
    save(arrays, folder, extra_files={"config.json": json.dumps(config or {}).encode()})
    return folder


# --- 8-bit floats with scales --------------------------------------------------------------------------------------------

BLOCKS = {
    "blocks of 128": ((300, 260), (3, 3), (128, 128), None),
    "blocks as config.json says": ((30, 26), (4, 3), (8, 10), [8, 10]),
    "blocks that divide the shape": ((30, 26), (3, 2), (10, 13), None),
    "a matrix for each expert": ((2, 16, 12), (2, 2, 3), (8, 4), [8, 4]),
    "one row": ((1, 300), (1, 3), (1, 128), None),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_block_scales(tmp_path, case):
    shape, scales, (down, across), said = BLOCKS[case]
    weight, scale = eight(shape), np.random.default_rng(1).random(scales).astype(np.float32)
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": said}}
    path = write(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale, "norm": np.ones(3, BF16)}, config)
    expected = weight.astype(np.float32) * spread(scale, shape, down, across)
    with as_values(open_checkpoint(path)) as values:
        assert list(values) == ["norm", "w.weight"] and "quantization_config" not in values.config
        assert "1 tensors in 8 bits with scales: read in float32, kept in bfloat16" in values.note
        assert np.array_equal(values["w.weight"], expected) and values["w.weight"].dtype == np.float32
        size = expected.size
        for start, stop in [
            (0, 1),
            (3, 3),
            (size - 1, size),
            (5, size - 7),
            (shape[-1] - 1, 2 * shape[-1] + 1 if size > 400 else size),
        ]:
            out = np.empty(4 * (stop - start), np.uint8)
            values.read("w.weight", start, stop, out)
            assert np.array_equal(out.view(np.float32), expected.reshape(-1)[start:stop])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weight_scale", ()), ("weight_scale", (1,)), ("weight_scale", (6,)), ("weight_scale", (6, 1)), ("scale_weight", ())],
)
@pytest.mark.parametrize("kind", [np.float32, BF16])
def test_scales_of_tensors_and_rows(tmp_path, name, shape, kind):
    weight, scale = eight((6, 5)), np.asarray(np.random.default_rng(1).random(shape), np.float32).astype(kind)
    path = write(tmp_path / "m", {"a.weight": weight, f"a.{name}": scale, "b.weight": weight})
    factor = scale.astype(np.float32)
    expected = weight.astype(np.float32) * (factor.reshape(-1, 1) if scale.size == 6 else factor.reshape(()))
    with as_values(open_checkpoint(path)) as values:
        assert np.array_equal(values["a.weight"], expected)
        assert values["b.weight"].dtype == E4M3 and sorted(values) == ["a.weight", "b.weight"]


def test_a_merge_of_what_is_scaled_is_as_of_its_values(tmp_path):
    """Rounded once, at the end, to the dtype of the config; and the config speaks of 8 bits no more."""
    config = {"torch_dtype": "bfloat16", "hidden_size": 4, "quantization_config": {"quant_method": "fp8"}}
    scaled, plain = [], []
    for k in range(2):
        weight, scale = eight((200, 150), k), np.random.default_rng(k).random((2, 2)).astype(np.float32)
        arrays = {"w.weight": weight, "w.weight_scale_inv": scale, "norm": np.full(3, k, BF16)}
        scaled.append(write(tmp_path / f"s{k}", arrays, config))
        values = weight.astype(np.float32) * spread(scale, weight.shape, 128, 128)
        plain.append(write(tmp_path / f"p{k}", {"w.weight": values, "norm": np.full(3, k, BF16)}))
    expected = refmerge.merge(plain, "linear", out_dtype="bfloat16")
    for threads in (1, 2):
        merged = refmerge.merge(scaled, "linear", out=tmp_path / f"out{threads}", threads=threads)
        assert sorted(merged) == ["norm", "w.weight"]
        for name, array in merged.items():
            assert array.dtype == BF16 and array.tobytes() == expected[name].tobytes()
        assert merged.config == {"torch_dtype": "bfloat16", "hidden_size": 4}
    mixed = refmerge.merge([scaled[0], plain[0]], "linear")
    assert mixed["w.weight"].dtype == np.float32  # what holds the values of both
    with pytest.raises(UsageError, match="8 bits with scales"):
        refmerge.merge(scaled, "linear", arithmetic="native")


def test_a_scaled_merge_is_resumable(tmp_path):
    arrays = {"w.weight": eight((4, 4)), "w.weight_scale": np.float32(2)}
    paths = [write(tmp_path / str(k), arrays) for k in range(2)]
    with refmerge.merge(paths, "linear", out=tmp_path / "out", resume=True) as merged:
        assert np.array_equal(merged["w.weight"].astype(np.float32), (2 * eight((4, 4)).astype(np.float32)).astype(BF16))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"w_scale_inv": np.ones((3, 3), np.float32)}, "fits no blocks"),
        ({"w_scale_inv": np.ones((7,), np.float32)}, "fits no blocks"),
        ({"w_scale": np.ones((0,), np.float32)}, "fits no blocks"),
        ({"w_scale": np.ones((), np.int32)}, "dtype I32"),
        ({"w_scale": np.ones((), E4M3)}, "dtype F8_E4M3"),
        ({"w_scale": np.float32(1), "w_scale_inv": np.float32(1)}, "several scales"),
        ({"w.qweight": np.ones(3, np.int32)}, "GPTQ or AWQ"),
        ({"w.absmax": np.ones(3, np.uint8)}, "bitsandbytes"),
        ({"e_blocks": np.ones(3, np.uint8), "e_scales": np.ones(3, np.uint8)}, "MXFP4"),
        ({"w.weight_packed": np.ones(3, np.int32)}, "compressed-tensors"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_and_what_is_packed(tmp_path, arrays, said):
    path = write(tmp_path / "m", {"w": eight((10, 8)), **arrays})
    with pytest.raises(InputError, match=said):
        refmerge.merge([path, path], "linear")
    open_checkpoint(path).close()  # to be inspected


def test_scales_of_activations_are_left_out_with_a_word(tmp_path):
    arrays = {"w.weight": eight((4, 4)), "w.weight_scale": np.float32(2), "w.input_scale": np.float32(3)}
    path = write(tmp_path / "m", arrays)
    with pytest.warns(UserWarning, match=r"1 scales of activations \('w.input_scale'"):
        assert sorted(prepare([path], "linear").specs) == ["w.weight"]


# --- The Hub -------------------------------------------------------------------------------------------------------------

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, with two revisions of a model and the config alone of another."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "hf" / "hub" / "models--org--name"
    for commit, value in ((COMMIT, 1.0), (OTHER, 3.0)):
        save({"w": np.full(4, value, np.float32)}, tmp_path / "made", extra_files={"config.json": b"{}"}, overwrite=True)
        snapshot = root / "snapshots" / commit
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True)
        for path in (tmp_path / "made").iterdir():
            path.rename(root / "blobs" / f"{commit}{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/{commit}{path.name}")
    (root / "refs" / "pr").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "refs" / "pr" / "1").write_text(OTHER)
    bare = tmp_path / "hf" / "hub" / "models--org--bare"
    (bare / "refs").mkdir(parents=True)
    (bare / "refs" / "main").write_text(COMMIT)
    (bare / "snapshots" / COMMIT).mkdir(parents=True)
    (bare / "snapshots" / COMMIT / "config.json").write_text("{}")
    return tmp_path


@posix
@pytest.mark.parametrize(
    ("text", "value"),
    [("org/name", 1), ("org/name@main", 1), ("org/name@pr/1", 3), (f"org/name@{OTHER}", 3), (f"org/name@{OTHER[:8]}", 3)],
)
@pytest.mark.parametrize("offline", ["", "1"])
def test_models_of_the_cache(cached, monkeypatch, text, value, offline):
    """By branch, by commit, and by a commit's beginning; the same without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    merged = refmerge.merge([text, "org/name"], "linear")
    assert merged["w"].tolist() == [(value + 1) / 2] * 4


@posix
@pytest.mark.parametrize("native", [True, False])
def test_recipes_of_the_cache(cached, native):
    (cached / "sub").mkdir()
    text = "merge_method: linear\nmodels:\n- model: org/name@pr/1\n- model: org/name\n"
    text += "refmerge: 1\n" if native else "parameters: {weight: 1}\n"
    (cached / "sub" / "recipe.yml").write_text(text)
    with run_recipe(cached / "sub" / "recipe.yml", cached / "out") as merged:
        assert merged["w"].tolist() == [2.0] * 4


@posix
@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("org/other", InputError, "no such model in the Hub's cache .*--download"),
        ("org/bare", InputError, "--download"),
        ("org/name@v2", InputError, "--download"),
        ("org/name@..", UsageError, "no revision"),
        ("org/name@", UsageError, "no revision"),
        ("hf@main", UsageError, "'hf' is a path"),
        ("../name", InputError, "no such file"),
        ("a/b/c", InputError, "no such file"),
        ("name", InputError, "no such file"),
        ("org/x.safetensors", InputError, "no such file"),
    ],
)
def test_models_that_are_nowhere(cached, text, error, said):
    with pytest.raises(error, match=said):
        refmerge.merge([text, text], "linear")


@posix
def test_what_exists_is_a_path(cached):
    save({"w": np.full(4, 7, np.float32)}, cached / "org" / "name")
    save({"w": np.full(4, 9, np.float32)}, cached / "org" / "name@main")
    merged = refmerge.merge(["org/name", "org/name@main"], "linear")
    assert merged["w"].tolist() == [8.0] * 4


@posix
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch):
    """By its own constants, where it is installed."""
    import subprocess

    pytest.importorskip("huggingface_hub")
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    for given in ({}, {"HF_HOME": "/x"}, {"HF_HUB_CACHE": "/y", "HF_HOME": "/x"}, {"XDG_CACHE_HOME": "/z"}):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert str(hub.cache()) == told


@posix
def test_downloads_only_if_asked_and_never_offline(cached, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        if name == "org/gone":
            raise OSError("404 \x1b[31m not found\nmore")
        return str(cached / "hf" / "hub" / "models--org--name" / "snapshots" / OTHER)

    with pytest.raises(UsageError, match=r"refmerge\[hub\]"):
        hub.find("org/other", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert hub.find("org/name", download=True).name == COMMIT and not asked  # it is there
    assert hub.find("org/other@v1", download=True).name == OTHER and asked == [("org/other", "v1")]
    with pytest.raises(InputError, match=r"cannot be fetched: '404 \\x1b") as caught:
        hub.find("org/gone", download=True)
    assert "\x1b" not in str(caught.value)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
                hub.find("org/other", download=True)


# --- Images --------------------------------------------------------------------------------------------------------------


def component(folder: Path, value: float, **options: object) -> Path:
    arrays = {n: np.full((4, 3), value, np.float32) for n in ("down.weight", "up.weight")}
    config = {"config.json": b'{"_class_name": "UNet2DConditionModel"}'}
    save(arrays, folder, extra_files=config, weights="diffusion_pytorch_model.safetensors", **options)
    return folder


@pytest.mark.parametrize("size", ["5GB", 50])
def test_components_of_diffusers_keep_their_names(tmp_path, size):
    """A lone file or shards with an index, under the names that diffusers looks for."""
    paths = [component(tmp_path / str(k) / "unet", k, max_shard_size=size) for k in (1, 3)]
    with refmerge.merge(paths, "linear", out=tmp_path / "out", max_shard_size=size) as merged:
        assert merged["up.weight"].tolist() == [[2.0] * 3] * 4
    names = sorted(p.name for p in paths[0].iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert names[1] == f"diffusion_pytorch_model{'-00001-of-00002' if size == 50 else ''}.safetensors"


def test_several_readings_of_a_component(tmp_path):
    both = component(tmp_path / "both", 1, max_shard_size=50)
    (both / "x.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="2 indexes"):
        open_checkpoint(both)
    (both / "x.safetensors.index.json").unlink()
    (both / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"both diffusion_pytorch_model\.safetensors and diffusion_"):
        open_checkpoint(both)


def test_block_weights_of_a_single_file(tmp_path):
    """As image models are merged: one weight for each block, by filters on the names of one file's tensors."""
    blocks = ["input_blocks.1.0", "input_blocks.11.0", "middle_block.0", "output_blocks.2.1"]
    names = [f"model.diffusion_model.{b}.weight" for b in blocks] + ["first_stage_model.x", "model_ema.num_updates"]
    for k in (1, 2):
        arrays = {n: np.full((2, 2), k, np.float16) for n in names[:-1]} | {names[-1]: np.int32(7)}
        save(arrays, tmp_path / f"{k}.safetensors")
    (tmp_path / "recipe.yml").write_text(
        "refmerge: 1\nmerge_method: task_arithmetic\nbase_model: 1.safetensors\nmodels:\n"
        "  - model: 2.safetensors\n    parameters:\n      weight:\n"
        "        - {filter: input_blocks.1., value: 0.25}\n        - {filter: input_blocks., value: 0.5}\n"
        "        - {filter: middle_block., value: 0.75}\n        - {filter: first_stage_model., value: 0}\n"
        "        - {value: 1}\n"
    )
    with run_recipe(tmp_path / "recipe.yml", tmp_path / "out.safetensors") as merged:
        assert [float(merged[n].flat[0]) for n in names] == [1.25, 1.5, 1.75, 2.0, 1.0, 7.0]
        assert merged[names[0]].dtype == np.float16


# --- Pickles and GGUF ----------------------------------------------------------------------------------------------------


def pickled(folder: Path, value: float, torch) -> dict:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return {
        "w": torch.full((3, 4), value, dtype=torch.bfloat16),
        "t": torch.arange(6, dtype=torch.float32).reshape(2, 3).T * value,  # of other strides
        "n": torch.tensor(5),
    }


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "x.ckpt", "shards", "old format"])
def test_pickled_models_where_that_is_allowed(tmp_path, torch, layout):
    for k in (1, 3):
        folder = tmp_path / str(k)
        weights = pickled(folder, k, torch)
        if layout == "shards":
            torch.save({"w": weights["w"]}, folder / "pytorch_model-00001.bin")
            torch.save({n: weights[n] for n in "tn"}, folder / "pytorch_model-00002.bin")
            index = {"weight_map": {n: f"pytorch_model-0000{1 if n == 'w' else 2}.bin" for n in weights}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        elif layout == "old format":
            torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        else:
            torch.save({"state_dict": weights, "epoch": 3} if layout == "x.ckpt" else weights, folder / layout)
    paths = [tmp_path / "1", tmp_path / "3"]
    with pytest.raises(InputError, match="--allow-pickle"):
        refmerge.merge(paths, "linear")
    merged = refmerge.merge(paths, "linear", out=tmp_path / "out", allow_pickle=True, resume=True)
    assert merged["w"].dtype == BF16 and merged["w"].astype(float).tolist() == [[2.0] * 4] * 3
    assert merged["t"].tolist() == [[0, 6], [2, 8], [4, 10]] and merged["n"] == 5


def test_what_is_no_weights_is_refused(tmp_path, torch):
    from tests.test_reliability import Canary

    for name, content in (("canary", None), ("list", [1]), ("number", {"a": 3}), ("complex", {"a": torch.ones(2) * 1j})):
        path = tmp_path / f"{name}.pt"
        torch.save(Canary(tmp_path / "loaded") if content is None else content, path)
        with pytest.raises(InputError, match=f"{name}.pt"):
            open_checkpoint(path, allow_pickle=True)
    assert not (tmp_path / "loaded").exists()
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "out.bin")
    for shard in ("../out.bin", str(tmp_path / "out.bin"), "gone.bin", "x.safetensors"):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(InputError):
            open_checkpoint(folder, allow_pickle=True)


def test_gguf_files_are_read(tmp_path):
    """Values of quantised tensors by hand from the format: blocks of 32, half-precision scale, signed bytes."""
    gguf = pytest.importorskip("gguf")
    draw, paths, values = np.random.default_rng(0), [], []
    for k in range(2):
        paths.append(tmp_path / f"{k}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "llama")
        plain = draw.standard_normal((6, 5)).astype(np.float32)
        scale, codes = draw.random((4, 2)).astype(np.float16), draw.integers(-127, 128, (4, 2, 32)).astype(np.int8)
        packed = np.concatenate([scale[..., None].view(np.uint8), codes.view(np.uint8)], axis=-1).reshape(4, 68)
        writer.add_tensor("token_embd.weight", plain)
        writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        values.append((plain, (scale.astype(np.float32)[..., None] * codes).reshape(4, 64)))
    with open_checkpoint(paths[0]) as checkpoint:
        assert sorted(checkpoint) == ["blk.0.attn_q.weight", "token_embd.weight"]
        assert np.array_equal(checkpoint["token_embd.weight"], values[0][0])
        assert np.array_equal(checkpoint["blk.0.attn_q.weight"], values[0][1])
        out = np.empty(4 * 100, np.uint8)
        checkpoint.read("blk.0.attn_q.weight", 50, 150, out)
        assert np.array_equal(out.view(np.float32), values[0][1].reshape(-1)[50:150])
    merged = refmerge.merge(paths, "linear", out=tmp_path / "out.safetensors")
    half = np.float32(0.5)
    expected = (half * values[0][1] + half * values[1][1]).astype(BF16)
    assert merged["blk.0.attn_q.weight"].tobytes() == expected.tobytes()
    for damage in (b"", b"GGUF", paths[0].read_bytes()[:60], b"\0" * 100):
        (tmp_path / "bad.gguf").write_bytes(damage)
        with pytest.raises(InputError, match=r"bad\.gguf"):
            open_checkpoint(tmp_path / "bad.gguf")


def test_extras_that_are_missing_are_named(tmp_path, monkeypatch):
    for name in ("gguf", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("x.gguf", "x.pt"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UsageError, match=r"refmerge\[(gguf|torch)\]"):
            open_checkpoint(tmp_path / name, allow_pickle=True)
