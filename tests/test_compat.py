"""Steps of other tools' entries that the vectors do not reach."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refmerge import UsageError, call, merge
from refmerge.compat.fusion_bench._steps import float32_sum
from refmerge.numeric import divided

SIZES = [*range(70), 127, 128, 129, 511, 512, 513, 4096, 4097, 20_000]


@pytest.mark.parametrize("size", SIZES)
def test_float32_sum_adds_as_torch_does(torch, size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
        assert float(float32_sum(x)) == torch.sum(torch.from_numpy(x)).item()
    finally:
        torch.set_num_threads(threads)


def test_float32_sum_is_a_sum():
    assert float32_sum(np.ones((300, 700), np.float32)) == 210_000
    assert float32_sum(np.zeros(0)) == 0
    assert float32_sum(np.full(3, 2.0)) == 6 and float32_sum(np.float64(2.5)) == 2.5


def test_divided_rounds_once(foreign):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for c in (3, 0.7, 1e-3):
        assert np.array_equal(foreign.host(divided(foreign.array(x), c)), x / np.float32(c))
        assert np.array_equal(divided(x, c), x / np.float32(c))


def test_fusion_bench_thins_the_weights_of_linear_layers():
    names = {"fc.weight": (2, 3), "fc.bias": (3,), "tok_embeddings.weight": (2, 3), "conv.weight": (2, 1, 3), "proj": (2, 3)}
    base = {name: np.zeros(shape) for name, shape in names.items()}
    model = {name: np.ones(shape) for name, shape in names.items()}
    thinned = merge([model], "fusion_bench:dare", base=base, sparsity_ratio=0.9, only_on_linear_weights=True)
    assert [name for name, x in thinned.items() if not np.array_equal(x, model[name])] == ["fc.weight"]
    more = merge([model], "fusion_bench:dare", base=base, sparsity_ratio=0.9, only_on_linear_weights=True, embeddings=())
    assert not np.array_equal(more["tok_embeddings.weight"], model["tok_embeddings.weight"])


@pytest.mark.parametrize("entry", ["fusion_bench:ties", "fusion_bench:dare"])
def test_fusion_bench_removes_no_keys(entry):
    with pytest.raises(UsageError, match=f"{entry}: remove_keys is not supported"):
        call(entry, [[1.0, 2.0]], [0.0, 0.0], remove_keys=["transformer.encoder.embed_tokens.weight"])


def test_sd_mecha_takes_rows_of_the_last_axis():
    """Each row by itself, whatever the axes before it."""
    draw = np.random.default_rng(0)
    models = [draw.standard_normal((3, 4, 5)) for _ in range(3)]
    base = draw.standard_normal((3, 4, 5))
    whole = call("sd_mecha:model_stock", models, base)
    rows = [call("sd_mecha:model_stock", [m[i, j] for m in models], base[i, j]) for i in range(3) for j in range(4)]
    assert np.array_equal(whole.reshape(12, 5), np.stack(rows))
    assert call("sd_mecha:model_stock", [np.float64(3.0), np.float64(5.0)], np.float64(1.0)).tolist() == 4.0


def test_peft_takes_differences():
    """A base is not looked at, and the density of 1 and more prunes nothing."""
    given = [[4.0, -1.0], [1.0, 2.0]]
    for density in (1.0, 1.5):
        params = {"weights": [1.0, 0.5], "density": density}
        assert call("peft:magnitude_prune", given, [7.0, 7.0], **params).tolist() == [4.5, 0.0]
        assert call("peft:dare_linear", given, None, **params).tolist() == [4.5, 0.0]
        assert call("peft:ties", given, None, **params).tolist() == call("peft:dare_ties", given, None, **params).tolist()


RESCALED = {"float16": 5.83203125, "bfloat16": 5.8125, "float32": 5.8333330154418945}


@pytest.mark.parametrize("dtype", RESCALED)
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_mergekit_rescales_dropped_entries_in_float32(method, dtype):
    """(5, 1, 1) without its last entry, times 7/6: in float32 that is 5.833333, and in float16 rounded once; bfloat16 alone
    has 7/6 as 1.1640625, and 5 times that as 5.8125."""
    zero, model = np.zeros(3, dtype), np.array([5, 1, 1], dtype)
    stats = [{"x.mask": np.array([1, 1, 0], np.uint8)}]
    params = {"weight": 1.0, "density": 0.5, "rescale": True}
    merged = merge([{"x": model}], f"mergekit:{method}", base={"x": zero}, stats=stats, arithmetic="native", **params)["x"]
    assert merged.dtype == zero.dtype
    assert merged.astype(np.float64).tolist() == [RESCALED[dtype], *np.array([7 / 6, 0], dtype).tolist()]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_mergekit_draws_nothing_at_density_0(method):
    given = [[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0]
    masks = [{}, {"mask": np.array([1, 0])}]
    merged = call(f"mergekit:{method}", *given, weight=1.0, density=[0.0, 0.5], rescale=False, stats=masks)
    assert merged.tolist() == [3.0, 1.0]
    with pytest.raises(UsageError, match=r"mergekit: density -0\.5 is below 0"):
        call(f"mergekit:{method}", *given, weight=1.0, density=[0.5, -0.5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mergekit_linear_adds_products_before_they_are_rounded(dtype):
    """A third is (1 + 2^-25) / 3 in float32, and 3072 of them 1024 + 2^-15, which rounds to 1024: of -1024 + 1024 nothing
    would be left."""
    given = [{"x": np.array([-1024.0, 1.0], dtype)}, {"x": np.array([3072.0, math.inf], dtype)}]
    options = {"arithmetic": "native", "nonfinite": "propagate"}
    merged = merge(given, "mergekit:linear", weight=[1.0, 1 / 3], normalize=False, **options)["x"]
    assert merged.dtype == dtype and merged.astype(np.float64).tolist() == [2.0**-15, math.inf]


@pytest.mark.parametrize("filter_wise", [True, False])
def test_mergekit_model_stock_rounds_no_squares(filter_wise):
    """Twice (17/16, 17/16, 17/16) in bfloat16. The products, 289/256, round to 9/8, so that the dot is 27/8; the norm is the
    root of 867/256, 1.8403, and rounds to 59/32, its square to 109/32. The cosine 108/109 rounds to 127/128, the ratio to
    255/256, and that of 17/16 to 135/128. Were squares rounded too, cosine and ratio would be 1."""
    zero, model = {"x": np.zeros((1, 3), "bfloat16")}, {"x": np.full((1, 3), 17 / 16, "bfloat16")}
    merged = merge([model, model], "mergekit:model_stock", base=zero, filter_wise=filter_wise, arithmetic="native")["x"]
    assert merged.astype(np.float64).tolist() == [[135 / 128] * 3]
