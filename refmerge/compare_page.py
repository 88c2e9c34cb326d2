"""A comparison of two models, or what one holds, as a page by itself: what there is to say, plots by layer, all tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from refmerge.compare import FINER, KINDS, Comparison, Tensor, digits, shown
from refmerge.errors import UsageError
from refmerge.inspection import Inspection, Values, dimensions
from refmerge.plots import draw_layers

__all__ = ["inspected", "page"]

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:90em;margin:2em auto;padding:0 1em;color:#1b1f24;background:#fff}"
    "table{border-collapse:collapse;font-size:13px}th,td{border:1px solid #c9ced6;padding:.2em .5em;text-align:right;"
    "white-space:nowrap}th{background:#f3f5f8}th:first-child,td:first-child{text-align:left}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.2em 1em}dt{font-weight:600}dd{margin:0}"
    "figure{display:flex;flex-wrap:wrap;margin:0}svg{max-width:100%;height:auto}.wide{overflow-x:auto}"
)


def page(found: Comparison, a: str, b: str, base: str | None = None, by: str = "relative") -> str:
    """HTML without scripts and without anything from elsewhere. a, b, base: what the models are called. by: the order of the
    tensors that differ, as in Comparison.most; the equal ones follow."""
    named = [("A", shown(a)), ("B", shown(b)), *([("base", shown(base))] if base is not None else [])]
    equal = [x for x in found.tensors.values() if not x.differing]
    plotted = {"relative": "distance, |A - B| / |A|", "cosine": "cosine of A and B"}
    return _document(
        f"{shown(a)} and {shown(b)} compared", [*named, *found.summary()], _plots(found.by_layer(), plotted),
        f"The most different first, by {by}; a dash where there is no such number.",
        _compared(found, [*found.most(by), *equal]),
    )  # fmt: skip


def inspected(found: Inspection, name: str, facts: Sequence[tuple[str, str]], by: str = "norm") -> str:
    """The same of one checkpoint. facts: what its headers say, before what its values do."""
    plotted = {"root_mean_square": "root of the entries' mean square", "largest": "greatest magnitude"}
    return _document(
        f"{shown(name)} inspected", [*facts, *found.summary()], _plots(found.by_layer(), plotted),
        f"Those with NaN or infinities first, then by {by}; a dash where there is no such number.",
        _held(found, found.most(by)),
    )  # fmt: skip


def _document(
    title: str, facts: Sequence[tuple[str, str]], plots: Sequence[str], order: str, table: Sequence[str]
) -> str:  # fmt: skip
    said = [f"<dt>{escape(label)}</dt><dd>{escape(sentence)}</dd>" for label, sentence in facts]
    return "\n".join(
        [
            "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>", f"<h1>{escape(title)}</h1>", "<dl>", *said, "</dl>",
            "<h2>By layer</h2>", *plots,
            "<h2>Tensors</h2>", f"<p>{escape(order)}</p>",
            '<div class="wide">', "<table>", *table, "</table>", "</div>", "</html>\n",
        ]
    )  # fmt: skip


def _plots(by_layer: Mapping[str, Mapping[str, Mapping[int, Any]]], plotted: Mapping[str, str]) -> list[str]:
    """A plot of each number for each place where layers stand, if there are several layers there."""
    drawn = []
    for stack, kinds in by_layer.items():
        if len({layer for groups in kinds.values() for layer in groups}) < 2:
            continue
        drawn.append("<figure>")
        for key, label in plotted.items():
            series = {kind: {n: getattr(group, key) for n, group in kinds.get(kind, {}).items()} for kind in KINDS}
            try:
                drawn.append(draw_layers(series, f"{shown(stack)}N: {key.replace('_', ' ')}", label).strip())
            except UsageError:
                drawn.append(f"<p>{escape(shown(stack))}N: no finite {label}.</p>")
        drawn.append("</figure>")
    if not drawn:
        return ["<p>The names of the tensors have no numbers of several layers.</p>"]
    return [f"<p>All tensors of a kind in a layer as one: {', '.join(KINDS)}, by their names.</p>", *drawn]


def _compared(found: Comparison, tensors: list[Tensor]) -> list[str]:
    columns = found.columns()
    columns[columns.index("largest") : columns.index("differing") + 1] = ["distance", "largest", "differing", "equal"]
    odd = ["NaN A", "NaN B", "infinite A", "infinite B"] if any((*found.whole.nan, *found.whole.infinite)) else []
    rows = [_row("th", ["tensor", "shape", "dtype", "|A|", "|B|", *columns, *odd])]
    for x in tensors:
        numbers = [digits(getattr(x, key), 6 if key in FINER else 3) for key in columns]
        shape, dtypes = " \u00d7 ".join(map(str, x.shape)), ", ".join(dict.fromkeys(x.dtypes))
        counts = [digits(count) for count in (*x.nan, *x.infinite)] if odd else []
        rows.append(_row("td", [shown(x.name), shape, dtypes, *map(digits, x.norm), *numbers, *counts]))
    return rows


def _held(found: Inspection, tensors: list[Values]) -> list[str]:
    columns = found.columns()
    odd = "nan" in columns
    rows = [_row("th", ["tensor", "shape", "dtype", "bytes", *columns, *["first"] * odd])]
    for x in tensors:
        numbers = [digits(getattr(x, key)) for key in columns]
        first = [str(list(x.first)) if x.first is not None else ""] * odd
        rows.append(_row("td", [shown(x.name), dimensions(x), x.dtype, digits(x.nbytes), *numbers, *first]))
    return rows


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
