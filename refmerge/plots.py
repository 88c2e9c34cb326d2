"""Plots of losses along a path, of a search, and of numbers over a size, as SVG made by hand like the pages' pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from refmerge.errors import UsageError
from refmerge.pages import COLOURS, FAINT, GRID, INK, RESULT, _escape, _g, _n, _svg

__all__ = ["draw_layers", "draw_paths", "draw_search", "draw_series"]

WIDE, HIGH, LEFT, TOP = 420.0, 220.0, 64.0, 58.0


def draw_paths(
    paths: Mapping[str, Any], title: str, label: str = "loss", *, word: str = "barrier", chords: bool = True
) -> str:
    """The losses of loss_barrier's results over t, by label, each with the line between its ends, if chords are wanted, and
    its barrier, or what the word says that it is. UsageError where there is nothing finite to draw."""
    finite = [value for path in paths.values() for value in path.losses if math.isfinite(value)]
    if not finite:
        raise UsageError("there is no plot of losses none of which is finite")
    low, high = min(finite), max(finite)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def at(t: float, value: float) -> tuple[float, float]:
        return LEFT + t * WIDE, TOP + (high - value) / (high - low) * HIGH

    body = [f'<text x="16" y="24" font-size="14" font-weight="bold" fill="{INK}">{_escape(title)}</text>']
    for value in ticks(low, high):
        _, y = at(0, value)
        body.append(f'<path d="M{_n(LEFT)} {_n(y)}h{_n(WIDE)}" stroke="{GRID}"/>')
        body.append(f'<text x="{_n(LEFT - 8)}" y="{_n(y + 4)}" text-anchor="end" fill="{FAINT}">{_g(value)}</text>')
    for t in (0.0, 0.5, 1.0):
        x, y = at(t, low)
        body.append(f'<text x="{_n(x)}" y="{_n(y + 18)}" text-anchor="middle" fill="{FAINT}">{_g(t)}</text>')
    body.append(f'<text x="{_n(LEFT - 8)}" y="{_n(TOP - 10)}" text-anchor="end" fill="{FAINT}">{_escape(label)}</text>')
    body.append(f'<text x="{_n(LEFT + WIDE + 10)}" y="{_n(TOP + HIGH + 18)}" fill="{FAINT}">t</text>')
    for i, (name, path) in enumerate(paths.items()):
        colour = COLOURS[i % len(COLOURS)]
        if chords and math.isfinite(path.losses[0]) and math.isfinite(path.losses[-1]):
            (x0, y0), (x1, y1) = at(0, path.losses[0]), at(1, path.losses[-1])
            line = f"M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}"
            body.append(f'<path d="{line}" stroke="{colour}" stroke-dasharray="3 3" fill="none"/>')
        body += [f'<path d="M{piece}" stroke="{colour}" stroke-width="2" fill="none"/>' for piece in pieces(path, at)]
        if path.barrier > 0 and math.isfinite(path.barrier):
            k = path.t.index(path.at)
            x, y = at(path.at, path.losses[k])
            body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3.5" fill="{RESULT}"/>')
        said = f"{name}: {word} {_g(path.barrier)}" if name else f"{word} {_g(path.barrier)}"
        body.append(f'<text x="{_n(LEFT)}" y="{_n(TOP + HIGH + 38 + 16 * i)}" fill="{colour}">{_escape(said)}</text>')
    height = TOP + HIGH + 38 + 16 * len(paths)
    return _svg(LEFT + WIDE + 28, height, title, "The loss along a path between two models.", body)


def draw_series(series: Mapping[str, Mapping[float, Any]], title: str, label: str, along: str) -> str:
    """What several measurements at each of some sizes give: their means joined, bars from the smallest to the largest. Both
    axes are logarithmic. UsageError where a number or a size is not finite and above 0."""
    numbers = [float(y) for points in series.values() for ys in points.values() for y in ys]
    sizes = sorted({float(x) for points in series.values() for x in points})
    if not numbers or not all(0 < x < math.inf for x in (*numbers, *sizes)):
        raise UsageError("a plot with logarithmic axes has numbers and sizes that are finite and above 0")
    low, high = (math.log10(x) for x in (min(numbers), max(numbers)))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    span = math.log(sizes[-1] / sizes[0]) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + math.log(x / sizes[0]) / span * WIDE, TOP + (high - math.log10(y)) / (high - low) * HIGH

    rules = [k * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for k in (1, 2, 5)]
    body = [f'<text x="16" y="24" font-size="14" font-weight="bold" fill="{INK}">{_escape(title)}</text>']
    for value in (rule for rule in rules if low <= math.log10(rule) <= high):
        _, y = at(sizes[0], value)
        body.append(f'<path d="M{_n(LEFT)} {_n(y)}h{_n(WIDE)}" stroke="{GRID}"/>')
        body.append(f'<text x="{_n(LEFT - 12)}" y="{_n(y + 4)}" text-anchor="end" fill="{FAINT}">{_g(value)}</text>')
    for size in sizes:
        x, y = at(size, 10**low)
        body.append(f'<text x="{_n(x)}" y="{_n(y + 18)}" text-anchor="middle" fill="{FAINT}">{_g(size)}</text>')
    body.append(f'<text x="{_n(LEFT - 12)}" y="{_n(TOP - 10)}" text-anchor="end" fill="{FAINT}">{_escape(label)}</text>')
    body.append(f'<text x="{_n(LEFT + WIDE + 16)}" y="{_n(TOP + HIGH + 18)}" fill="{FAINT}">{_escape(along)}</text>')
    for i, (name, points) in enumerate(series.items()):
        colour, aside = COLOURS[i % len(COLOURS)], 3 * (i - (len(series) - 1) / 2)
        means = []
        for size, ys in points.items():
            x, y = at(size, sum(map(float, ys)) / len(ys))
            x, (_, top), (_, bottom) = x + aside, at(size, float(max(ys))), at(size, float(min(ys)))
            means.append(f"{_n(x)} {_n(y)}")
            body.append(f'<path d="M{_n(x)} {_n(top)}V{_n(bottom)}" stroke="{colour}"/>')
            body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3" fill="{colour}"/>')
        body.append(f'<path d="M{"L".join(means)}" stroke="{colour}" stroke-width="2" fill="none"/>')
        body.append(f'<text x="{_n(LEFT)}" y="{_n(TOP + HIGH + 38 + 16 * i)}" fill="{colour}">{_escape(name)}</text>')
    height = TOP + HIGH + 30 + 16 * len(series)
    return _svg(LEFT + WIDE + 60, height, title, f"{label} over {along}: means, and bars over all measurements.", body)


def pieces(path: Any, at: Any) -> list[str]:
    """The curve, cut where it is not finite."""
    found: list[list[str]] = [[]]
    for t, value in zip(path.t, path.losses):
        if math.isfinite(value):
            x, y = at(t, value)
            found[-1].append(f"{_n(x)} {_n(y)}")
        else:
            found.append([])
    return ["L".join(points) for points in found if len(points) > 1]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(k for k in (5, 2, 1) if (high - low) / (k * step) >= 3 or k == 1)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_search(scores: Sequence[float]) -> str:
    """The scores of the trials of a search, and the best so far. UsageError where there is nothing finite to draw."""
    finite = [s for s in scores if math.isfinite(s)]
    if not finite:
        raise UsageError("there is no plot of scores none of which is finite")
    low, high = min(finite), max(finite)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    last = max(len(scores) - 1, 1)

    def at(i: int, value: float) -> tuple[float, float]:
        return LEFT + i / last * WIDE, TOP + (high - value) / (high - low) * HIGH

    title = f"{len(scores)} trials, the best {_g(max(finite))}"
    body = [f'<text x="16" y="24" font-size="14" font-weight="bold" fill="{INK}">{title}</text>']
    for value in ticks(low, high):
        _, y = at(0, value)
        body.append(f'<path d="M{_n(LEFT)} {_n(y)}h{_n(WIDE)}" stroke="{GRID}"/>')
        body.append(f'<text x="{_n(LEFT - 8)}" y="{_n(y + 4)}" text-anchor="end" fill="{FAINT}">{_g(value)}</text>')
    for i in sorted({0, last}):
        x, y = at(i, low)
        body.append(f'<text x="{_n(x)}" y="{_n(y + 18)}" text-anchor="middle" fill="{FAINT}">{i}</text>')
    best, line = -math.inf, ""
    for i, value in enumerate(scores):
        if math.isfinite(value):
            x, y = at(i, value)
            body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="2" fill="{COLOURS[0]}"/>')
        if value > best and math.isfinite(value):
            x, y = at(i, value)
            line, best = f"{line}H{_n(x)}V{_n(y)}" if line else f"M{_n(x)} {_n(y)}", value
    body.append(f'<path d="{line}H{_n(LEFT + WIDE)}" stroke="{RESULT}" stroke-width="2" fill="none"/>')
    return _svg(LEFT + WIDE + 28, TOP + HIGH + 30, title, "The score of each trial of a search, and the best so far.", body)


def draw_layers(series: Mapping[str, Mapping[int, float | None]], title: str, label: str) -> str:
    """Numbers by layer, a line and dots for each of the series; where there is no number, or it is not finite, a gap. A
    series without numbers takes a colour and nothing else, so that the others keep theirs. UsageError where there is nothing
    finite to draw."""
    known = {
        name: {layer: y for layer, y in points.items() if y is not None and math.isfinite(y)}
        for name, points in series.items()
    }
    finite = [y for points in known.values() for y in points.values()]
    if not finite:
        raise UsageError("there is no plot of numbers by layer none of which is finite")
    low, high = min(finite), max(finite)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-290):
        aside = max(abs(low) / 2, 0.5)
        low, high = low - aside, high + aside
    layers = [layer for points in series.values() for layer in points]
    first, span = min(layers), max(layers) - min(layers) or 1

    def at(layer: float, value: float) -> tuple[float, float]:
        return LEFT + (layer - first) / span * WIDE, TOP + (high - value) / (high - low) * HIGH

    body = [f'<text x="16" y="24" font-size="14" font-weight="bold" fill="{INK}">{_escape(title)}</text>']
    marks = ticks(low, high)
    for value in marks:
        _, y = at(first, value)
        body.append(f'<path d="M{_n(LEFT)} {_n(y)}h{_n(WIDE)}" stroke="{GRID}"/>')
        word = _apart(value, marks)
        body.append(f'<text x="{_n(LEFT - 8)}" y="{_n(y + 4)}" text-anchor="end" fill="{FAINT}">{word}</text>')
    step = max(1, -(-span // 12))
    for layer in range(first, max(layers) + 1, step):
        x, y = at(layer, low)
        body.append(f'<text x="{_n(x)}" y="{_n(y + 20)}" text-anchor="middle" fill="{FAINT}">{layer}</text>')
    body.append(f'<text x="16" y="{_n(TOP - 14)}" fill="{FAINT}">{_escape(label)}</text>')
    body.append(f'<text x="{_n(LEFT + WIDE)}" y="{_n(TOP + HIGH + 38)}" text-anchor="end" fill="{FAINT}">layer</text>')
    for i, (name, points) in enumerate(known.items()):
        if not points:
            continue
        colour = COLOURS[i % len(COLOURS)]
        places = {layer: at(layer, y) for layer, y in sorted(points.items())}
        line = ""
        for layer, (x, y) in places.items():
            line += f"{'L' if layer - 1 in places else 'M'}{_n(x)} {_n(y)}"
            body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="2.5" fill="{colour}"/>')
        body.append(f'<path d="{line}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
        x = LEFT + i * WIDE / 5
        body.append(f'<text x="{_n(x)}" y="{_n(TOP + HIGH + 38)}" fill="{colour}">{_escape(name)}</text>')
    return _svg(LEFT + WIDE + 28, TOP + HIGH + 50, title, f"{label} by layer.", body)


def _apart(value: float, marks: Sequence[float]) -> str:
    """A mark's label, with so many digits that it is another than its neighbours'."""
    step = min((b - a for a, b in pairwise(marks)), default=0.0)
    largest = max(map(abs, marks))
    digits = 3 if not step else max(3, math.ceil(math.log10(largest / step)) + 1)
    text = f"{value:.{digits}g}" if abs(value) > step / 2 else "0"
    return text.replace("-", "\u2212")
