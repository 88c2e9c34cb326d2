"""Statistics gathered from networks: by hand, against torch sample by sample, parts of the data, and the command line."""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import refmerge
from refmerge import InputError, UsageError
from refmerge.cli import main
from refmerge.collect import Batch, as_batch, batches_of, collect, forward_of, option
from refmerge.nets import gpt2, mlp, resnet, vit
from refmerge.stats import Statistics

# One layer, two classes: z = W x, p = softmax(z). At W = 0 p is (1/2, 1/2) and the gradient of log p_c by z is
# +-(1/2, -1/2).
ZERO = {"layers.0.weight": np.zeros((2, 2)), "layers.0.bias": np.zeros(2)}
X = np.array([[1.0, 2.0], [3.0, 0.0]])


def test_gram_moments_and_outputs_by_hand():
    """W = (1 0; 0 2), b = (0, 1): the outputs of (1, 2) and (3, 0) are (1, 5) and (3, 1)."""
    params = {"layers.0.weight": np.diag([1.0, 2.0]), "layers.0.bias": np.array([0.0, 1.0])}
    s = collect(mlp.forward, params, [Batch(X[:1]), Batch(X[1:])], ["outputs"])
    assert {name.rpartition(".")[2]: x.tolist() for name, x in s.items()} == {
        "gram": [[5, 1], [1, 2]], "mean": [2, 1], "square": [5, 2],
        "output_gram": [[5, 4], [4, 13]], "output_mean": [2, 3], "cross_gram": [[5, 1], [4, 5]],
    }  # fmt: skip
    assert s.covariance("layers.0").tolist() == [[1, -1], [-1, 1]]
    assert s.covariance("layers.0", "outputs").tolist() == [[1, -2], [-2, 4]]
    assert s.covariance("layers.0", "both").tolist() == [[1, -1], [-2, 2]]
    assert {s.count(name) for name in s} == {2}


def test_fisher_and_kfac_by_hand(torch):
    """With g = +-(1/2, -1/2): g g^T is (1 -1; -1 1) / 4, and the squares of g x^T are x x / 4."""
    s = collect(mlp.forward, ZERO, [Batch(X)], ["fisher", "kfac"])
    assert s["layers.0.weight.fisher"].tolist() == [[1.25, 0.5], [1.25, 0.5]]
    assert s["layers.0.bias.fisher"].tolist() == [0.25, 0.25]
    assert np.allclose(s["layers.0.gradient_gram"], [[0.25, -0.25], [-0.25, 0.25]], rtol=1e-15)
    assert s["layers.0.gram"].tolist() == [[5, 1], [1, 2]]
    assert s.facts == {"likelihood": "exact"}


def test_fisher_of_given_labels_by_hand(torch):
    """W = (ln 3, 0; 0, 0): of (1, 0) p is (3/4, 1/4), and the gradient of the first class (1/4, -1/4)."""
    params = {"layers.0.weight": np.array([[np.log(3.0), 0.0], [0.0, 0.0]])}
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    s = collect(mlp.forward, params, [Batch(x, np.array([0, -1]))], ["fisher"], likelihood="given")
    assert np.allclose(s["layers.0.weight.fisher"], [[1 / 32, 0], [1 / 32, 0]], rtol=1e-12)
    exact = collect(mlp.forward, params, [Batch(x[:1])], ["fisher"])
    assert np.allclose(exact["layers.0.weight.fisher"][0, 0], 3 / 4 / 16 + 1 / 4 * 9 / 16, rtol=1e-12)


# --- Every parameter of every network, against torch sample by sample --------------------------------------------------

