"""The page spec/results.md, made of the stored numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from textwrap import fill
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from refmerge.demo.claims import table
from refmerge.demo.claims.claim import Claim
from refmerge.demo.claims.papers import CLAIMS
from refmerge.demo.claims.table import DATA, EACH, ENDS, ONE, ROUTED, ROWS, Row
from refmerge.demo.claims.world import TASKS

__all__ = ["identity", "page", "verdict"]

Results = Mapping[str, Any]

INTRO = """\
# The papers' claims, in small

What the papers on model merging say, tried on small networks that read handwritten digits: a row for each system, and the
accuracy of every method on the same eight tasks. This page is made by one command, from nothing but the seeds:

    python -m refmerge.demo.claims spec             numbers into spec/results.json, and this page of them; three minutes
                                                    of a processor
    python -m refmerge.demo.claims spec --page      the page again, from the numbers there
    python -m refmerge.demo.claims --only adapters table.ties --seeds 0    parts of it, printed

**Networks of 26,000 weights on pictures of 64 pixels are no evidence about large models.** They show whether an
implementation does what its paper describes, and where a claim leans on size, on overparametrisation or on tasks that
have little to do with each other. A claim that fails here is not refuted, and one that holds is not shown for anything
else.

{made}

## How it is measured

The demo's digits: {train} images to train on, {val} to choose settings on, {test} that neither training nor any choice
sees. All numbers are of the last, in per cent of right answers unless their name says otherwise. Networks are perceptrons
with two hidden layers of 128 units and ReLU, trained in float64 with momentum 0.9 in batches of 32. The base sees 200
images of each of eight tasks, for ten epochs at the rate 0.005. Each task has a fine-tune of the base, ten epochs on all
of its images, with the base's last layer put back, as the papers' vision models share what stands in for theirs. The
tasks:

{tasks}

Whatever the task, the answer is among all ten digits.

**Seeds** are {seeds}; each means another base and other fine-tunes. Settings of the experiments (widths,
rates, epochs, tasks) were tried on the seeds 1000 and 1001 only. What is claimed and when it counts was written down
before these seeds were run. Numbers are means ± standard deviations over the seeds, not of the mean.

**Parameters** are the defaults of the methods' pages, which are the papers' or their code's, unless a row says otherwise.
Where a paper searches the scale of the merged task vector, it is searched here too: among 0.1, 0.2, ... 1.5 for the best
mean on validation images, for each seed, the smallest of equal ones. Nothing else is chosen, and nothing on test images.
Gram matrices get a millionth of their mean diagonal added, for units that are dead in all models. AdaMerging and Model
Tinting see training images without labels, 500 steps of two batches of 16 for each task.

A claim **holds** where its condition, printed in its row, is met with every seed; with one seed of five or none the
answer is **no**; between these it is **unclear**: five runs cannot say.
"""

TABLE = """\
## Every method on the eight tasks

The mean accuracy over the tasks. "Chosen": with the scale that is best on validation images, whose median over the seeds
stands before it. "Says": what a paper puts the method above, with the seeds for which that is so here; by the chosen
scale where there is one. ViT-B/32: published accuracies of CLIP models on eight other tasks, from FusionBench's
documentation (F) and from the table of ESM's repository (E), for the order alone.
"""

HEAD = "| method | parameters | defaults | chosen | says | F | E |\n|---|---|---:|---:|---|---:|---:|"

LIMITS = """\
## What this cannot say

- Eight tasks that share their ten outputs, most of their pixels and two small layers are harder to merge than the
  papers', and their fine-tunes move far for their size: where papers scale a sum of task vectors by 0.3 to 1, it is here
  by 0.1 to 0.5.
- Papers' baselines are tuned as the papers say; here everyone has the same rule. An order between two methods that lie
  within a standard deviation means nothing.
- One network, one kind of data, five seeds. Another width or another choice of tasks may turn a row round.
- Mixtures of experts that are trained as such have no row, nor have methods of tools that no paper makes a claim for (slerp,
  nuslerp, nearswap, arcee_fusion); some of them stand in the table of methods.

