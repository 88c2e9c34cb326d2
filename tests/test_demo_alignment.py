"""The experiments on alignment run, on tiny networks. Their numbers, which take minutes, are on the page."""

from __future__ import annotations

from importlib import resources
from xml.etree import ElementTree

import numpy as np
import pytest

from refmerge.demo import alignment, training
from refmerge.errors import UsageError
from refmerge.nets import mlp
from refmerge.plots import draw_series

PAGE = (resources.files("refmerge.spec") / "alignment.md").read_text(encoding="utf-8")


def tiny(name):
    """A table of one pair, of networks of a few units that were trained for one epoch."""
    small = {
        "widths": {"sizes": (4, 6)},
        "lazy": {"sizes": (4, 6)},
        "repair": {"depths": (1, 2), "n": 6},
        "zip": {"sizes": (6,)},
        "transport": {"sizes": (8, 6)},
        "depths": {"deep": 3, "shallow": 2, "n": 6},
        "ways": {"n": 6},
    }[name]
    measure = alignment.TABLES[name][1]
    return alignment.run(name, [0, 1], each=lambda _, pairs: (measure(k, epochs=1, **small) for k in pairs))


@pytest.mark.parametrize("name", alignment.TABLES)
def test_a_table_is_what_the_page_has(name):
    rows = tiny(name)
    assert all(np.isfinite(x).all() and x.shape == (2,) for row in rows.values() for x in row.values())
    head, rule, *_ = alignment.markdown(rows).splitlines()
    assert f"{head}\n{rule}\n" in PAGE and f"**{alignment.TABLES[name][0]}**" in PAGE


def test_claims_are_of_rows_that_are_on_the_page():
    for claim, (table, *places) in alignment.CLAIMS.items():
        assert f"| {claim} |" in PAGE and table in alignment.TABLES
        for row, column in places:
            at = PAGE.index(f"**{alignment.TABLES[table][0]}**")
            assert f"\n| {row} |" in PAGE[at:] and f"| {column} |" in PAGE[at:]


def test_claims_count_pairs():
    better, worse = np.array([0.1, 0.5]), np.array([0.4, 0.3])
    rows = {str(n): {"barrier by weights": better, "barrier before": worse} for n in (8, 64, 512)}
    line = next(s for s in alignment.verdicts({"widths": rows}).splitlines() if "width 8" in s)
    assert line == "| matching weights lowers the barrier, width 8 | 0.05 ± 0.35 | 1 of 2 |"


def test_loss_of_logits():
    """By hand: of two equal outputs each has probability 1/2; ln 3 apart, 3/4 and 1/4."""
    logits = np.array([[5.0, 5.0], [np.log(3), 0.0], [1000.0, 0.0]])
    assert np.allclose(training.losses(logits, np.array([1, 1, 1])), [np.log(2), np.log(4), 1000])


def test_gradient_is_that_of_the_loss():
    random = np.random.RandomState(0)
    weights = training.initial(random, {"layer1": (5, 4), "layer2": (4, 3), "head": (3, 2)})
    x, y = random.normal(size=(7, 5)), random.randint(2, size=7)
    slopes = training.gradient(weights, x, np.eye(2)[y])
    for name, w in weights.items():
        for place in np.ndindex(w.shape):
            sides = []
            for h in (1e-6, -1e-6):
                moved = w.copy()
                moved[place] += h
                sides.append(training.losses(mlp.forward(weights | {name: moved}, x), y).mean())
            assert slopes[name][place] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_weight_decay_shrinks_what_no_image_reaches():
    weights = training.initial(np.random.RandomState(0), {"head": (4, 2)})
    black = np.zeros((1, 2, 2))
    after = training.train(weights, black, np.array([0]), epochs=1, random=np.random.RandomState(0), rate=0.5, decay=0.5)
    assert np.allclose(after["head.weight"], 0.75 * weights["head.weight"])


def test_a_plot_of_series_is_well_formed():
    text = draw_series({"a < b": {1.0: [0.1, 0.2], 8.0: [1.0]}, "c": {2.0: [0.5]}}, "x & y", "label", "size")
    assert ElementTree.fromstring(text).tag.endswith("svg") and text.count("<circle") == 3
    assert "<circle" in draw_series({"one": {3.0: [0.7]}}, "x", "label", "size")
    with pytest.raises(UsageError, match="above 0"):
        draw_series({"a": {1.0: [0.0]}}, "x", "label", "size")