draw = np.random.default_rng(0)
TOKENS = draw.integers(0, 11, (3, 5))
NETS = {
    "mlp": (mlp.init(draw, [4, 5, 3]), partial(mlp.forward, activation=np.tanh), draw.standard_normal((3, 4))),
    "gpt2": (gpt2.init(draw, 6, 1), partial(gpt2.forward, heads=2), TOKENS),
    "gpt2, untied": (gpt2.init(draw, 6, 1, tied=False), partial(gpt2.forward, heads=2), TOKENS),
    "vit": (vit.init(draw, 6, 1, outputs=2), partial(vit.forward, heads=2), draw.standard_normal((3, 3, 8, 8))),
    "resnet": (resnet.init(draw, (2, 3), 1, outputs=2), resnet.forward, draw.standard_normal((3, 3, 4, 4))),
}


def by_torch(torch, net, params, x, likelihood):
    """The mean over samples of squared gradients, from a backward pass for each sample and class."""
    given = {
        n: torch.from_numpy(v).requires_grad_(not n.endswith(("running_mean", "running_var"))) for n, v in params.items()
    }
    found = {n: np.zeros(v.shape) for n, v in params.items() if given[n].requires_grad}
    for i in range(len(x)):
        logs = torch.log_softmax(net(given, torch.from_numpy(x[i : i + 1])), -1)[0]
        if likelihood == "exact":
            terms = [(float(value.exp().detach()), value) for value in logs]
        else:
            terms = [(1.0, sum(logs[t, x[i, t + 1]] for t in range(x.shape[1] - 1)))]
        for p, value in terms:
            slopes = torch.autograd.grad(value, [given[n] for n in found], retain_graph=True, allow_unused=True)
            for n, g in zip(found, slopes):
                found[n] += 0 if g is None else p * g.numpy() ** 2 / len(x)
    return found


@pytest.mark.parametrize("name", NETS)
def test_fisher_of_every_parameter_is_torchs(name, torch):
    params, net, x = NETS[name]
    if name == "mlp":
        net = partial(mlp.forward, activation=torch.tanh)
    likelihood = "next" if x.dtype.kind == "i" else "exact"
    s = collect(net, params, [Batch(x[:2]), Batch(x[2:])], ["fisher"], likelihood=likelihood)
    expected = by_torch(torch, net, params, x, likelihood)
    assert set(s) == {f"{n}.fisher" for n in expected}
    for n, f in expected.items():
        np.testing.assert_allclose(s[f"{n}.fisher"], f, rtol=1e-9, atol=1e-14 * max(1, f.max()), err_msg=n)
        assert s.count(f"{n}.fisher") == 3


def test_a_weight_that_is_read_elsewhere_too(torch):
    """By taps its gradient would lack a part: it is taken as a whole."""
    from refmerge.nets.layers import Layers

    def net(p, x, taps=None):
        return Layers(p, taps).linear("a", x) + x**2 @ p["a.weight"].T

    params = {"a.weight": draw.standard_normal((3, 4)), "a.bias": draw.standard_normal(3)}
    x = draw.standard_normal((4, 4))
    s = collect(net, params, [Batch(x)], ["fisher"])
    for n, f in by_torch(torch, net, params, x, "exact").items():
        np.testing.assert_allclose(s[f"{n}.fisher"], f, rtol=1e-10)


def test_a_layer_that_runs_twice(torch):
    """A sample's gradient is the sum of both, and both read rows of the Gram matrix."""
    from refmerge.nets.layers import Layers

    def net(p, x, taps=None):
        layers = Layers(p, taps)
        return layers.linear("a", layers.linear("a", x))

    params, x = {"a.weight": draw.standard_normal((3, 3))}, draw.standard_normal((4, 3))
    s = collect(net, params, [Batch(x)], ["fisher", "kfac"])
    for n, f in by_torch(torch, net, params, x, "exact").items():
        np.testing.assert_allclose(s[f"{n}.fisher"], f, rtol=1e-10)
    y = x @ params["a.weight"].T
    assert s.count("a.gram") == s.count("a.gradient_gram") == 8
    np.testing.assert_allclose(s["a.gram"], (x.T @ x + y.T @ y) / 8, rtol=1e-12)


