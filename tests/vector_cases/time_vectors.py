"""Vectors of time vectors, a recipe of task arithmetic."""

from __future__ import annotations

from vector_cases import REFUSED, Hand, Paper, i64

SCRIPTS = "KaiNylund/lm-weights-encode-time@5c4e2cf task_vectors/"
CODE = {"official:time_vectors": SCRIPTS + "multi_task.py"}
PAPER = {
    "time_vectors-official-00": Paper({"weight": [0.4, 0.6]}, entry="task_arithmetic", comment="coefficients that sum to 1"),
    "time_vectors-official-03": Paper({"weight": [1.0, 0.0]}, entry="task_arithmetic", comment="one end"),
}


def hand() -> Hand:
    h = Hand("time_vectors", CODE)
    base, early, late = [1.0, 1.0, 1.0], [5.0, 1.0, 0.0], [1.0, 5.0, 2.0]
    vectors = "vectors (4, 0, -1) and (0, 4, 1)"
    h.case(
        "quarter",
        f"{vectors}: 3/4 of the first and 1/4 of the second",
        [early, late],
        base,
        ("task_arithmetic", {"weight": [0.75, 0.25]}, [4.0, 2.0, 0.5], ""),
        ("official:time_vectors", {"n_pct_pts": 4}, [4.0, 2.0, 0.5], "n_pct_pts = 4: 1 - 1/4 and 1/4"),
        flags="TimeVectorsPoints",
    )
    h.case(
        "inverse",
        f"{vectors}: 1/4 of the first and 3/4 of the second",
        [early, late],
        base,
        ("official:time_vectors", {"n_pct_pts": 4, "inv_decay": True}, [2.0, 4.0, 1.5], ""),
        flags="TimeVectorsPoints",
    )
    h.case(
        "one-point",
        "n_pct_pts = 1 is the second model, inv_decay or not",
        [early, late],
        base,
        ("official:time_vectors", {"n_pct_pts": 1, "inv_decay": True}, late, ""),
        flags="TimeVectorsPoints",
    )
    h.case(
        "analogy",
        "vectors A (2, 0, 0), B (0, 2, 0), C (1, 0, 3): 1 + C + (B - A) / 2",
        [[3.0, 1.0, 1.0], [1.0, 3.0, 1.0], [2.0, 1.0, 4.0]],
        base,
        ("task_arithmetic", {"weight": [-0.5, 0.5, 1.0]}, [1.0, 2.0, 4.0], ""),
        ("official:time_vectors", {"op": "analogy", "lambdas": [0.5, 0.5, 1.0]}, [1.0, 2.0, 4.0], ""),
    )
    h.case(
        "analogy-named",
        "the coefficients by their names on the command line",
        [[3.0, 1.0, 1.0], [1.0, 3.0, 1.0], [2.0, 1.0, 4.0]],
        base,
        (
            "official:time_vectors",
            {"op": "analogy", "lambdaA": 0.5, "lambdaB": 0.5, "lambdaC": 1.0},
            [1.0, 2.0, 4.0],
            "",
        ),
    )
    h.case(
        "order-of-sums",
        "float32: vectors 2^25 and -2^25, both rounded, and 1 on a base of 1: they add up to 1 before the base is added",
        [[33554432.0], [-33554432.0], [2.0]],
        [1.0],
        ("official:time_vectors", {}, [2.0], "base first it would be 1"),
    )
    h.case(
        "three-points",
        "n_pct_pts lies between two models",
        [early, late, base],
        base,
        ("official:time_vectors", {"n_pct_pts": 4}, REFUSED, ""),
    )
    h.case(
        "integers-differ",
        "the code makes 5 + (7 - 5) of it",
        [{"x": [2.0], "count": i64(7)}],
        {"x": [1.0], "count": i64(5)},
        ("task_arithmetic", {}, REFUSED, ""),
        flags="TimeVectorsIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "one-end-rounded",
        "float32: 1 - 2^25 is rounded to -2^25, and 2^25 more is 0, not the first model's 1",
        [[1.0], [5.0]],
        [2.0**25],
        ("task_arithmetic", {"weight": [1.0, 0.0]}, [0.0], ""),
        ("official:time_vectors", {"lambdas": [1.0, 0.0]}, [0.0], ""),
    )
    h.case(
        "after-the-last",
        f"{vectors}: -1/2 of the first and 3/2 of the second",
        [early, late],
        base,
        ("task_arithmetic", {"weight": [-0.5, 1.5]}, [-1.0, 7.0, 3.0], ""),
        ("official:time_vectors", {"lambdas": [-0.5, 1.5]}, [-1.0, 7.0, 3.0], ""),
    )
    h.case(
        "any-sum",
        vectors,
        [early, late],
        base,
        ("task_arithmetic", {"weight": [1.0, 1.0]}, [5.0, 5.0, 1.0], "both"),
        ("official:time_vectors", {"lambdas": [1.0, 1.0], "alpha": 0.5}, [3.0, 3.0, 1.0], "alpha halves each vector"),
    )
    h.case(
        "analogy-of-two",
        "A and B without C",
        [early, late],
        base,
        ("official:time_vectors", {"op": "analogy", "lambdas": [1.0, 1.0]}, REFUSED, ""),
    )
    h.case(
        "no-base",
        "a time vector is a difference from a base",
        [early],
        None,
        ("task_arithmetic", {}, REFUSED, ""),
        ("official:time_vectors", {"lambdas": [1.0]}, REFUSED, ""),
    )
    return h
