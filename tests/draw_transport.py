"""The pictures of git_rebasin, otfusion and clafusion, plans as lines as wide as what they carry:
`python -m tests.draw_transport` draws them anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refmerge.pages import BASE, COLOURS, FAINT, GRID, INK, RESULT, _g, _n, _svg
from refmerge.procedures.alignment.clafusion import cost_matrix, layer_map
from refmerge.procedures.alignment.git_rebasin import cost, git_rebasin
from refmerge.procedures.alignment.otfusion import otfusion
from refmerge.symmetry import Spec
from tests.draw_alignment import FOLDER, heading, text

CELL, GAP, TOP = 40.0, 70.0, 90.0
BOLD, MIDDLE, END = ' font-weight="bold"', ' text-anchor="middle"', ' text-anchor="end"'


def grid(x: float, title: str, M: np.ndarray, rows: Sequence[str], columns: Sequence[str], shade: np.ndarray) -> list[str]:
    """A matrix of numbers, each as dark as `shade`."""
    body = [text(x, TOP - 26, title, more=BOLD)]
    body += [text(x + CELL * (j + 0.5), TOP - 8, name, FAINT, MIDDLE) for j, name in enumerate(columns)]
    body += [text(x - 8, TOP + CELL * (i + 0.5) + 4, name, FAINT, END) for i, name in enumerate(rows)]
    for (i, j), value in np.ndenumerate(M):
        left, top = x + CELL * j, TOP + CELL * i
        fill = f'fill="{RESULT}" fill-opacity="{_n(0.5 * shade[i, j])}"' if shade[i, j] > 0 else 'fill="#fff"'
        body.append(f'<rect x="{_n(left)}" y="{_n(top)}" width="{_n(CELL)}" height="{_n(CELL)}" stroke="{GRID}" {fill}/>')
        body.append(text(left + CELL / 2, top + CELL / 2 + 4, _g(value), INK, MIDDLE))
    return body


def strands(x: float, title: str, T: np.ndarray, left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Units on two sides, and between them lines of the width of T."""
    height = CELL * len(left)
    ends = [
        [(side, TOP + height * (k + 0.5) / len(names)) for k in range(len(names))]
        for side, names in ((x + 30, left), (x + 190, right))
    ]
    body = [text(x, TOP - 26, title, more=BOLD)]
    for (i, j), value in np.ndenumerate(T):
        if value > 1e-12:
            (a, b), (c, d) = ends[0][i], ends[1][j]
            line = f'stroke="{RESULT}" stroke-opacity="0.45" stroke-width="{_n(14 * value / T.max())}"'
            body.append(f'<path d="M{_n(a)} {_n(b)}L{_n(c)} {_n(d)}" {line}/>')
    for points, names, colour, side in zip(ends, (left, right), (COLOURS[0], BASE), (-1, 1)):
        for (a, b), name in zip(points, names):
            body.append(f'<circle cx="{_n(a)}" cy="{_n(b)}" r="9" fill="{colour}"/>')
            body.append(text(a + 16 * side, b + 4, name, more=END if side < 0 else ""))
    return body


def units() -> str:
    """The worked example of otfusion."""
    weights = [0.0, 6.0, 12.0], [3.0, 12.0]
    three, two = ({"fc1.weight": np.array(w)[:, None], "fc2.weight": np.ones((1, len(w)))} for w in weights)
    found = otfusion([two, three])
    M, T, K = (getattr(found.transports[0], of)["fc1"] for of in ("costs", "plans", "maps"))
    rows, columns = ([_g(w) for w in some] for some in weights)
    places = [_g(v) for v in found.models[1]["fc1.weight"].ravel()]
    title = "otfusion: three units into two"
    body = [heading(title), text(16, 42, "by their weights: 0, 6, 12, and 3, 12 of the first model", FAINT)]
    body += grid(60, "cost M", M, rows, columns, np.zeros_like(M))
    body += strands(210, "plan T", T, rows, columns)
    body += grid(500, "map K", K, rows, places, K)
    about = "Costs of pairs of units, the plan as lines as wide as what they carry, and its columns divided by their sums."
    return _svg(620, TOP + 3 * CELL + 24, title, about, body)


def layers() -> str:
    """The worked example of clafusion."""
    widths = [8, 6, 4, 2], [8, 3]
    C = cost_matrix(*widths)
    T = np.zeros_like(C)
    T[layer_map(C) - 1, range(2)] = 1
    deep, shallow = ([str(n) for n in some] for some in widths)
    title = "clafusion: two hidden layers among four"
    body = [heading(title), text(16, 42, "by their widths: 8, 6, 4, 2, and 8, 3 of the shallow model", FAINT)]
    body += grid(60, "cost C", C, deep, shallow, T)
    body += strands(210, "layers that are matched", T, deep, shallow)
    about = "The squared differences of the layers' widths, and the rising map of the least sum."
    return _svg(460, TOP + 4 * CELL + 24, title, about, body)


def shuffle() -> str:
    """A layer of five units, the same shuffled, and what the matching makes of that."""
    spec = Spec({"fc1.weight": ("P", None), "fc2.weight": (None, "P")})
    rng = np.random.default_rng(2)
    a = {"fc1.weight": rng.integers(-4, 5, (5, 3)).astype(float), "fc2.weight": rng.integers(-4, 5, (1, 5)).astype(float)}
    b = spec.apply({"P": np.array([3, 0, 4, 1, 2])}, a)
    found = git_rebasin([a, b], spec)
    p = found.permutations[1]["P"]
    C = cost("P", a, b, spec, {})
    chosen = np.zeros_like(C)
    chosen[range(5), p] = 1
    title = "git_rebasin: a permutation that undoes a shuffle"
    body = [heading(title), text(16, 42, "b is a with its hidden units in another order", FAINT)]
    names, given = [f"a{i}" for i in range(5)], [f"b{i}" for i in range(5)]
    inputs = ["x0", "x1", "x2"]
    none = np.zeros((5, 3))
    body += grid(40, "fc1 of a", a["fc1.weight"], names, inputs, none)
    body += grid(220, "fc1 of b", b["fc1.weight"], given, inputs, none)
    body += grid(400, "inner products of units", C, names, given, chosen)
    body += grid(660, "fc1 of b, put in order", found.models[1]["fc1.weight"], [f"b{k}" for k in p], inputs, none)
    about = "The weights of a layer, of the same layer shuffled, and the inner products of their units, the best marked."
    return _svg(840, TOP + 5 * CELL + 24, title, about, body)


PICTURES = {"git_rebasin": shuffle, "otfusion": units, "clafusion": layers}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8", newline="\n")
        print(FOLDER / f"{name}.svg")