def test_a_layer_that_not_every_batch_runs(torch):
    """Where no sample goes through it, its gradient is 0 and counts."""
    from refmerge.nets.layers import Layers

    def net(p, x, taps=None):
        layers = Layers(p, taps)
        return layers.linear("a", x) + (layers.linear("b", x) if x.shape[0] == 2 else 0)

    params, x = {n: draw.standard_normal((3, 3)) for n in ("a.weight", "b.weight")}, draw.standard_normal((3, 3))
    s = collect(net, params, [Batch(x[:2]), Batch(x[2:])], ["fisher"])
    both = by_torch(torch, lambda p, x: x @ (p["a.weight"] + p["b.weight"]).T, params, x[:2], "exact")
    np.testing.assert_allclose(s["b.weight.fisher"], 2 / 3 * both["b.weight"], rtol=1e-12)
    assert s.count("b.weight.fisher") == 3


# --- Padding, draws, parts ---------------------------------------------------------------------------------------------


def test_padding_counts_nowhere():
    params, net, x = NETS["gpt2"]
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    masked = collect(net, params, [Batch(x, mask=mask)], ["moments"])
    each = Statistics()
    for row, count in zip(x, (5, 3, 1)):  # later places change nothing of earlier ones
        each.add(collect(net, params, [Batch(row[None, :count])], ["moments"]))
    assert set(masked) == set(each)
    for n in each:
        np.testing.assert_allclose(masked[n], each[n], rtol=1e-12)
        assert masked.count(n) == 9


def test_padding_has_no_gradients(torch):
    params, net, x = NETS["gpt2"]
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    masked = collect(net, params, [Batch(x, mask=mask)], ["kfac", "fisher"], likelihood="next")
    each = Statistics({"likelihood": "next"})
    for row, count in zip(x, (5, 3, 2)):
        each.add(collect(net, params, [Batch(row[None, :count])], ["kfac", "fisher"], likelihood="next"))
    for n in each:
        np.testing.assert_allclose(masked[n], each[n], rtol=1e-9, atol=1e-14)


def test_a_mask_that_fits_no_layer():
    with pytest.raises(InputError, match=r"layer 'layers.0' reads rows of shape \[2, 2\].*mask of \[3\] places.*--layers"):
        collect(mlp.forward, ZERO, [Batch(X, mask=np.ones(3))])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["exact", "sampled"]))
def test_parts_and_batches_add_up(seed, cut, likelihood):
    """However the samples are cut, also where labels are drawn."""
    pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    params, x = mlp.init(rng, [3, 4, 3]), rng.standard_normal((5, 3))
    run = partial(collect, mlp.forward, params, kinds=["kfac", "fisher"], likelihood=likelihood, seed=seed)
    whole = run([Batch(x)])
    one = run([Batch(x[:cut])])
    one.add(run([Batch(row[None]) for row in x[cut:]], first=cut))
    for n in whole:
        np.testing.assert_allclose(one[n], whole[n], rtol=1e-12, atol=1e-15)
        assert one.count(n) == whole.count(n)


def test_drawn_labels_come_as_often_as_the_model_says(torch):
    """p = (3/4, 1/4): the squared slope of the bias is 1/16 or 9/16, 3/16 in the mean."""
    params = {"layers.0.weight": np.zeros((2, 1)), "layers.0.bias": np.array([np.log(3.0), 0.0])}
    s = collect(mlp.forward, params, [Batch(np.ones((2000, 1)))], ["fisher"], likelihood="sampled")
    assert s["layers.0.bias.fisher"][0] == pytest.approx(3 / 16, rel=0.1)
    assert s.facts == {"likelihood": "sampled", "seed": "0"}


