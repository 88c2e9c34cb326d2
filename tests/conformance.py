"""Makes spec/conformance.md: what installed tools and the authors' own code make of the vectors, and of random inputs.

    python -m tests.conformance mergekit=PYTHON peft=PYTHON sd_mecha=PYTHON fusion_bench=PYTHON official=PYTHON@CHECKOUT ...

Each PYTHON is an interpreter in which that tool is installed, or torch for the authors' code; a CHECKOUT is theirs.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from refmerge import pages, testing
from refmerge.conform import Conformance, Difference, conform, fuzzed

EXAMPLES = 100

HEAD = """# Conformance

What other tools make of the test vectors, each on its own: `refmerge conform TOOL` runs them and prints a table like these,
and so does `refmerge conform official --path CHECKOUT` for the authors' own code, whose functions and classes alone are run.
Made by `python -m tests.conformance` on {date}; a word beside a repository is its commit.

- **against its paper**: the tool is given the inputs of the paper's vectors, where it has parameters that ask for the same.
  "differs" says how many of them come out within their tolerance; every other one has a name, a flag, which the method's
  page explains with numbers. A difference without a name would be listed as unexplained.
- **as refmerge says**: the tool is given all vectors of `tool:method`, refmerge's entry for it. Where one fails, the tool
  refuses an input for which the entry has a result, or rounds otherwise, and a flag says so.
- **not asked**: what the tool could not be given, and why.
- **random inputs**: {examples} for each entry that draws no random numbers and rests on no statistics, with the values that
  bite (ties, zeros, subnormals, equal and opposite models, empty tensors), made as small as they can be where the tool and
  its entry disagree.

fusion-bench was asked beside transformers 5.0.0, with which all of it can be imported, and with triton for its BitDelta.

A tool differs from a paper for good reasons and bad ones. This page says that it does, not which.
"""

SORT = "which of several equal magnitudes are kept depends on torch's topk"
EMPTY = "a model without entries, an error there"
RANK = "a change of less than full rank, whose other directions are the decomposition's choice"

# What the random inputs find, in words: the shrunk example is of this kind.
KNOWN = {
    "dcmerge:iso_cts": "a vector, an error there: adapters are matrices",
    "dcmerge:tsvm": "a vector, an error there: adapters are matrices",
    "fusion_bench:dop": "a subnormal number, which one of the two rounds to zero",
    "fusion_bench:emr": "a tensor without entries, the mean of which is NaN there: EmrEmpty",
    "fusion_bench:iso_c": f"{RANK}: IsoRank",
    "fusion_bench:iso_cts": f"{RANK}: IsoCtsRank",
    "fusion_bench:opcm": "a subnormal number, which one of the two rounds to zero",
    "fusion_bench:slerp": "a threshold of 1, of two equal tensors: NaN there, the tensor here",
    "fusion_bench:svc": "a sum that cancels, of which rounding leaves something in one of the two",
    "fusion_bench:ties": EMPTY,
    "fusion_bench:tsvm": "a task that changed nothing, whose directions are the decomposition's choice: TsvmRank",
    "fusion_bench:wudi": "a change so small that its square is 0 in float32: NaN there",
    "mergekit:arcee_fusion": "an empty tensor, of which the tool takes a quartile: ArceeEmpty",
    "mergekit:breadcrumbs": "which of several equal magnitudes are kept depends on the tool's sort",
    "mergekit:breadcrumbs_ties": "which of several equal magnitudes are kept depends on the tool's sort",
    "mergekit:karcher": "models on opposite sides, where the mean is anywhere: KarcherOpposite; tol 0, where an angle is "
    "divided by its sine, and rounding says whether both are 0",
    "mergekit:multislerp": "directions of three models that cancel, an error there: MultislerpCancelOfThree",
    "mergekit:nuslerp": "opposite directions, where the tool divides rounding by rounding: NuslerpOpposite",
    "mergekit:sce": "which of several equal variances are kept depends on the tool's sort",
    "mergekit:slerp": "opposite directions at the end of an arc, where rounding is all that is left",
    "mergellm:breadcrumbs": EMPTY,
    "mergellm:slerp": "a threshold of 1, of two parallel tensors: NaN there, the line here",
    "mergellm:task_arithmetic": "one model, an error there: TaskArithmeticOneModel",
    "mergellm:ties": EMPTY,
    "mergelm:task_arithmetic": "one model, an error there: TaskArithmeticOneModel",
    "mergelm:ties": EMPTY,
    "mergekit:ties": "which of several equal magnitudes are kept depends on the tool's sort: TiesThresholdTies",
    "official:breadcrumbs": SORT,
    "official:consensus": "a model without entries and k below 100, an error there",
    "official:dc_merge": EMPTY,
    "official:emr": "a tensor without entries, the mean of which is NaN there: EmrEmpty",
    "official:iso_c": f"{RANK}: IsoRank",
    "official:iso_cts": f"{RANK}: IsoCtsRank",
    "official:pcb": EMPTY,
    "official:svc": "a subnormal number, which one of the two rounds to zero",
    "official:tall_masks": "a model without entries and k below 100, an error there",
    "official:ties": EMPTY,
    "official:tsvm": "equal models, where eigenvalues that are 0 but for rounding divide (variant _2): TsvmDependent",
    "official:widen": "a tensor without axes, or with more than two, an error there",
    "official_es:pcb": EMPTY,
    "official_lora:dc_merge": "a vector, an error there: adapters are matrices",
    "official_readme:pcb": EMPTY,
    "peft:magnitude_prune": SORT,
    "peft:ties": f"{SORT}: TiesThresholdTies",
    "sd_mecha:model_stock": "a tensor of one number without axes, which gets one there",
    "sd_mecha:slerp": "opposite directions half-way, where rounding is all that is left",
    "sd_mecha:ties_sum_extended": "a tensor of one number without axes, which gets one there",
}


def page(found: Mapping[str, tuple[Conformance, list[Difference]]]) -> str:
    date = f"{datetime.date.today():%-d %B %Y}"
    parts = [HEAD.format(date=date, examples=EXAMPLES)]
    for conformance, differences in found.values():
        parts.append(f"## {conformance.tool} {conformance.version}".rstrip() + "\n")
        parts.append("| method | against its paper | because | as refmerge says |\n|---|---|---|---|")
        for method, verdict, because, said in conformance.table():
            if verdict != "not asked" or said:
                parts.append(f"| {_linked(method)} | {verdict} | {because} | {said} |")
        parts.append("")
        if skipped := conformance.not_asked():
            parts += ["Not asked:\n", *(f"- {line}" for line in skipped), ""]
        if differences:
            parts.append("Random inputs on which the tool and refmerge's entry disagree:\n")
            parts += [f"- `{d.entry}`: {KNOWN.get(d.entry, 'unexplained: ' + d.what)}" for d in differences]
        else:
            parts.append("Random inputs found nothing on which the tool and refmerge's entry disagree.")
        parts.append("")
    return "\n".join(parts)


def _linked(method: str) -> str:
    name, space, entry = method.partition(" ")
    return f"[{name}]({pages.page(name).family}/{name}.md){space}{entry}" if name in testing.names() else method


def main(arguments: list[str]) -> None:
    found = {}
    for argument in arguments:
        tool, _, where = argument.partition("=")
        python, _, path = where.partition("@")
        asked = {"python": python or None, "path": path or None}
        found[argument] = (conform(tool, **asked), fuzzed(tool, [], EXAMPLES, **asked))
        print(found[argument][0].text(), flush=True)
    Path(str(resources.files("refmerge.spec") / "conformance.md")).write_text(page(found), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
