"""Specs found by tracing a forward pass, against those that were written by hand."""

import numpy as np
import pytest

from refmerge.errors import UsageError
from refmerge.nets import gpt2, llama, mlp, resnet, vgg, vit
from refmerge.nets.layers import relu
from refmerge.symmetry import Block, Nested, Slices, architectures
from refmerge.symmetry.trace import trace


def alike(a, b, renamed):
    """Whether two entries are equal but for names. What is inside of each block by itself may be the same in every block."""
    if isinstance(a, str) and isinstance(b, str):
        return renamed.setdefault(a, b) == b
    if isinstance(a, Block | Nested) and isinstance(b, Block):
        return alike(a.name, b.name, renamed) and a.k == b.k and alike(a.inner, b.inner, renamed)
    if isinstance(a, Slices) and isinstance(b, Slices):
        return len(a.parts) == len(b.parts) and all(alike(x, y, renamed) for x, y in zip(a.parts, b.parts))
    return a == b


def assert_alike(found, known):
    renamed = {}
    for tensor, entries in known.axes.items():
        for a, b in zip(entries, found.axes[tensor], strict=True):
            assert alike(a, b, renamed), (tensor, a, b)
    assert len(set(renamed.values())) == len(renamed) == len(known.permutations) == len(found.permutations)


RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 3, 8, 8))
HALF = Slices(["a", None], [2, 2])
TOKENS = RNG.integers(0, 11, (2, 6))


def test_mlp():
    p = mlp.init(RNG, [5, 7, 6, 4])
    found = trace(mlp.forward, p, RNG.normal(size=(3, 5)))
    assert_alike(found, architectures.mlp(p))
    assert found.permutations == ["layers.0", "layers.1"]


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"places": 4, "norm": "layer"}, {"norm": None, "hidden": [9, 5]}])
def test_vgg(options):
    p = vgg.init(RNG, [6, "M", 8, 7, "M"], **options)
    assert_alike(trace(vgg.forward, p, IMAGES), architectures.vgg(p))


@pytest.mark.parametrize("options", [
    {"widths": (4, 6)}, {"widths": (3, 4), "bottleneck": True}, {"widths": (4, 8), "shortcut": "zeros", "norm": "layer"},
])  # fmt: skip
def test_resnet(options):
    p = resnet.init(RNG, depth=2, **options)
    assert_alike(trace(resnet.forward, p, IMAGES), architectures.resnet(p))


def test_vit():
    p = vit.init(RNG, 12)
    assert_alike(trace(lambda p, x: vit.forward(p, x, heads=3), p, IMAGES), architectures.vit(p, 3))


def test_gpt2():
    """Of eight positions six are read: the other two stay where they are all the same."""
    p = gpt2.init(RNG, 12)
    assert_alike(trace(lambda p, x: gpt2.forward(p, x, heads=3), p, TOKENS), architectures.gpt2(p, 3))


def test_llama():
    """Groups, heads in groups, values, and nothing inside of queries and keys."""
    p = llama.init(RNG, 6, 2, bias=True, head_norms=True, tied=True, width=20)
    assert_alike(trace(lambda p, x: llama.forward(p, x, heads=6, groups=2), p, TOKENS), architectures.llama(p, 6, 2))


def test_a_network_of_one_s_own():
    """Two branches that are joined, and a gate."""

    def forward(p, x):
        a, b = relu(x @ p["a"]), relu(x @ p["b"])
        xp = p["a"].__array_namespace__()
        return (xp.concat([a, b], axis=-1) * p["gate"]) @ p["c"]

    p = {
        "a": RNG.normal(size=(3, 4)),
        "b": RNG.normal(size=(3, 5)),
        "gate": RNG.normal(size=9),
        "c": RNG.normal(size=(9, 2)),
    }
    found = trace(forward, p, RNG.normal(size=(2, 3)))
    assert found.axes["a"] == (None, "a") and found.axes["b"] == (None, "b")
    assert found.axes["gate"] == (Slices(["a", "b"], [4, 5]),) and found.axes["c"] == (Slices(["a", "b"], [4, 5]), None)


HIDDEN = {"a": ("a", None), "b": ("a",), "c": (None, "a")}