def test_statistics_of_another_kind_are_not_added(torch):
    one, other = (
        collect(mlp.forward, ZERO, [Batch(X, np.array([0, 1]))], ["fisher"], likelihood=k) for k in ("exact", "given")
    )
    with pytest.raises(InputError, match="do not add up: likelihood is 'exact' and 'given'"):
        one.add(other)
    wide = Statistics()
    wide.gram("l", [[1.0, 2.0]])
    narrow = Statistics()
    narrow.gram("l", [[1.0]])
    narrow.gram("k", [[1.0]])
    with pytest.raises(InputError, match=r"'l.gram' has two shapes, \[2, 2\] and \[1, 1\]"):
        wide.add(narrow)
    assert "k.gram" not in wide


def test_only_some_layers(torch):
    params, net, x = NETS["gpt2"]
    assert set(collect(net, params, [Batch(x)], layers="*.mlp.*")) == {
        f"transformer.h.0.mlp.{n}.gram" for n in ("c_fc", "c_proj")
    }
    s = collect(net, params, [Batch(x)], ["fisher"], likelihood="next", layers="*wte*")
    assert set(s) == {"transformer.wte.weight.fisher"}


# --- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kinds": ["grams"]}, UsageError, r"no kind of statistic 'grams' \(there are gram, moments"),
        ({"kinds": []}, UsageError, "no kind of statistic is asked for"),
        ({"likelihood": "mine"}, UsageError, "likelihood = 'mine' is none of exact, sampled, given, next"),
        ({"layers": "q.*"}, InputError, r"no linear layer that matches 'q\.\*' was seen"),
        ({"batches": []}, UsageError, "there are no samples"),
        ({"kinds": ["fisher"], "likelihood": "given"}, UsageError, "wants labels in the data"),
        ({"kinds": ["fisher"], "likelihood": "next"}, UsageError, "'next' is of tokens"),
        (
            {"kinds": ["fisher"], "likelihood": "given", "labels": np.array([0, 2])},
            UsageError,
            "a label 2, and .* 2 classes",
        ),
        (
            {"kinds": ["fisher"], "likelihood": "given", "labels": np.array([0.5, 1])},
            UsageError,
            "whole numbers, not float64",
        ),
        (
            {"kinds": ["fisher"], "likelihood": "given", "labels": np.array([[0, 1]])},
            UsageError,
            r"shape \[1, 2\] do not fit",
        ),
        ({"x": np.array([[np.nan, 0.0]])}, InputError, r"'layers.0.gram': a batch has values that are not finite"),
    ],
)
def test_what_is_refused(options, error, says, torch):
    labels, x = options.pop("labels", None), options.pop("x", X)
    with pytest.raises(error, match=says) as caught:
        collect(mlp.forward, ZERO, options.pop("batches", [Batch(x, labels)]), **options)
    assert "\n" not in str(caught.value)


def test_exact_needs_one_class_a_sample(torch):
    params, net, x = NETS["gpt2"]
    with pytest.raises(UsageError, match="'exact' is a sum over all classes of a sample, and these outputs have places"):
        collect(net, params, [Batch(x)], ["fisher"])


def test_rows_without_a_sample(torch):
    from refmerge.nets.layers import Layers

    def net(p, x, taps=None):
        return Layers(p, taps).linear("a", x.reshape(-1, 2)).reshape(len(x), -1)

    params, x = {"a.weight": np.eye(2)}, np.ones((3, 4))
    with pytest.raises(UsageError, match="layer 'a' reads 6 rows of 3 samples, and whose they are is not known"):
        collect(net, params, [Batch(x)], ["fisher"])
    one_by_one = collect(net, params, [Batch(row[None]) for row in x], ["fisher"])
    np.testing.assert_allclose(
        one_by_one["a.weight.fisher"], by_torch(torch, net, params, x, "exact")["a.weight"], rtol=1e-12
    )


def test_a_covariance_of_what_is_not_there():
    s = Statistics()
    s.gram("l", [[1.0, 2.0]])
    with pytest.raises(UsageError, match=r"made of l\.gram and l\.mean, and 'l\.mean' is not there"):
        s.covariance("l")
    with pytest.raises(UsageError, match="of = 'all' is none of"):
        s.covariance("l", "all")


