"""Vectors of model_ratatouille, which has an entry of its authors' code and no plain one."""

from __future__ import annotations

from vector_cases import REFUSED, Hand, i64

OURS = "official:model_ratatouille"
CODE = {
    OURS: "facebookresearch/ModelRatatouille@1afb4e7 domainbed/algorithms_inference.py:WA.add_weights",
    "official:uniform_soup": "mlfoundations/model-soups@d5398f1 main.py",
}
FLAGS = {"model_ratatouille-official-00": ["RatatouilleBuffers"]}


def hand() -> Hand:
    h = Hand("model_ratatouille", CODE)
    h.case(
        "running-mean",
        "(4 + 8) / 2 = 6, then (2 * 6 + 3) / 3 = 5; (-2 + 2) / 2 = 0, (0 + 6) / 3 = 2",
        [[4, -2], [8, 2], [3, 6]],
        None,
        (OURS, {}, [5, 2], ""),
        ("linear", {}, [5, 2], "the same average: 15 / 3 and 6 / 3"),
    )
    h.tests[-1].tolerance = 2.0**-22
    statistics = [
        {"bn.running_mean": [1.0], "bn.running_var": [4.0], "bn.weight": [1.0], "bn.num_batches_tracked": i64(50)},
        {"bn.running_mean": [5.0], "bn.running_var": [8.0], "bn.weight": [3.0], "bn.num_batches_tracked": i64(51)},
    ]
    first = {"bn.running_mean": [1.0], "bn.running_var": [4.0], "bn.weight": [2.0], "bn.num_batches_tracked": i64(50)}
    mean = {"bn.running_mean": [3.0], "bn.running_var": [6.0], "bn.weight": [2.0]}
    h.case(
        "buffers",
        "the weight is (1 + 3) / 2",
        statistics,
        None,
        (OURS, {}, first, "buffers are the first model's"),
        ("linear", {}, mean | {"bn.num_batches_tracked": i64(50)}, "(1 + 5) / 2 and (4 + 8) / 2; counters on request"),
        flags="RatatouilleBuffers",
    )
    h.case(
        "buffers-averaged",
        "the weight is (1 + 3) / 2",
        statistics,
        None,
        ("official:uniform_soup", {}, mean, "the whole state: (1 + 5) / 2 and (4 + 8) / 2; and the counter 50.5"),
        flags="RatatouilleBuffers",
    )
    h.case(
        "buffers-reversed",
        "the other model first: the weight is (3 + 1) / 2 still, the buffers are others",
        statistics[::-1],
        None,
        (OURS, {}, {**statistics[1], "bn.weight": [2.0]}, ""),
        flags="RatatouilleBuffers",
    )
    h.case(
        "buffers-none",
        "no names are buffers' names: (1 + 5) / 2",
        [{"bn.running_mean": [1.0]}, {"bn.running_mean": [5.0]}],
        None,
        (OURS, {"buffers": []}, {"bn.running_mean": [3.0]}, ""),
    )
    h.case(
        "copies",
        "three times 7 in float64",
        [[7.0]] * 3,
        None,
        (OURS, {}, [7.0], "7, (7 + 7) / 2 = 7, (14 + 7) / 3 = 7"),
        ("linear", {}, [6.999999999999999], "7/3 is rounded, and three of it are added"),
        flags="RatatouilleRounding",
        dtype="F64",
    )
    h.case(
        "overflow",
        "two models of 2^127 in float32",
        [[2.0**127], [2.0**127]],
        None,
        (OURS, {}, [float("inf")], "the sum 2^128 is infinite"),
        ("linear", {}, [2.0**127], "2^126 + 2^126"),
        flags="RatatouilleRounding",
    )
    h.case(
        "missing",
        "the second model lacks b",
        [{"a": [1.0], "b": [2.0]}, {"a": [3.0]}],
        None,
        (OURS, {}, REFUSED, "paired by order, zip would stop at the shorter and leave b as it is"),
        flags="RatatouillePairing",
    )
    h.case("greedy", "a selection needs scores", [[1.0]], None, (OURS, {"weight_selection": "greedy"}, REFUSED, ""))
    h.case("one-model", "itself", [[0.0, -3.0]], None, (OURS, {}, [0.0, -3.0], ""))
    h.case(
        "shapes",
        "0-d and empty: (1 + 3) / 2",
        [{"s": 3.0, "e": []}, {"s": 1.0, "e": []}],
        None,
        (OURS, {}, {"s": 2.0, "e": []}, ""),
    )
    h.case(
        "copies-rounded",
        "three times 0.1 in float64: (0.1 + 0.1) / 2 = 0.1, but 2 * 0.1 + 0.1 is 0.30000000000000004",
        [[0.1]] * 3,
        None,
        (OURS, {}, [0.10000000000000002], "a third of it"),
        flags="RatatouilleRounding",
        dtype="F64",
    )
    large = 2.0**24
    for id, models, expect, why in (
        (
            "order-large-first",
            [[large], [1.0], [1.0]],
            5592405.5,
            "2^24 + 1 is rounded to 2^24, twice; a half of it, and a third",
        ),
        ("order-large-last", [[1.0], [1.0], [large]], 5592406.0, "1, and a third of 2^24 + 2"),
    ):
        h.case(id, f"float32: {why}", models, None, (OURS, {}, [expect], ""), flags="RatatouilleRounding")
    h.case("shape-differs", "shapes (2,) and (1, 2)", [[1.0, 2.0], [[1.0, 2.0]]], None, (OURS, {}, REFUSED, ""))
    nan, inf = float("nan"), float("inf")
    h.case(
        "nan-inf",
        "NaN and infinity stay, where the caller lets them pass; (1 + 3) / 2",
        [[nan, inf, 1.0], [1.0, 1.0, 3.0]],
        None,
        (OURS, {}, [nan, inf, 2.0], ""),
    )
    return h
