"""Plots of a loss along a path, as SVG made by hand like the pictures of the pages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from refmerge.errors import UsageError
from refmerge.pages import COLOURS, FAINT, GRID, INK, RESULT, _escape, _g, _n, _svg

__all__ = ["draw_paths"]

WIDE, HIGH, LEFT, TOP = 420.0, 220.0, 64.0, 58.0


def draw_paths(paths: Mapping[str, Any], title: str, label: str = "loss") -> str:
    """The losses of loss_barrier's results over t, by label, each with the line between its ends and its barrier. UsageError
    where there is nothing finite to draw."""
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
        if math.isfinite(path.losses[0]) and math.isfinite(path.losses[-1]):
            (x0, y0), (x1, y1) = at(0, path.losses[0]), at(1, path.losses[-1])
            line = f"M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}"
            body.append(f'<path d="{line}" stroke="{colour}" stroke-dasharray="3 3" fill="none"/>')
        body += [f'<path d="M{piece}" stroke="{colour}" stroke-width="2" fill="none"/>' for piece in pieces(path, at)]
        if path.barrier > 0 and math.isfinite(path.barrier):
            k = path.t.index(path.at)
            x, y = at(path.at, path.losses[k])
            body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3.5" fill="{RESULT}"/>')
        word = f"{name}: barrier {_g(path.barrier)}" if name else f"barrier {_g(path.barrier)}"
        body.append(f'<text x="{_n(LEFT)}" y="{_n(TOP + HIGH + 38 + 16 * i)}" fill="{colour}">{_escape(word)}</text>')
    height = TOP + HIGH + 38 + 16 * len(paths)
    return _svg(LEFT + WIDE + 28, height, title, "The loss along a path between two models.", body)


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