@pytest.mark.parametrize(
    "forward",
    [
        lambda p, x: np.maximum(x @ p["a"].T + p["b"], 0) @ p["c"].T,
        lambda p, x: np.matmul(np.tanh(np.add(np.matmul(x, p["a"].mT), p["b"])), np.transpose(p["c"], (1, 0))),
        lambda p, x: np.clip((x @ p["a"].T).reshape(2, 7) ** 2 + np.abs(p["b"]), 0, 9).reshape((2, 7)) @ p["c"].T,
        lambda p, x: (np.exp(y := x @ p["a"].T + p["b"]) / np.exp(y).sum(axis=-1, keepdims=True)) @ p["c"].T,
        lambda p, x: np.where(x @ p["a"].T > p["b"], 1.0, 0.5) @ p["c"].T,
        lambda p, x: np.concatenate([x @ p["a"].T, p["b"][None, :]], axis=0) @ p["c"].T,
        lambda p, x: (relu(x @ p["a"].T) @ p["b"])[:, None] + np.sum(p["c"].T * p["b"][:, None], axis=0),
        lambda p, x: np.einsum("bh,h,oh->bo", np.einsum("bi, hi -> bh", x, p["a"]), p["b"], p["c"]),
        lambda p, x: np.dot(np.dot(x, p["a"].T) - p["b"], p["c"].T) * np.ndim(p["b"]) / np.shape(p["a"])[0],
        lambda p, x: (p["b"] @ p["c"].T) * np.std(x @ p["a"].T @ p["c"].T, axis=0),
    ],
)  # fmt: skip
def test_a_pass_in_numpy(forward):
    """Operators, functions and methods as people write them, and products with vectors."""
    p = {"a": RNG.normal(size=(7, 3)), "b": RNG.normal(size=7), "c": RNG.normal(size=(4, 7))}
    assert trace(forward, p, RNG.normal(size=(2, 3))).axes == HIDDEN


@pytest.mark.parametrize(
    "forward, axes",
    [
        (lambda p, x: (x @ p["a"])[:, :2] @ p["b"][:2, :], {"a": (None, HALF), "b": (HALF, None)}),
        (lambda p, x: (x @ p["a"])[:, ::2] @ p["b"][::2, :], {"a": (None, None), "b": (None, None)}),
        (lambda p, x: x @ p["a"] @ p["b"] + p["b"][0, :], {"a": (None, None), "b": (None, None)}),
        (lambda p, x: (x @ p["a"] * np.arange(4)) @ p["b"], {"a": (None, None), "b": (None, None)}),
        (lambda p, x: np.arange(4) * (x @ p["a"]) @ p["b"], {"a": (None, None), "b": (None, None)}),
    ],
)  # fmt: skip
def test_what_picks_a_place_fixes_it(forward, axes):
    p = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}
    assert trace(forward, p, RNG.normal(size=(2, 3))).axes == axes


@pytest.mark.parametrize(
    "forward, message",
    [
        (lambda p, x: p["a"].__array_namespace__().cumulative_sum(p["a"]), "xp.cumulative_sum is not known"),
        (lambda p, x: np.asarray(p["a"]), "asks for values"),
        (lambda p, x: x @ p["a"] if p["a"] > 0 else x, "asks for values"),
        (lambda p, x: p["a"].__array_namespace__().reshape(p["a"], (5, 2)) @ p["b"], "is reshaped to"),
        (lambda p, x: p["b"] @ p["a"], "an axis of 2 places meets one of 3"),
        (lambda p, x: np.sort(p["a"]), "xp.sort is not known"),
        (lambda p, x: np.add.reduce(p["a"]), "np.add.reduce is not known"),
        (lambda p, x: p["a"].argmax(), "does what is not known here .*argmax.*: write the spec by hand"),
        (lambda p, x: np.pad(p["a"], 1), "xp.pad is not known"),
        (lambda p, x: np.einsum("...i,ij->...j", x, p["a"]), "einsum of '...i,ij->...j' is not known"),
        (lambda p, x: np.einsum("bi,ij->bj", x, p["b"]), "an axis of 3 places meets one of 4"),
        (lambda p, x: np.dot(x, x[None] @ p["a"]), "np.dot of more than two dimensions is not known"),
        (lambda p, x: (x @ p["a"],), "gives tuple, and not an array"),
    ],
)
def test_what_is_not_understood(forward, message):
    p = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}
    with pytest.raises(UsageError, match=message):
        trace(forward, p, RNG.normal(size=(2, 3)))


def test_functions_of_torch(torch):
    p = {"a": torch.ones(3, 4), "b": torch.ones(4, 2)}
    with pytest.raises(UsageError, match=r"does what is not known here .*Tensor, not Traced"):
        trace(lambda p, x: torch.relu(x @ p["a"]) @ p["b"], p, torch.ones(2, 3))
    found = trace(lambda p, x: relu(x @ p["a"]) @ p["b"], p, torch.ones(2, 3))
    assert found.axes == {"a": (None, "a"), "b": ("a", None)}


def test_what_shapes_do_not_tell():
    """A pass that weighs units by their place as soon as it sees values."""

    def forward(p, x):
        y = x @ p["a"]
        return (y * np.arange(4) if isinstance(y, np.ndarray) else y) @ p["b"]

    p = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}
    with pytest.raises(UsageError, match="outputs change with 'a' by"):
        trace(forward, p, RNG.normal(size=(2, 3)))
