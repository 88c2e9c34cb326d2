"""The pictures of the measures, and of those pages of alignment that show matrices or a tree:
`python -m tests.draw_measures` draws them anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from refmerge.pages import BASE, COLOURS, FAINT, GRID, RESULT, _n, _svg
from refmerge.plots import draw_paths, draw_series
from refmerge.procedures.alignment.canonicalize import canonicalize
from refmerge.procedures.alignment.convergent_matching import convergent_matching
from refmerge.procedures.alignment.ws_mixup import ws_mixup
from refmerge.procedures.measures.activation_correlation import activation_correlation
from refmerge.procedures.measures.cka import centred, gram
from refmerge.procedures.measures.dropout_path import dropout_path
from refmerge.procedures.measures.layerwise_barrier import layerwise_barrier
from refmerge.procedures.measures.layerwise_sharpness import layerwise_sharpness
from refmerge.procedures.measures.loss_barrier import Barrier, barrier_of, loss_barrier
from refmerge.procedures.measures.quadratic_barrier import quadratic_barrier
from refmerge.procedures.measures.sparse_stragglers import sparse_stragglers
from refmerge.procedures.measures.straggler_score import straggler_score
from refmerge.symmetry import Spec, architectures
from tests.draw_alignment import heading, text
from tests.draw_transport import BOLD, CELL, END, MIDDLE, TOP, grid, strands

SPEC = Path(__file__).parent.parent / "spec"
Labelled = tuple[str, np.ndarray, Sequence[str], Sequence[str], np.ndarray | None]


def matrices(title: str, subtitle: str, about: str, parts: Sequence[Labelled]) -> str:
    """Matrices side by side: title, numbers, names of rows and columns, and how dark each number is."""
    gap = 76.0
    body, x, rows = [heading(title), text(16, 42, subtitle, FAINT)], 56.0, 0
    for name, M, down, across, shade in parts:
        body += grid(x, name, M, down, across, np.zeros(M.shape) if shade is None else shade)
        x += max(CELL * M.shape[1], 6.6 * len(name)) + gap
        rows = max(rows, len(M))
    return _svg(max(x - gap + 24, 6.2 * len(subtitle) + 32), TOP + rows * CELL + 24, title, about, body)


def marked(shape: tuple[int, int], columns: Sequence[int]) -> np.ndarray:
    chosen = np.zeros(shape)
    chosen[range(shape[0]), columns] = 1
    return chosen


# ------------------------------------------------------------------------------------------------------------------ measures


def two_numbers() -> tuple[dict, dict, Callable[[dict], float]]:
    """y = b a x, where b a = 1 is right."""
    one = {"a.weight": np.array([2.0]), "b.weight": np.array([0.5])}
    two = {"a.weight": np.array([0.5]), "b.weight": np.array([2.0])}
    return one, two, lambda m: (m["a.weight"].item() * m["b.weight"].item() - 1) ** 2


def measured(t: Sequence[float], losses: Sequence[float], value: float, at: float) -> Barrier:
    """A curve on which a number is marked."""
    return Barrier(tuple(t), tuple(losses), (), value, at)


def layers() -> str:
    one, two, loss = two_numbers()
    found = layerwise_barrier([one, two], loss, points=25)
    half = found.t.index(0.5)
    curves = {"a, in model one": found.layers["a"].first, "b, in model two": found.layers["b"].second}
    curves |= {"both": loss_barrier([one, two], loss).losses}
    paths = {label: measured(found.t, losses, losses[half], 0.5) for label, losses in curves.items()}
    return draw_paths(paths, "layerwise_barrier: one layer alone, and both", word="half-way", chords=False)


def scores() -> str:
    theta_0 = {"a.weight": np.array([1.0]), "b.weight": np.array([1.0])}
    theta_1, _, loss = two_numbers()
    found = straggler_score(theta_0, theta_1, loss, points=25)
    paths = {f"{label} alone": measured(found.alpha, x, found.scores[label], 0.0) for label, x in found.losses.items()}
    return draw_paths(paths, "straggler_score: one layer on its way, the rest fine-tuned", word="score", chords=False)


def around() -> str:
    a = {"in.weight": np.array([[1.0], [1.0], [1.0], [1.0]]), "out.weight": np.array([[1.0, 0.0, 1.0, 0.0]])}
    b = {"in.weight": np.array([[-3.0], [-1.0], [-3.0], [-1.0]]), "out.weight": np.array([[-1.0, 1.0, -1.0, 1.0]])}
    x = np.linspace(-1, 1, 9)[:, None]

    def output(m: dict) -> np.ndarray:
        return np.tanh(x @ m["in.weight"].T) @ m["out.weight"].T

    target = (output(a) + output(b)) / 2

    def loss(m: dict) -> float:
        return float(np.mean((output(m) - target) ** 2))

    through = loss_barrier(dropout_path([a, b]).points, loss, points=9, reference="max")
    paths = {"on the line": loss_barrier([a, b], loss), "through halves": through}
    return draw_paths(paths, "dropout_path: two ways between two networks")


def predicted() -> str:
    """A hill, seen from both sides."""
    one, two = {"x": np.array([-0.8])}, {"x": np.array([0.8])}

    def loss(m: dict) -> float:
        return float(np.exp(-(m["x"].item() ** 2) / 2))

    found = quadratic_barrier([one, two], lambda m: {"x": -m["x"] * np.exp(-(m["x"] ** 2) / 2)})
    line = loss_barrier([one, two], loss)
    guess = [line.losses[0] - t * (1 - t) / 2 * found.curvature for t in line.t]
    paths = {"the loss": line, "as the slopes at both ends predict": barrier_of(line.t, guess)}
    return draw_paths(paths, "quadratic_barrier: a ridge, and what its sides say of it")


def rises() -> str:
    """Two layers of 400 numbers, of which the loss of one bends four times as much as that of the other."""
    model = {"x": np.ones(400), "y": np.ones(400)}
    series: dict[str, dict[float, list[float]]] = {"y": {}, "x": {}}
    for rho in (0.1, 0.2, 0.4, 0.8):
        for seed in range(5):
            found = layerwise_sharpness(
                model, lambda m: float(np.mean(m["x"] ** 2) + 4 * np.mean(m["y"] ** 2)), rho=rho, seed=seed
            )
            for name in series:
                series[name].setdefault(rho, []).append(found.layers[name])
    return draw_series(series, "layerwise_sharpness: x^2 + 4 y^2, means of 400 numbers at 1", "rise", "rho")


def trimmed() -> str:
    theta_0, theta_1 = np.array([4.0, 1.0, 0.0, 2.0]), np.array([4.5, 3.0, -1.0, 2.0])
    found = sparse_stragglers({"a.weight": theta_0}, {"a.weight": theta_1}, ["a"])["a.weight"]
    places, rows = [str(i) for i in range(4)], ["zero-shot", "fine-tuned", "change", "kept", "result"]
    change = theta_1 - theta_0
    kept = np.where(np.abs(change) >= 1, change, 0.0)
    M = np.stack([theta_0, theta_1, change, kept, found])
    shade = np.zeros(M.shape)
    shade[2:] = kept != 0
    title = "sparse_stragglers: the largest changes of a layer, half of the way"
    body = [heading(title), *grid(96, "a.weight", M, rows, places, shade)]
    return _svg(
        560, TOP + 5 * CELL + 24, title, "Two layers, their difference, the larger half of it, and the result.", body
    )


def correlations() -> str:
    u, v = np.array([-1.0, 0.0, 1.0]), np.array([1.0, -2.0, 1.0])
    found = activation_correlation(np.stack([u, v], axis=1), np.stack([v, u + v], axis=1))
    C = found.matrix.round(3) + 0.0
    T = marked(C.shape, found.match.tolist())
    title = "activation_correlation: which units are alike"
    about = f"aligned, the diagonal: {found.aligned:.3f}; matched, marked: {found.matched:.3f}"
    body = [heading(title), text(16, 42, about, FAINT)]
    body += grid(60, "correlations", C, ["u", "v"], ["v", "u + v"], T)
    body += strands(210, "matched", T * C, ["u", "v"], ["v", "u + v"])
    return _svg(480, TOP + 2 * CELL + 24, title, "The correlations of two units with two, the matching marked.", body)


def tables() -> str:
    """The worked example of cka, in ninths."""
    X, Y = np.array([[0.0], [1.0], [3.0]]), np.array([[0.0], [2.0], [3.0]])
    K, L = ((9 * centred(gram(Z), False)).round() + 0.0 for Z in (X, Y))
    samples = ["s0", "s1", "s2"]
    parts = [(name, M, samples, samples, np.maximum(M, 0) / M.max()) for name, M in (("9 K'", K), ("9 L'", L))]
    subtitle = "three samples as 0, 1, 3 and as 0, 2, 3: how alike any two are, centred; CKA is the cosine of the tables"
    return matrices("cka: two tables of likenesses", subtitle, "Two centred Gram matrices of three samples.", parts)


# ----------------------------------------------------------------------------------------------------------------- alignment


def units() -> str:
    """The worked example of convergent_matching with a unit of b more, so that both matchings differ in two rows."""
    h1, h2, h3 = np.array([1, 1, -1, -1.0]), np.array([1, -1, 1, -1.0]), np.array([1, -1, -1, 1.0])
    a, b = np.stack([h1, h2, h3], axis=1), np.stack([2 * h1 + h2, h3 + h2, h1 - h3], axis=1)
    found = convergent_matching(a, b)
    C = found.correlation.round(2) + 0.0
    down, across = ["h1", "h2", "h3"], ["b0", "b1", "b2"]
    parts = [
        (f"one to one, {found.value:.2f} in all", C, down, across, marked(C.shape, found.match)),
        (f"semi-matching, {found.semi_value:.2f}", C, down, across, marked(C.shape, found.semi)),
    ]
    subtitle = "b0 = 2 h1 + h2, b1 = h3 + h2, b2 = h1 - h3; a unit of b is taken once, or as often as it is liked best"
    about = "The correlations of three units with three, twice, with what either matching takes."
    return matrices("convergent_matching: which unit is which", subtitle, about, parts)


def mixed() -> str:
    spec = Spec({"fc1.weight": ("P", None), "fc2.weight": (None, "P")})
    a = {"fc1.weight": np.array([[2.0, 0.0], [0.0, 2.0]]), "fc2.weight": np.array([[1.0, 2.0]])}
    b = {"fc1.weight": np.array([[0.5, 2.0], [2.0, 0.0]]), "fc2.weight": np.array([[2.0, 1.0]])}
    found = ws_mixup(a, b, spec, alpha=0.75)
    moved = spec.apply(found.permutations, b)
    plain = ws_mixup(a, b, spec, alpha=0.75, align="none").model
    columns, p = ["x0", "x1"], found.permutations["P"]
    parts = [
        ("fc1 of a", a["fc1.weight"], ["a0", "a1"], columns, None),
        ("fc1 of b", b["fc1.weight"], ["b0", "b1"], columns, None),
        ("b, put in order", moved["fc1.weight"], [f"b{i}" for i in p], columns, None),
        ("3/4 a + 1/4 of that", found.model["fc1.weight"], ["0", "1"], columns, np.full((2, 2), 0.6)),
        ("without order", plain["fc1.weight"], ["0", "1"], columns, None),
    ]
    about = "The first layer of two networks, of the second in order, and the mixes of both with and without it."
    return matrices("ws_mixup: three quarters of one network", "units in rows, inputs in columns", about, parts)


def scaled() -> str:
    model = {"a.weight": np.array([[1.0], [8]]), "b.weight": np.array([[1.0, 2]])}
    found = canonicalize(model, architectures.mlp(model), order=False).model
    ordered = canonicalize(model, architectures.mlp(model)).model

    def beside(m: dict) -> np.ndarray:
        return np.concatenate([m["a.weight"], m["b.weight"].T], axis=1)

    across, down = ["in", "out"], ["u0", "u1"]
    parts = [
        ("the model, 70", beside(model), down, across, None),
        ("scaled, 34", beside(found), down, across, np.array([[0, 0], [0.6, 0.6]])),
        ("the heavier unit first", beside(ordered), down[::-1], across, None),
    ]
    subtitle = "a unit's weight in halved and its weight out doubled compute the same; numbers are sums of squares"
    about = "The weights of two units, scaled to the least sum of squares, and in order."
    return matrices("canonicalize: the least of all equal models", subtitle, about, parts)


def flipped() -> str:
    """A tree of two levels, and the same with its left split negated and what lies below that exchanged."""
    title = "soft_trees: a subtree is flipped, and the tree computes the same"
    body = [
        heading(title),
        text(16, 42, "a split gives the share sigmoid(w x + b) to the left, the rest to the right", FAINT),
    ]
    for panel, (left, leaves) in enumerate((("w1 x + b1", "ABCD"), ("-w1 x - b1", "BACD"))):
        x = 180.0 + 310 * panel
        splits = {"w0 x + b0": (x, 90.0), left: (x - 70, 140.0), "w2 x + b2": (x + 70, 140.0)}
        for a, b in ((0, 1), (0, 2)):
            (p, q), (r, s) = list(splits.values())[a], list(splits.values())[b]
            body.append(f'<path d="M{_n(p)} {_n(q)}L{_n(r)} {_n(s)}" stroke="{GRID}" stroke-width="2"/>')
        for k, leaf in enumerate(leaves):
            p, q = x - 70 if k < 2 else x + 70, 140.0
            r, s = x - 105 + 70 * k, 192.0
            body.append(f'<path d="M{_n(p)} {_n(q)}L{_n(r)} {_n(s)}" stroke="{GRID}" stroke-width="2"/>')
            colour = COLOURS[0] if leaf in "AB" else BASE
            body.append(f'<rect x="{_n(r - 12)}" y="{_n(s - 10)}" width="24" height="22" fill="{colour}"/>')
            body.append(text(r, s + 5, leaf, "#fff", MIDDLE + BOLD))
        for word, (p, q) in splits.items():
            colour = RESULT if word == left and panel else FAINT
            body.append(f'<circle cx="{_n(p)}" cy="{_n(q)}" r="6" fill="{colour}"/>')
            beside = (p, q - 12, MIDDLE) if q < 100 else (p - 12, q - 4, END) if p < x else (p + 12, q - 4, "")
            body.append(text(*beside[:2], word, colour, beside[2]))
    about = "Two trees of three splits and four leaves; of the second one's left subtree the sides are exchanged."
    return _svg(620, 224, title, about, body)


PICTURES = {
    "measures/layerwise_barrier": layers,
    "measures/straggler_score": scores,
    "measures/dropout_path": around,
    "measures/quadratic_barrier": predicted,
    "measures/layerwise_sharpness": rises,
    "measures/sparse_stragglers": trimmed,
    "measures/activation_correlation": correlations,
    "measures/cka": tables,
    "alignment/convergent_matching": units,
    "alignment/ws_mixup": mixed,
    "alignment/canonicalize": scaled,
    "alignment/soft_trees": flipped,
}

if __name__ == "__main__":
    for page, draw in PICTURES.items():
        (SPEC / f"{page}.svg").write_text(draw(), encoding="utf-8", newline="\n")
        print(SPEC / f"{page}.svg")
