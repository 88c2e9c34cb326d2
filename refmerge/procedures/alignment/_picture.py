"""The pictures of transport: matrices as grids, and a plan as lines that are as wide as what they carry.

python -m refmerge.procedures.alignment._picture      draws those of the pages on otfusion and clafusion
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refmerge.pages import BASE, COLOURS, FAINT, GRID, INK, RESULT, _escape, _g, _n, _svg

CELL, GAP = 40.0, 70.0


def grid(
    x: float, y: float, title: str, M: np.ndarray, rows: Sequence[str], columns: Sequence[str], marked: np.ndarray
) -> list[str]:
    """A matrix of numbers; those that are marked are outlined, and the larger of them darker."""
    body = [_text(x, y - 26, title, INK, "bold")]
    body += [_text(x + CELL * (j + 0.5), y - 8, name, FAINT, anchor="middle") for j, name in enumerate(columns)]
    body += [_text(x - 8, y + CELL * (i + 0.5) + 4, name, FAINT, anchor="end") for i, name in enumerate(rows)]
    for (i, j), value in np.ndenumerate(M):
        shade = f' fill="{RESULT}" fill-opacity="{_n(0.5 * marked[i, j])}"' if marked[i, j] > 0 else ' fill="#fff"'
        left, top = x + CELL * j, y + CELL * i
        body.append(f'<rect x="{_n(left)}" y="{_n(top)}" width="{_n(CELL)}" height="{_n(CELL)}" stroke="{GRID}"{shade}/>')
        body.append(_text(left + CELL / 2, top + CELL / 2 + 4, _g(value), INK, anchor="middle"))
    return body


def strands(
    x: float, y: float, title: str, T: np.ndarray, left: Sequence[str], right: Sequence[str], height: float
) -> list[str]:
    """Units on two sides, and between them lines of the width of T."""
    ends = [
        [(side, y + height * (k + 0.5) / len(names)) for k in range(len(names))]
        for side, names in ((x + 30, left), (x + 190, right))
    ]
    body = [_text(x, y - 26, title, INK, "bold")]
    most = T.max()
    for (i, j), value in np.ndenumerate(T):
        if value > 1e-12:
            (a, b), (c, d) = ends[0][i], ends[1][j]
            width = 14 * value / most
            line = f'stroke="{RESULT}" stroke-opacity="0.45" stroke-width="{_n(width)}"'
            body.append(f'<path d="M{_n(a)} {_n(b)}L{_n(c)} {_n(d)}" {line}/>')
    for points, names, colour, side in zip(ends, (left, right), (COLOURS[0], BASE), (-1, 1)):
        for (a, b), name in zip(points, names):
            body.append(f'<circle cx="{_n(a)}" cy="{_n(b)}" r="9" fill="{colour}"/>')
            body.append(_text(a + 16 * side, b + 4, name, INK, anchor="end" if side < 0 else "start"))
    return body


def _text(x: float, y: float, text: str, colour: str, weight: str = "", anchor: str = "") -> str:
    weight = f' font-weight="{weight}"' if weight else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" fill="{colour}"{weight}{anchor}>{_escape(text)}</text>'


def otfusion_picture() -> str:
    """The worked example of the page: three units into two."""
    from refmerge.procedures.alignment.otfusion import otfusion

    weights = [0.0, 6.0, 12.0], [3.0, 12.0]
    models = [{"fc1.weight": np.array(w)[:, None], "fc2.weight": np.ones((1, len(w)))} for w in weights]
    found = otfusion(*models)
    M, T, K = found.costs["fc1"], found.plans["fc1"], found.maps["fc1"]
    rows, columns = ([_g(w) for w in some] for some in weights)
    y, x = 90.0, 60.0
    body = [_text(16, 24, "otfusion: three units into two", INK, "bold")]
    body.append(_text(16, 42, "by their weights: 0, 6, 12 of model 0 and 3, 12 of model 1", FAINT))
    body += grid(x, y, "cost M", M, rows, columns, np.zeros_like(M))
    x += CELL * 2 + GAP
    body += strands(x, y, "plan T, shown by width", T, rows, columns, 3 * CELL)
    x += 220 + GAP
    body += grid(x, y, "map K", K, rows, [_g(v) for v in found.transported["fc1.weight"].ravel()], K)
    description = (
        "Costs of pairs of units, the plan as lines as wide as what they carry, and its columns divided by their sums."
    )
    return _svg(x + CELL * 2 + 40, y + 3 * CELL + 24, "otfusion: three units into two", description, body)


def clafusion_picture() -> str:
    """The worked example of the page: two hidden layers among four."""
    from refmerge.procedures.alignment.clafusion import cost_matrix, layer_map

    deep, shallow = [8, 6, 4, 2], [8, 3]
    C = cost_matrix(deep, shallow)
    A = layer_map(C)
    T = np.zeros_like(C)
    T[A - 1, range(len(A))] = 1
    y, x = 90.0, 60.0
    body = [_text(16, 24, "clafusion: two hidden layers among four", INK, "bold")]
    body.append(_text(16, 42, "by their widths: 8, 6, 4, 2 of the deep model and 8, 3 of the shallow one", FAINT))
    body += grid(x, y, "cost C", C, [str(n) for n in deep], [str(n) for n in shallow], T)
    x += CELL * 2 + GAP
    body += strands(x, y, "layers that are matched", T, [str(n) for n in deep], [str(n) for n in shallow], 4 * CELL)
    description = "The squared differences of the widths of the layers, and the rising map of the least sum."
    return _svg(x + 250, y + 4 * CELL + 24, "clafusion: two hidden layers among four", description, body)


PICTURES = {"otfusion": otfusion_picture, "clafusion": clafusion_picture}

if __name__ == "__main__":
    import refmerge.spec

    for name, drawn in PICTURES.items():
        (Path(refmerge.spec.__path__[0]) / "alignment" / f"{name}.svg").write_text(drawn(), encoding="utf-8")