# --- Networks and data by name -----------------------------------------------------------------------------------------


def test_networks_by_name(tmp_path, monkeypatch):
    params, net, x = NETS["gpt2"]
    for options, config in (({"heads": 2}, None), ({}, {"n_head": 2})):
        assert np.array_equal(forward_of("gpt2", params, config, options)(params, x), net(params, x))
    (tmp_path / "own_nets.py").write_text("def twice(params, batch, taps=None, *, by=2):\n    return by * batch\nno = 3\n")
    monkeypatch.chdir(tmp_path)
    assert forward_of("own_nets:twice", {})({}, 3.0) == 6
    assert forward_of("own_nets:twice", {}, options={"by": 5})({}, 3.0) == 15
    del sys.modules["own_nets"]
    for name, options, says in [
        ("mlq", {}, r"no network 'mlq' \(there are gpt2, llama, mlp"),
        ("own_nets:thrice", {}, "own_nets:thrice: .*no attribute 'thrice'"),
        ("own_nets:no", {}, "is a int, and a function"),
        ("no_such_nets:f", {}, "No module named 'no_such_nets'"),
        ("own_nets:twice", {"times": 3}, r"has no option 'times' \(there are by\)"),
        ("mlp", {"heads": 3}, "mlp has no"),
        ("gpt2", {}, "wants the number of heads"),
    ]:
        with pytest.raises(UsageError, match=says):
            forward_of(name, params, None, options)


def test_options_of_the_command_line():
    assert (
        option("heads=3") == ("heads", 3) and option("eps=1e-6") == ("eps", 1e-6) and option("name=x=y") == ("name", "x=y")
    )
    assert option("activation=tanh")[1](np.array(0.0)) == 0
    with pytest.raises(UsageError, match="activation = 'step' is none of relu"):
        option("activation=step")
    with pytest.raises(UsageError, match="an option is NAME=VALUE, not 'heads'"):
        option("heads")


def test_data_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    np.savez("d.npz", inputs=x, labels=y)
    np.save("d.npy", x)
    save_file({"input_ids": y[:, None], "attention_mask": np.ones((5, 1))}, "d.safetensors")
    (tmp_path / "own_data.py").write_text(
        "import numpy as np\ndef some():\n"
        "    yield np.ones((2, 3))\n    yield {'inputs': np.ones((1, 3)), 'labels': np.ones(1)}\n"
    )
    assert [(b.inputs.tolist(), b.labels.tolist()) for b in batches_of("d.npz", 2, 1, 4)] == [
        (x[1:3].tolist(), [1, 2]), (x[3:4].tolist(), [3]),
    ]  # fmt: skip
    assert [len(b) for b in batches_of("d.npy", 3)] == [3, 2]
    (named,) = batches_of("d.safetensors", 9)
    assert named.inputs.keys() == {"input_ids", "attention_mask"} and named.mask.shape == (5, 1)
    assert [len(b) for b in batches_of("own_data:some")] == [2, 1]
    with pytest.raises(UsageError, match="gives batches as they are"):
        list(batches_of("own_data:some", 2, 1))
    (tmp_path / "text.npz").write_text("no")
    for data, says in (("text.npz", "cannot be read as .npz"), ("none.npz", "cannot be read"), ("none.safetensors", "none")):
        with pytest.raises(InputError, match=says):
            list(batches_of(data))
    for given_arrays, says in [
        (
            {"inputs": x, "labels": y[:2]},
            r"arrays of the same samples are wanted, and these are inputs \[5, 2\], labels \[2\]",
        ),
        ({"inputs": x, "input_ids": y}, "there are inputs and 'input_ids'"),
        ({"labels": y}, "there are no inputs"),
        ({}, "these are none"),
        ("x", "a batch is an array, or a mapping of arrays, not str"),
    ]:
        with pytest.raises(InputError, match=says):
            as_batch(given_arrays, "d")


