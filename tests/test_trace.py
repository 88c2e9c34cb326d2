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


@pytest.mark.parametrize(
    "forward, axes",
    [
        (lambda p, x: (x @ p["a"])[:, :2] @ p["b"][:2, :], {"a": (None, HALF), "b": (HALF, None)}),
        (lambda p, x: (x @ p["a"])[:, ::2] @ p["b"][::2, :], {"a": (None, None), "b": (None, None)}),
        (lambda p, x: x @ p["a"] @ p["b"] + p["b"][0, :], {"a": (None, None), "b": (None, None)}),
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
    ],
)
def test_what_is_not_understood(forward, message):
    p = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}
    with pytest.raises(UsageError, match=message):
        trace(forward, p, RNG.normal(size=(2, 3)))


def test_what_shapes_do_not_tell():
    """A pass that weighs units by their place as soon as it sees values."""

    def forward(p, x):
        y = x @ p["a"]
        return (y * np.arange(4) if isinstance(y, np.ndarray) else y) @ p["b"]

    p = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}
    with pytest.raises(UsageError, match="outputs change with 'a' by"):
        trace(forward, p, RNG.normal(size=(2, 3)))
