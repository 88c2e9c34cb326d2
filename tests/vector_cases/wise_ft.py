"""Vectors of wise_ft."""

from __future__ import annotations

from vector_cases import REFUSED, Hand, Paper, i64

CODE = {
    "official:wise_ft": "mlfoundations/wise-ft@58b7a4b src/wise_ft.py:_merge",
}
FLAGS = {
    "wise_ft-official-03": ["WiseFtExtrapolates"],
}
PAPER = {
    "wise_ft-official-00": Paper({}),
    "wise_ft-official-03": Paper({"alpha": 1.5}),
}


def hand() -> Hand:
    h = Hand("wise_ft", CODE)
    h.case(
        "half",
        "(2 + 6) / 2 = 4, (8 - 8) / 2 = 0",
        [[6, -8]],
        [2, 8],
        ("wise_ft", {}, [4, 0], "alpha is 1/2 by default"),
        ("official:wise_ft", {"alpha": 0.5}, [4, 0], ""),
    )
    h.case("quarter", "3/4 * 8 + 1/4 * 4 = 7", [[4.0]], [8.0], ("wise_ft", {"alpha": 0.25}, [7.0], ""))
    h.case(
        "lerp-form",
        "float32, alpha 1: x + (y - x) would be 2^25 + (1 - 2^25) = 0, since 1 - 2^25 rounds",
        [[1.0, 4.0]],
        [2.0**25, 2.0],
        ("wise_ft", {"alpha": 1.0}, [1.0, 4.0], "0 * x + 1 * y is y exactly"),
        ("official:wise_ft", {"alpha": 1.0}, [1.0, 4.0], ""),
        flags="WiseFtLerpForm",
    )
    h.case(
        "alpha-zero",
        "1 * x + 0 * y is x",
        [[1.0, -4.0]],
        [2.0**25, 2.0],
        ("wise_ft", {"alpha": 0.0}, [2.0**25, 2.0], ""),
    )
    h.case(
        "extrapolates",
        "-1/2 * 2 + 3/2 * 4 = 5",
        [[4.0]],
        [2.0],
        ("wise_ft", {"alpha": 1.5}, [5.0], ""),
        ("official:wise_ft", {"alpha": 1.5}, [5.0], ""),
        flags="WiseFtExtrapolates",
    )
    h.case(
        "extrapolates-back",
        "3/2 * 2 - 1/2 * 4 = 1",
        [[4.0]],
        [2.0],
        ("wise_ft", {"alpha": -0.5}, [1.0], ""),
        flags="WiseFtExtrapolates",
    )
    buffers, base = [{"x": [3.0], "n": i64(9)}], {"x": [1.0], "n": i64(8)}
    h.case(
        "integers-base",
        "(1 + 3) / 2 = 2; the integer tensor stays the base's",
        buffers,
        base,
        ("wise_ft", {}, {"x": [2.0], "n": i64(8)}, "asked for by the caller; the official code gives 8.5, a float"),
        flags="WiseFtIntegerBuffers",
    )
    h.case(
        "integers-differ",
        "8 in the base, 9 in the model: the official code gives 8.5",
        buffers,
        base,
        ("wise_ft", {}, REFUSED, "a counter has no mean that is one of its values"),
        flags="WiseFtIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "shapes",
        "0-d and empty: (1 + 3) / 2",
        [{"s": 3.0, "e": []}],
        {"s": 1.0, "e": []},
        ("wise_ft", {}, {"s": 2.0, "e": []}, ""),
        dtype="F64",
    )
    h.case("tensor-missing", "the model lacks y", [{"x": [1.0]}], {"x": [1.0], "y": [1.0]}, ("wise_ft", {}, REFUSED, ""))
    h.case("no-base", "one end is missing", [[1.0]], None, ("wise_ft", {}, REFUSED, ""))
    h.case("two-models", "a line has two ends", [[1.0], [2.0]], [0.0], ("wise_ft", {}, REFUSED, ""))
    return h
