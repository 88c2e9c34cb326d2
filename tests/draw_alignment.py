"""The pictures of zipit, pleas and repair: `python -m tests.draw_alignment` draws them anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refmerge import merge
from refmerge.nets import mlp
from refmerge.pages import COLOURS, FAINT, GRID, INK, RESULT, _g, _n, _svg
from refmerge.procedures.alignment.repair import repair, statistics_of
from refmerge.procedures.alignment.zipit import zip_features

FOLDER = Path(__file__).parent.parent / "spec" / "alignment"


def text(x: float, y: float, what: str, ink: str = INK, more: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" fill="{ink}"{more}>{what}</text>'


def heading(what: str) -> str:
    return text(16, 24, what, more=' font-size="14" font-weight="bold"')


def zipit() -> str:
    """The features of the worked example, and which of them are merged: with a budget and without."""
    S = np.eye(6)
    for i, j, s in ((0, 4, 0.9), (1, 2, 0.8), (1, 3, 0.1), (1, 5, 0.2), (2, 3, 0.3), (3, 5, 0.5)):
        S[i, j] = S[j, i] = s
    names, body = ("a1", "a2", "a3", "b1", "b2", "b3"), [heading("zipit: two models, three features each")]
    for panel, beta in enumerate((1.0, 0.0)):
        left = 30 + 300 * panel
        body.append(text(left - 14, 50, ("beta = 1: within and across", "beta = 0: across only")[panel], FAINT))
        at = {i: (left + 200 * (i // 3), 80 + 44 * (i % 3)) for i in range(6)}
        for g, column in enumerate(zip_features(S, 2, beta=beta).T):
            members = [int(i) for i in np.flatnonzero(column)]
            x, y = left + 100, 80 + 44 * g
            for i in members:
                a, b = at[i]
                body.append(f'<path d="M{_n(a)} {_n(b)}L{_n(x)} {_n(y)}" stroke="{COLOURS[i // 3]}" stroke-width="2"/>')
            body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="7" fill="{RESULT}"/>')
            first, second = members
            body.append(text(x, y - 11, _g(S[first, second]), RESULT, ' text-anchor="middle" font-size="10"'))
        for i, (a, b) in at.items():
            body.append(f'<circle cx="{_n(a)}" cy="{_n(b)}" r="6" fill="{COLOURS[i // 3]}"/>')
            body.append(text(a - 24 if i < 3 else a + 10, b + 4, names[i], COLOURS[i // 3]))
    return _svg(580, 200, "zipit: which features are merged", "Two models' features, and lines to what they become.", body)


def pleas() -> str:
    """The nine blocks of a wide layer."""
    sizes, names = (120, 60, 60), ("merged", "of 1", "of 2")
    blocks = [["(W1 + W2)/2", "W1/2", "W2/2"], ["W1", "W1", "0"], ["W2", "0", "W2"]]
    fill = {"W1": COLOURS[0], "W2": COLOURS[1], "(W": RESULT, "0": "#fff"}
    body, y = [heading("pleas: where the weights of a layer come from"), text(190, 50, "inputs", FAINT)], 76.0
    for i, height in enumerate(sizes):
        x = 90.0
        body.append(text(16, y + height / 2 + 4, names[i]))
        for j, width in enumerate(sizes):
            if i == 0:
                body.append(text(x + width / 2, 68, names[j], more=' text-anchor="middle"'))
            label = blocks[i][j]
            paint = fill[label[:2].rstrip("/")] if label != "0" else fill["0"]
            frame = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" stroke="{GRID}"'
            body.append(f'<rect {frame} fill="{paint}" fill-opacity="0.25"/>')
            body.append(text(x + width / 2, y + height / 2 + 4, label, more=' text-anchor="middle"'))
            x += width
        y += height
    body.append(
        text(
            16,
            y + 22,
            "outputs down, inputs across; W2 in the order of pi; blocks of 0 stay 0 when the layer is fitted",
            FAINT,
        )
    )
    return _svg(560, y + 36, "pleas: the blocks of a wide layer", "Nine blocks: merged units, and units kept apart.", body)


def repair_picture() -> str:
    """Mean standard deviations of the layers of a parent, of the average of two, and of that repaired."""
    rng = np.random.default_rng(0)
    a, b = (mlp.init(rng, [20, 40, 40, 40, 40, 5]) for _ in range(2))
    for model in (a, b):
        for name in model:
            model[name] = model[name] * (2**0.5 if name.endswith("weight") else 1.0)
    x = rng.normal(size=(500, 20))
    average = merge([a, b], "linear")
    taps = [f"layers.{i}.weight" for i in range(4)]
    models = {"a parent": a, "the average": average, "repaired": repair(average, [a, b], mlp.forward, [x]).model}
    colours = dict(zip(models, (COLOURS[0], FAINT, RESULT)))
    body = [heading("repair: standard deviations, layer by layer")]
    for k, (name, model) in enumerate(models.items()):
        body.append(f'<rect x="{_n(16 + 120 * k)}" y="38" width="10" height="10" fill="{colours[name]}"/>')
        body.append(text(32 + 120 * k, 47, name))
        for i, s in enumerate(statistics_of(model, mlp.forward, [x], taps).values()):
            spread = float(np.sqrt(s.var).mean())
            left, tall = 30 + 110 * i + 28 * k, 90 * spread
            body.append(f'<rect x="{_n(left)}" y="{_n(220 - tall)}" width="22" height="{_n(tall)}" fill="{colours[name]}"/>')
            body.append(text(left + 11, 216 - tall, f"{spread:.2f}", more=' text-anchor="middle" font-size="9"'))
    for i in range(4):
        body.append(text(30 + 110 * i, 236, f"layer {i + 1}", FAINT))
    body.append(f'<path d="M16 220h440" stroke="{GRID}"/>')
    return _svg(470, 250, "repair: standard deviations", "Three bars for each of four layers.", body)


PICTURES = {"zipit": zipit, "pleas": pleas, "repair": repair_picture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8", newline="\n")
        print(FOLDER / f"{name}.svg")