# --- The command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two fine-tunes of one network with data of their own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    start = mlp.init(rng, [4, 6, 3])
    for name in ("a", "b"):
        model = {k: (v + 0.3 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in start.items()}
        save_file(model, f"{name}.safetensors")
        x = rng.standard_normal((30, 4)).astype(np.float32)
        np.savez(f"{name}.npz", inputs=x, labels=mlp.forward(model, x).argmax(1))
    return tmp_path


def cli(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


RECIPE = """refmerge: 1
merge_method: {method}
models:
  - {{model: ./a.safetensors, stats: ./a.stats.safetensors}}
  - {{model: ./b.safetensors, stats: ./b.stats.safetensors}}
"""


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_collect_and_merge_by_a_recipe(method, two, torch):
    for name in "ab":
        done = cli("collect", f"{name}.safetensors", f"{name}.stats.safetensors", "--net", "mlp", "--data", f"{name}.npz",
                   "--kinds", "kfac,fisher", "--likelihood", "given")  # fmt: skip
        assert done.exit_code == 0, done.output
    assert "8 statistics of 30 rows or samples to b.stats.safetensors" in done.output
    (two / "r.yml").write_text(RECIPE.format(method=method))
    planned = cli("plan", "r.yml", "--no-time")
    assert planned.exit_code == 0 and "statistics  ./a.stats.safetensors" in planned.output, planned.output
    done = cli("merge", "r.yml", "merged.safetensors")
    assert done.exit_code == 0, done.output
    models, stats = ([dict(refmerge.open_checkpoint(f"{n}{end}.safetensors")) for n in "ab"] for end in ("", ".stats"))
    expected = refmerge.merge(models, method, stats=stats)
    merged = refmerge.open_checkpoint("merged.safetensors")
    assert all(np.array_equal(merged[name], x) for name, x in expected.items())


def test_statistics_of_the_base_in_a_recipe(two):
    """wise_ft:fisher interpolates from the base by the Fisher information of both."""
    rng = np.random.default_rng(0)
    names = list(refmerge.open_checkpoint("a.safetensors"))
    F = [{n: rng.random(refmerge.open_checkpoint("a.safetensors")[n].shape) for n in names} for _ in range(2)]
    for name, f in zip("ab", F):
        save_file(f, f"{name}.f.safetensors")
    entry = "models:\n  - {{model: b.safetensors, stats: b.f.safetensors}}\n"
    text = "refmerge: 1\nmerge_method: {}\nbase_model: a.safetensors\n{}" + entry
    (two / "r.yml").write_text(text.format("wise_ft:fisher", "base_stats: a.f.safetensors\n"))
    done = cli("merge", "r.yml", "merged.safetensors")
    assert done.exit_code == 0, done.output
    base, model = (dict(refmerge.open_checkpoint(f"{n}.safetensors")) for n in "ab")
    expected = refmerge.merge([model], "wise_ft:fisher", base=base, stats=F)
    merged = refmerge.open_checkpoint("merged.safetensors")
    assert all(np.array_equal(merged[n], x) for n, x in expected.items())
    assert "statistics  a.f.safetensors" in cli("plan", "r.yml", "--no-time").output
    (two / "r.yml").write_text(text.format("task_arithmetic", "base_stats: a.f.safetensors\n"))
    done = cli("plan", "r.yml")
    assert done.exit_code == 2 and "task_arithmetic reads no statistics of the base" in done.output


def test_parts_by_the_command_line(two, torch):
    whole = ("collect", "a.safetensors", "--net", "mlp", "--data", "a.npz", "--kinds", "gram,fisher", "--dtype", "float64")
    for out, samples in (("w", ":"), ("p", ":11"), ("q", "11:")):
        done = cli(*whole[:2], f"{out}.safetensors", *whole[2:], "--samples", samples, "--batch", 4)
        assert done.exit_code == 0, done.output
    done = cli("collect", "--merge", "p.safetensors", "q.safetensors", "m.safetensors", "--json")
    assert done.exit_code == 0 and set(json.loads(done.output)["counts"].values()) == {30}
    merged, expected = (Statistics.load(f"{n}.safetensors") for n in "mw")
    for name in expected:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-13, atol=1e-16)
    assert merged.facts == {"likelihood": "exact"}


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["a.safetensors"], 2, "one CHECKPOINT and OUT are wanted"),
        ([], 2, "one CHECKPOINT and OUT are wanted"),
        (["a.safetensors", "x"], 2, "does not end in .safetensors"),
        (["a.safetensors", "b.safetensors", "--net", "mlp", "--data", "a.npz"], 2, "exists; --overwrite replaces it"),
        (["a.safetensors", "a.safetensors", "--net", "mlp", "--data", "a.npz", "--overwrite"], 2, "never written to"),
        (["a.safetensors", "x.safetensors", "--data", "a.npz"], 2, "--net and --data are wanted"),
        (["a.safetensors", "x.safetensors", "--net", "mlp", "--data", "a.npz", "--samples", "3"], 2, "START:STOP"),
        (["a.safetensors", "x.safetensors", "--net", "mlp", "--data", "a.npz", "--samples", "5:2"], 2, "START:STOP"),
        (["a.safetensors", "x.safetensors", "--net", "mlp", "--data", "a.npz", "--samples", "90:"], 2, "no samples"),
        (["a.safetensors", "x.safetensors", "--net", "vit", "--data", "a.npz", "--option", "heads=2"], 3, "vit cannot run"),
        (["--merge", "a.safetensors", "x.safetensors"], 3, "has no count in the metadata: no statistics of refmerge"),
        (["--merge", "a.safetensors", "x.safetensors", "--net", "mlp"], 2, "--merge adds what is there"),
    ],
)  # fmt: skip
def test_the_command_line_refuses(words, status, says, two):
    before = {p.name: p.read_bytes() for p in two.iterdir()}
    done = cli("collect", *words)
    assert done.exit_code == status and says in done.output and "Traceback" not in done.output, done.output
    assert {p.name: p.read_bytes() for p in two.iterdir()} == before


