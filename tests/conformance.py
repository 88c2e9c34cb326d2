"""Makes spec/conformance.md: what installed tools make of the vectors, and of random inputs.

    python -m tests.conformance mergekit=PYTHON peft=PYTHON sd_mecha=PYTHON fusion_bench=PYTHON

Each PYTHON is an interpreter in which that tool is installed.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from refmerge import pages, testing
from refmerge.conform import Conformance, Difference, conform, fuzzed

EXAMPLES = 300

HEAD = """# Conformance

What other tools make of the test vectors, each on its own: `refmerge conform TOOL` runs them and prints a table like these.
Made by `python -m tests.conformance` on {date}.

- **against its paper**: the tool is given the inputs of the paper's vectors, where it has parameters that ask for the same.
  "differs" says how many of them come out within their tolerance; every other one has a name, a flag, which the method's
  page explains with numbers. A difference without a name would be listed as unexplained.
- **as refmerge says**: the tool is given all vectors of `tool:method`, refmerge's entry for it. Where one fails, the tool
  refuses an input for which the entry has a result, and a flag says so.
- **random inputs**: {examples} for each entry that draws no random numbers and rests on no statistics, with the values that
  bite (ties, zeros, subnormals, equal and opposite models, empty tensors), made as small as they can be where the tool and
  its entry disagree.

A tool differs from a paper for good reasons and bad ones. This page says that it does, not which.
"""

# What the random inputs find, in words: the shrunk example is of this kind.
KNOWN = {
    "fusion_bench:slerp": "a threshold of 1, of two equal tensors: NaN there, the tensor here",
    "fusion_bench:ties": "a model without entries, an error there",
    "mergekit:arcee_fusion": "an empty tensor, of which the tool takes a quartile: ArceeEmpty",
    "mergekit:breadcrumbs": "which of several equal magnitudes are kept depends on the tool's sort",
    "mergekit:breadcrumbs_ties": "which of several equal magnitudes are kept depends on the tool's sort",
    "mergekit:karcher": "models on opposite sides, where the mean is anywhere: KarcherOpposite",
    "mergekit:multislerp": "directions of three models that cancel, an error there: MultislerpCancelOfThree",
    "mergekit:nuslerp": "opposite directions, where the tool divides rounding by rounding: NuslerpOpposite",
    "mergekit:sce": "which of several equal variances are kept depends on the tool's sort",
    "mergekit:slerp": "opposite directions at the end of an arc, where rounding is all that is left",
    "mergekit:ties": "which of several equal magnitudes are kept depends on the tool's sort: TiesThresholdTies",
    "peft:magnitude_prune": "which of several equal magnitudes are kept depends on torch's topk",
    "peft:ties": "which of several equal magnitudes are kept depends on torch's topk: TiesThresholdTies",
    "sd_mecha:model_stock": "a tensor of one number without axes, which gets one there",
    "sd_mecha:slerp": "opposite directions half-way, where rounding is all that is left",
}


def page(found: Mapping[str, tuple[Conformance, list[Difference]]]) -> str:
    date = f"{datetime.date.today():%-d %B %Y}"
    parts = [HEAD.format(date=date, examples=EXAMPLES)]
    for conformance, differences in found.values():
        parts.append(f"## {conformance.tool} {conformance.version}\n")
        parts.append("| method | against its paper | because | as refmerge says |\n|---|---|---|---|")
        for method, verdict, because, said in conformance.table():
            if verdict != "not asked" or said:
                parts.append(f"| {_linked(method)} | {verdict} | {because} | {said} |")
        parts.append("")
        if differences:
            parts.append("Random inputs on which the tool and refmerge's entry disagree:\n")
            parts += [f"- `{d.entry}`: {KNOWN.get(d.entry, 'unexplained: ' + d.what)}" for d in differences]
        else:
            parts.append("Random inputs found nothing on which the tool and refmerge's entry disagree.")
        parts.append("")
    return "\n".join(parts)


def _linked(method: str) -> str:
    return f"[{method}]({pages.page(method).family}/{method}.md)" if method in testing.names() else method


def main(arguments: list[str]) -> None:
    found = {}
    for argument in arguments:
        tool, _, python = argument.partition("=")
        found[tool] = (conform(tool, python=python or None), fuzzed(tool, [], EXAMPLES, python or None))
        print(found[tool][0].text())
    Path(str(resources.files("refmerge.spec") / "conformance.md")).write_text(page(found), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
