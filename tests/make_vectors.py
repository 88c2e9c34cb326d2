"""Write spec/vectors: `python tests/make_vectors.py RESULTS_DIR [METHOD ...]`.

RESULTS_DIR holds what the authors' code and other tools gave on small inputs, one safetensors file per case
(`base/<name>`, `model<k>/<name>`, `stat<k>/<name>`, `out/<name>`; header: registry, source, params, notes, tolerance).
Cases by hand are in vector_cases.py, descriptions of the flags in vector_notes.toml. Nothing here calls refmerge. The
output is the same bytes for the same input; an id, once published, is never reused.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from vector_cases import BY_HAND, CODES, DTYPES, Tensors, Test, origin

OUT = Path(__file__).parent.parent / "spec" / "vectors"
NOTES = tomllib.loads(Path(__file__).with_name("vector_notes.toml").read_text(encoding="utf-8"))
INLINE = 64  # arrays up to this many values are written into the JSON, where people read them

# --- Results of other code --------------------------------------------------------------------------------------------

# Which flags a result shows, by the id it gets; results without an entry show none.
FLAGS = {
    "linear-mergekit-04": ["LinearZeroWeightSum"],
    "slerp-fusion_bench-03": ["SlerpThreshold"],
    "task_arithmetic-mergekit-04": ["TaskArithmeticNormalize", "TaskArithmeticZeroWeightSum"],
    "task_arithmetic-task_vectors-00": ["TaskArithmeticIntegerBuffers"],
    "wise_ft-official-03": ["WiseFtExtrapolates"],
    "ties-official-00": ["TiesKeepsOneMore"],
    "ties-official-09": ["TiesThresholdTies", "TiesZeroSumSign"],
    "ties-official-12": ["TiesKeepsOneMore", "TiesZeroDensity"],
    "ties-mergekit-01": ["TiesPerTensorTrim"],
    "ties-mergekit-04": ["TiesWeightsElect", "TiesZeroSumSign"],
    "ties-mergekit-bf16-01": ["TiesThresholdTies"],
    "ties-MergeLM-00": ["TiesKeepsOneMore"],
    "ties-MergeLLM-00": ["TiesPerTensorTrim", "TiesKeepsOneMore"],
    "dare-MergeLM-00": ["DareDropMaskPolarity"],
    "dare-MergeLM-03": ["DareDropMaskPolarity", "DareRescaleOff"],
    "dare_linear-mergekit-01": ["DareRescaleL1"],
    "dare_linear-mergekit-04": ["DareRescaleL1", "DareDensityZero"],
    "dare_linear-mergekit-bf16-01": ["DareRescaleL1"],
    "dare_ties-mergekit-01": ["DareRescaleL1", "DareTiesSumNotMean", "DareTiesTrims"],
    "dare_ties-mergekit-04": ["DareRescaleL1", "DareTiesSumNotMean", "DareTiesTrims"],
    "dare_ties-mergekit-bf16-01": ["DareRescaleL1", "DareTiesSumNotMean", "DareTiesTrims"],
    "della-official-00": ["DellaWindow"],
    "della-mergekit-01": ["DellaRescaleL1", "DellaWeightsElect"],
    "della-mergekit-04": ["DellaDensityZero", "DellaRescaleL1", "DellaWeightsElect"],
    "della-mergekit-bf16-01": ["DellaRescaleL1", "DellaWeightsElect"],
    "breadcrumbs-official-00": ["BreadcrumbsPerRow", "BreadcrumbsScalars"],
    "breadcrumbs-official-03": ["BreadcrumbsPerRow", "BreadcrumbsScalars"],
    "breadcrumbs-official-06": ["BreadcrumbsPerRow", "BreadcrumbsTies"],
    "breadcrumbs-mergekit-04": ["BreadcrumbsGammaSlice", "BreadcrumbsDensityOne"],
    "breadcrumbs-mergekit-bf16-01": ["BreadcrumbsTies"],
    "model_stock-mergekit-04": ["StockNormClamp", "StockSingular", "StockNegativeRatio"],
    "model_stock-mergekit-taskvec-03": ["StockMeanOfCosines"],
    "widen-MergeLLM-00": ["WidenTransposesEmbedding"],
    "widen-MergeLLM-03": ["WidenTransposesEmbedding"],
    "widen-MergeLLM-06": ["WidenZeroColumn"],
}
# Other tools whose results show a disagreement; the rest of theirs adds nothing that the official ones do not.
EVIDENCE = {
    "ties-MergeLM-00", "ties-MergeLLM-00", "slerp-fusion_bench-00", "slerp-fusion_bench-03", "breadcrumbs-MergeLLM-00",
    "dare-fusion_bench-00", "model_stock-fusion_bench-taskvec-00", "model_stock-fusion_bench-taskvec-03",
}  # fmt: skip
EVIDENCE_REASON = "kept as evidence for the flags; an implementation may offer this tool's semantics or not"


@dataclass
class Paper:
    """A result that the paper's semantics give as well: how to ask for it under the plain name."""

    params: dict[str, Any]
    names: tuple[str, ...] = ()
    base_first: bool = False
    drop_masks: bool = False
    comment: str = ""