More on networks that were trained apart, by width and by depth: [alignment.md](alignment.md).
"""

WORDS = {
    "0 to 4": "only these digits",
    "5 to 9": "only these digits",
    "turned": "by a quarter",
    "mirrored": "left and right",
    "noisy": "with Gaussian noise of 6 on pixels of 0 to 16",
    "shifted": "by two pixels, round the edge",
    "inverted": "black for white",
    "thick": "each pixel as dark as the one above it, if that is darker",
}

TITLES = {
    "averaging": "Averages",
    "task_vectors": "Task vectors",
    "subspaces": "Subspaces",
    "data_driven": "With data",
    "alignment": "Networks trained apart",
    "adapters": "Adapters",
    "experts": "Experts",
}


def page(results: Results) -> str:
    """The whole text."""
    sizes = results["images"]
    about = {
        "made": fill(results["made"], 122),
        "tasks": "\n".join(f"- {name}: {WORDS[name]}" for name in TASKS),
        "seeds": f"{', '.join(map(str, results['seeds'][:-1]))} and {results['seeds'][-1]}"
        if len(results["seeds"]) > 1
        else str(results["seeds"][0]),
        **sizes,
    }
    parts = [INTRO.format(**about), summary(results), *sections(results), methods(results), LIMITS]
    return "\n".join(part for part in parts if part)


def summary(results: Results) -> str:
    """How many claims hold."""
    found: dict[str, list[str]] = {"yes": [], "no": [], "unclear": []}
    for claim, numbers in tried(results):
        found[verdict(claim, numbers).partition(",")[0]].append(claim.system)
    systems = {name for names in found.values() for name in names}
    total, (yes, no, unclear) = sum(map(len, found.values())), (len(names) for names in found.values())
    return (
        f"## Summary\n\nOf {total} claims about {len(systems)} systems {yes} hold, {no} do not, and {unclear} are unclear. "
        "Below each table\nstands what does not come out as its paper says, with a guess at the reason.\n\n"
        f"- A claim does not hold: {counted(found['no'])}.\n- It is unclear: {counted(found['unclear'])}.\n"
    )


def counted(names: Sequence[str]) -> str:
    """Each name once, with how often it is there."""
    count = Counter(names)
    return ", ".join(link(name) + (f" ({k} of them)" if k > 1 else "") for name, k in count.items()) or "none"


def tried(results: Results, families: Iterable[str] = tuple(CLAIMS)) -> list[tuple[Claim, dict[str, list[float]]]]:
    """Claims with their numbers, of those that were measured."""
    found = []
    for family in families:
        for claim in CLAIMS[family]:
            numbers = numbers_of(claim, results)
            if all(key in numbers for key in claim.shown):
                found.append((claim, numbers))
    return found


def numbers_of(claim: Claim, results: Results) -> dict[str, list[float]]:
    if claim.measure is table.best:
        rows = results["table"].items()
        return {name: [default if chosen is None else chosen for default, _, chosen in row] for name, row in rows}
    return dict(results["claims"].get(identity(claim), {}))


def identity(claim: Claim) -> str:
    """The name of what measures a claim, under which its numbers are stored."""
    return f"{claim.measure.__module__.rpartition('.')[2]}.{claim.measure.__name__}"


def each(numbers: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """The numbers of each seed."""
    return [dict(zip(numbers, values)) for values in zip(*numbers.values(), strict=True)]


def verdict(claim: Claim, numbers: Mapping[str, Sequence[float]]) -> str:
    """yes, no or unclear, and for how many seeds the claim holds."""
    found = [claim.holds(seed) for seed in each(numbers)]
    k, n = sum(found), len(found)
    word = "yes" if k == n else "no" if 5 * k <= n else "unclear"
    return f"{word}, {k} of {n}"


def sections(results: Results) -> list[str]:
    text = []
    for family, title in TITLES.items():
        found = tried(results, [family])
        if not found:
            continue
        lines = ["| system | it is said | tried here | numbers | holds if | holds |", "|---|---|---|---|---|---|"]
        doubts = []
        for claim, numbers in found:
            answer = verdict(claim, numbers)
            shown = "; ".join(f"{key}: {spread(numbers[key])}" for key in claim.shown)
            condition = "; ".join(map(str, claim.checks))
            lines.append(f"| {link(claim.system)} | {claim.says} | {claim.tried} | {shown} | {condition} | {answer} |")
            if not answer.startswith("yes"):
                doubts.append(f"- **{claim.system}**, {answer}. {claim.says}. Perhaps: {claim.why}")
        text.append("\n".join([f"## {title}", "", *lines, ""]))
        if doubts:
            text.append("\n".join(["Not as it is said, or not with every seed:", "", *doubts, ""]))
    return text


def spread(values: Sequence[float]) -> str:
    x = np.asarray(values)
    places = 1 if abs(x.mean()) >= 10 else 2 if abs(x.mean()) >= 1 else 3
    return f"{x.mean():.{places}f} ± {x.std(ddof=1) if len(x) > 1 else 0.0:.{places}f}"


def link(name: str) -> str:
    """To the page of a method, if it has one."""
    word = name.partition(",")[0].rstrip("+")
    folder = pages().get(word)
    return name if folder is None else f"[{name}]({folder}{word}.md)"


@cache
def pages() -> dict[str, str]:
    """Name -> folder of all pages."""
    root = resources.files("refmerge.spec")
    found = {"symmetry": ""}
    for folder in root.iterdir():
        if folder.is_dir():
            found |= {p.name.removesuffix(".md"): f"{folder.name}/" for p in folder.iterdir() if p.name.endswith(".md")}
    return found


def methods(results: Results) -> str:
    """The table of methods."""
    if not results["table"]:
        return ""
    says: dict[str, list[str]] = {}
    for claim, numbers in tried(results):
        if claim.measure is table.best:
            for check in claim.checks:
                k = sum(check.holds(seed) for seed in each(numbers))
                says.setdefault(str(check.better), []).append(f"{check.bound}: {k} of {len(results['seeds'])}")
    lines = [TABLE, HEAD]
    for kind in (ENDS, ONE, DATA, ROUTED, EACH):
        rows = [row for row in ROWS if row.kind == kind and row.name in results["table"]]
        lines += [f"| **{kind}** | | | | | | |"] if rows else []
        lines += [line(row, results["table"][row.name], says.get(row.name, [])) for row in rows]
    return "\n".join([*lines, "", ranks(results), ""])


def line(row: Row, found: Sequence[Sequence[float]], says: Sequence[str]) -> str:
    defaults = spread([f[0] for f in found])
    chosen = "" if row.scale is None else f"{np.median([f[1] for f in found]):g}: {spread([f[2] for f in found])}"
    given = row.given + (f"; {row.scale.strip('_')} chosen" if row.scale else "")
    published = ["" if x is None else f"{x:.1f}" for x in (row.fusionbench, row.esm)]
    cells = [link(row.name), given.removeprefix("; "), defaults, chosen, "; ".join(says), *published]
    return "| " + " | ".join(cells) + " |"


def ranks(results: Results) -> str:
    """How the order of methods agrees with what is published."""
    parts = []
    for key, word in (("fusionbench", "FusionBench's"), ("esm", "ESM's")):
        rows = [row for row in ROWS if getattr(row, key) is not None and row.kind != ENDS and row.name in results["table"]]
        if len(rows) > 2:
            ours = [np.mean([d if c is None else c for d, _, c in results["table"][row.name]]) for row in rows]
            rho = spearmanr(ours, [getattr(row, key) for row in rows]).statistic
            parts.append(f"{rho:.2f} over the {len(rows)} methods of {word} table")
    return f"Spearman's correlation of the order here with the published one: {'; '.join(parts)}." if parts else ""