# --- What reads them ---------------------------------------------------------------------------------------------------


def test_statistics_are_inputs_and_never_written_to(two):
    for name in "ab":
        assert (
            cli(
                "collect", f"{name}.safetensors", f"{name}.stats.safetensors", "--net", "mlp", "--data", f"{name}.npz"
            ).exit_code
            == 0
        )
    (two / "r.yml").write_text(RECIPE.format(method="regmean"))
    done = cli("merge", "r.yml", "a.stats.safetensors", "--overwrite")
    assert done.exit_code == 2 and "lies in an input" in done.output


def test_what_is_not_read_is_said():
    models = [{"enc.weight": np.eye(2)}] * 2
    stats = {"enc.gram": np.eye(2), "dec.gram": np.eye(2), "dec.mean": np.ones(2)}
    with pytest.warns(UserWarning, match="regmean: statistics of what is not merged are not read: 'dec.gram' and 1 more"):
        refmerge.merge(models, "regmean", stats=[stats, stats])


@pytest.mark.parametrize(("value", "says"), [(np.nan, "not finite"), (-1.0, "mean of squares, has negative values")])
def test_a_bad_fisher_is_named(value, says):
    models = [{"w": np.ones(3)}] * 2
    bad = {"w.fisher": np.array([1.0, value, 1.0])}
    with pytest.raises(InputError, match=f"stats of model 1: 'w.fisher' of tensor 'w'.*{says}"):
        refmerge.merge(models, "fisher", stats=[{"w.fisher": np.ones(3)}, bad], normalize=False)
    if value < 0:
        with pytest.raises(InputError, match=says):
            refmerge.merge(models, "mats", stats=[bad, bad], objective="fisher")