STOCK = Paper({}, comment="two models: one angle, and its cosine is every tool's")
WIDEN_NAMES = (
    "lm_head.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
)
PAPER = {
    "uniform_soup-official-00": Paper({}, comment="the uniform soup is linear with equal weights"),
    "linear-mergekit-01": Paper({"weight": [0.6, 0.4], "normalize": True}),
    "slerp-mergekit-01": Paper({"t": 0.35}, base_first=True, comment="mergekit's base is the first model"),
    "slerp-mergekit-04": Paper({"t": 0.0}, base_first=True, comment="mergekit's base is the first model"),
    "task_arithmetic-task_vectors-00": Paper({"lambda_": 0.8}),
    "task_arithmetic-task_vectors-03": Paper({"weight": [-1.0, 1.0, 1.0]}, comment="analogy: C + (B - A)"),
    "task_arithmetic-mergekit-01": Paper({"weight": [0.6, 0.4]}),
    "wise_ft-official-00": Paper({}),
    "wise_ft-official-03": Paper({"alpha": 1.5}),
    "ties-official-00": Paper(
        {"density": 0.2011}, comment="official K=20 keeps int(0.2 * 926) + 1 = 186 = int(0.2011 * 926)"
    ),
    "ties-official-12": Paper({"density": 0.0011}, comment="official K=0 keeps one entry, and int(0.0011 * 926) = 1"),
    "dare-MergeLM-00": Paper(
        {"density": [0.5, 0.3, 0.1], "weight": [1 / 3] * 3}, drop_masks=True, comment="keep masks and probabilities"
    ),
    "dare-MergeLM-03": Paper(
        {"density": 0.7, "weight": [1 / 3] * 3, "rescale": False}, drop_masks=True, comment="keep masks; no rescaling"
    ),
    "della-official-00": Paper(
        {"density": 0.7, "epsilon": 0.07, "lambda_": 1.1}, comment="weights of 1 are none; no sum is exactly zero"
    ),
    "della-official-06": Paper({"density": 1.0, "lambda_": 1.0}, comment="nothing is dropped"),
    "breadcrumbs-official-00": Paper(
        {"density": 0.2, "gamma": 0.1, "lambda_": 0.4}, names=("ln_w",), comment="a vector is its own single row"
    ),
    "breadcrumbs-official-03": Paper(
        {"density": 0.5, "gamma": 0.5, "lambda_": 1.0}, names=("ln_w",), comment="a vector is its own single row"
    ),
    "model_stock-mergekit-01": STOCK,
    "model_stock-mergekit-taskvec-00": STOCK,
    "model_stock-mergekit-taskvec-06": STOCK,
    "model_stock-fusion_bench-taskvec-00": STOCK,
    "model_stock-fusion_bench-taskvec-03": STOCK,
    "widen-MergeLLM-00": Paper({}, names=WIDEN_NAMES, comment="without the transposed embedding"),
    "widen-MergeLLM-03": Paper(
        {"above_average_value_ratio": 0.0}, names=WIDEN_NAMES, comment="without the transposed embedding"
    ),
}


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    body = memoryview(data)[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }, meta


def part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.partition("/")[2]: x for name, x in tensors.items() if name.partition("/")[0] == prefix}


def results(folder: Path, stems: str) -> list[Test]:
    """The results of other code whose file is called `<stem>--...`, for one of the stems."""
    tests = []
    for path in sorted(path for stem in stems.split() for path in folder.glob(f"{stem}--*.safetensors")):
        tensors, meta = read(path)
        id = path.stem.replace("--", "-")
        tool = meta["registry"].partition(":")[0]
        if tool not in ("official", "mergekit") and id not in EVIDENCE:
            continue
        params = {("lambda_" if name == "lambda" else name): x for name, x in json.loads(meta["params"]).items()}
        count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
        stats = [part(tensors, f"stat{k}") for k in range(count)]
        # Which of equal magnitudes a sort keeps, and what rests on rounding, no other implementation can reproduce.
        loose = re.search("FRAGILE|TIE-DEPENDENT", meta["notes"])
        test = Test(
            id=id,
            entry=meta["registry"],
            params=params,
            models=[part(tensors, f"model{k}") for k in range(count)],
            base=part(tensors, "base") or None,
            expect=part(tensors, "out"),
            comment=meta["notes"].strip(" ;").replace("\n", " ") or "random weights",
            source=origin(meta["source"]),
            flags=FLAGS.get(id, []),
            # Tools round bfloat16 after every operation: one ulp of the largest value, where we round once.
            tolerance=2.0**-7 if "-bf16-" in id else float(meta["tolerance"]),
            result="acceptable" if loose else "valid",
            stats=stats if any(stats) else None,
            registered=tool in ("official", "mergekit"),
        )
        tests.append(test)
        if id in PAPER:
            tests.append(paper(test, PAPER[id]))
    return tests


def paper(test: Test, how: Paper) -> Test:
    """The same arrays under the plain name."""

    def chosen(tensors: Tensors) -> Tensors:
        return {name: x for name, x in tensors.items() if name in how.names} if how.names else tensors

    stats = test.stats
    if how.drop_masks:
        assert stats
        stats = [{f"{name}.mask": np.asarray(1 - x, np.uint8) for name, x in one.items()} for one in stats]
    return replace(
        test,
        id=f"{test.id}-paper",
        entry={"uniform_soup": "linear", "dare": "dare_linear"}.get(name := test.entry.rpartition(":")[2], name),
        params=how.params,
        models=[chosen(x) for x in ([test.base] if how.base_first and test.base else []) + test.models],
        base=chosen(test.base) if test.base and not how.base_first else None,
        expect=chosen(test.expect),
        comment=how.comment or "the tool does what the paper says",
        flags=[],
        stats=stats,
        registered=True,
    )


# --- Writing ----------------------------------------------------------------------------------------------------------

# Results are filed by what the tool calls its method; where that is another name than ours, it is here.
FILED_AS = {"linear": "linear uniform_soup", "dare_linear": "dare_linear dare", "dare_ties": "dare_ties dare"}


def number(x: Any) -> Any:
    """A JSON value that reads back as the same number: the shortest decimal, or a word where JSON has no number."""
    if x.dtype.kind in "iub":
        return x.item()
    value = float(x)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    short = float(np.format_float_scientific(x, unique=True)) if x.dtype.kind == "f" else value
    assert x.dtype.type(short) == x
    return short


class Writer:
    """Turns tests into the document, moving larger arrays into the twin; equal arrays are stored once."""

    def __init__(self) -> None:
        self.twin: Tensors = {}
        self.stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def tensor(self, x: np.ndarray, key: str) -> dict[str, Any]:
        if x.size <= INLINE:
            return {"dtype": CODES[x.dtype], "shape": list(x.shape), "data": [number(v) for v in x.reshape(-1)]}
        name = self.stored.setdefault((CODES[x.dtype], x.shape, x.tobytes()), key)
        self.twin[name] = x
        return {"$ref": name}

    def tensors(self, tensors: Tensors, key: str) -> dict[str, Any]:
        return {name: self.tensor(x, f"{key}/{name}") for name, x in sorted(tensors.items())}

    def test(self, t: Test) -> dict[str, Any]:
        out: dict[str, Any] = {"id": t.id, "comment": t.comment, "flags": t.flags, "result": t.result}
        out["base"] = None if t.base is None else self.tensors(t.base, f"{t.id}/base")
        out["models"] = [self.tensors(x, f"{t.id}/model{k}") for k, x in enumerate(t.models)]
        if t.stats is not None:
            out["stats"] = [self.tensors(x, f"{t.id}/stat{k}") for k, x in enumerate(t.stats)]
        out["expect"] = self.tensors(t.expect, f"{t.id}/expect")
        out["tolerance"] = t.tolerance
        return out

    def groups(self, tests: list[Test]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for t in tests:
            head: dict[str, Any] = {"entry": t.entry, "source": t.source, "params": t.params}
            if t.options:
                head["options"] = t.options
            if not t.registered:
                head |= {"registered": False, "reason": EVIDENCE_REASON}
            if not groups or {k: v for k, v in groups[-1].items() if k != "tests"} != head:
                groups.append(head | {"tests": []})
            groups[-1]["tests"].append(self.test(t))
        return groups


def render(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits on a line is on one line."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(flat) + indent <= 118 or not isinstance(value, (dict, list)):
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + render(x, indent + 1) for x in value) + "\n" + " " * indent + "]"
    items = (f"{pad}{json.dumps(k)}: {render(x, indent + 1)}" for k, x in value.items())
    return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"


def safetensors(tensors: Tensors) -> bytes:
    """The format by hand: names sorted, so that the file is the same whenever the arrays are."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    end = 0
    # Wider dtypes first keep every array aligned to its own size.
    for name, x in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        blobs.append(np.ascontiguousarray(x).tobytes())
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end := end + x.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def write(method: str, folder: Path) -> str:
    tests = BY_HAND[method]().tests
    for test in results(folder, FILED_AS.get(method, method)):
        # MergeLM drops, then hands over to another merge: its results belong to the method that does the same.
        if test.id.startswith("dare-") and (method == "dare_ties") != (
            test.params.get("mask_apply_method") == "ties_merging"
        ):
            continue
        tests.append(test)
    writer = Writer()
    document = {
        "method": method,
        "schema": "vectors.schema.json",
        "number_of_tests": len(tests),
        "notes": dict(sorted(NOTES[method].items())),
        "groups": writer.groups(tests),
    }
    (OUT / f"{method}.json").write_text(render(document) + "\n", encoding="utf-8")
    if writer.twin:
        (OUT / f"{method}.safetensors").write_bytes(safetensors(writer.twin))
    return f"{method}: {len(tests)} tests, {len(NOTES[method])} flags"


if __name__ == "__main__":
    for chosen in sys.argv[2:] or BY_HAND:
        print(write(chosen, Path(sys.argv[1])))
