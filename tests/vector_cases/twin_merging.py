"""Vectors of twin_merging."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Tensors, Test, i64, origin
from vector_cases.low_rank_residual import terms
from vector_cases.ties import trim

CODE = {"official:twin_merging": "LZY-the-boys/Twin-Merging@f481c60 discriminative/twin_merge.py:run_twin_vector"}
SLACK = 1e-6  # singular vectors are rounded

STAGED = (
    "twin_merging-svd", "twin_merging-two-of-four", "twin_merging-all", "twin_merging-magnitude",
    "twin_merging-magnitude-weights", "twin_merging-nothing-kept", "twin_merging-bernoulli",
    "twin_merging-bernoulli-three-quarters", "twin_merging-average",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    density, scale = given.params["density"], Fraction(given.params["lambda_"])
    theta = given.base + scale * sum(theta_n - given.base for theta_n in given.models)
    v = [theta_n - theta for theta_n in given.models]
    found: dict[int, dict[str, Any]] = {1: {"theta": theta}, 2: {"v": v}}
    if density < 1:
        how = given.params.get("sparsify", "svd")
        if how == "bernoulli":
            v = [m * x / Fraction(density) for m, x in zip(given.masks, v)]
        elif how == "magnitude":
            v = [trim(x, int(density * x.size)) for x in v]
        else:
            v = [sum((term for _, term in terms(x)[: int(density * min(x.shape))]), Fraction(0)) for x in v]
        found[3] = {"v": v}
    return found | {4: {"result": theta + sum(w * x for w, x in zip(given.each("weight", None), v))}}


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """The model for one input; and under the plain name each model's twin alone, on the shared one."""

    def part(prefix: str) -> Tensors:
        return {name.partition("/")[2]: x for name, x in tensors.items() if name.partition("/")[0] == prefix}

    given = json.loads(meta["params"])
    count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
    stats = [part(f"stat{t}") for t in range(count)] if any(name.startswith("stat") for name in tensors) else None
    shared = part("shared")
    common = {"models": [part(f"model{t}") for t in range(count)], "base": part("base"), "source": origin(meta["source"])}
    wide = next(iter(shared.values())).dtype == np.float64
    tests = [
        Test(
            id=id,
            entry="official:twin_merging",
            params={**given, "router_prob": [float(x) for x in tensors["router/logits"]]},
            expect=part("out"),
            comment=meta["notes"].strip(),
            tolerance=1e-7 if wide else float(meta["tolerance"]),
            stats=stats,
            **common,
        )
    ]
    for task in range(count):
        twin = part(f"twin{task}")
        tests.append(
            Test(
                id=f"{id}-{task}-paper",
                entry="twin_merging",
                params={
                    "weight": [float(t == task) for t in range(count)],
                    "sparsify": given["mask_strategy"],
                    "density": 1 - given["mask_rate"],
                    "lambda_": given["scaling"],
                },
                expect={name: (shared[name] + twin[name]).astype(shared[name].dtype) for name in shared},
                comment="the twin of one model alone: expected is shared + twin",
                tolerance=float(meta["tolerance"]),
                stats=stats and [{f"{name}.mask": x.astype(np.uint8) for name, x in one.items()} for one in stats],
                **common,
            )
        )
    return tests


def hand() -> Hand:
    h = Hand("twin_merging", CODE)

    def plain(weight: Any, sparsify: str = "svd", density: float = 0.5, scale: float = 0.5) -> dict[str, Any]:
        return {"weight": weight, "sparsify": sparsify, "density": density, "lambda_": scale}

    def official(router: Any, strategy: str = "svd", rate: float = 0.5, scale: float = 0.5) -> dict[str, Any]:
        return {"router_prob": router, "mask_strategy": strategy, "mask_rate": rate, "scaling": scale}

    six = (
        "base 1, tau = S + V and S - V, S = (1, 0, 2; 0, 1, 0), V = (4, 5, 2; 0, 3, 6) = 2 P + Q, P = (1, 1)^T (1, 2, 2), "
        "Q = (1, -1)^T (2, 1, -2); lambda 1/2: shared 1 + S, remainders V and -V, of which 2 P and -2 P are the first terms"
    )
    models = [[[6.0, 6.0, 5.0], [1.0, 5.0, 7.0]], [[-2.0, -4.0, 1.0], [1.0, -1.0, -5.0]]]
    ones = [[1.0] * 3] * 2
    one_p = [[3.0, 3.0, 5.0], [2.0, 4.0, 3.0]]
    h.case(
        "svd",
        six,
        models,
        ones,
        ("twin_merging", plain([0.75, 0.25]), one_p, "1 + S + 3/4 of 2 P - 1/4 of 2 P"),
        tolerance=SLACK,
    )
    h.case(
        "svd-even",
        six,
        models,
        ones,
        ("twin_merging", plain([0.5, 0.5]), [[2.0, 1.0, 3.0], [1.0, 2.0, 1.0]], "the shared model"),
        ("official:twin_merging", official([1.0, 1.0]), [[2.0, 1.0, 3.0], [1.0, 2.0, 1.0]], "softmax(1, 1) = 1/2, 1/2"),
        tolerance=SLACK,
    )
    h.case(
        "softmax",
        six + "; 1 and 0 for the two models",
        models,
        ones,
        ("twin_merging", plain([1.0, 0.0]), [[4.0, 5.0, 7.0], [3.0, 6.0, 5.0]], "weights: 1 + S + 2 P"),
        (
            "official:twin_merging",
            official([1.0, 0.0]),
            softened([[2.0, 1.0, 3.0], [1.0, 2.0, 1.0]], [[2.0, 4.0, 4.0], [2.0, 4.0, 4.0]]),
            "logits: e / (e + 1) and 1 / (e + 1), so that tanh(1/2) times 2 P is added to 1 + S",
        ),
        flags="TwinSoftmax",
        tolerance=SLACK,
    )
    h.case(
        "all",
        six + "; density 1: nothing is compressed",
        models,
        ones,
        ("twin_merging", plain([0.0, 1.0], density=1.0), models[1], "the second model"),
        ("twin_merging", plain([0.0, 1.0], "magnitude", 1.0), models[1], "the second model"),
        ("twin_merging", plain([0.0, 1.0], "bernoulli", 1.0), models[1], "the second model"),
        tolerance=SLACK,
    )
    h.tests[-2].id = h.tests[-2].id[:-2] + "-magnitude"
    h.tests[-1].id = h.tests[-1].id[:-2] + "-bernoulli"
    flat = [[8.0, 0.0, 0.0, -4.0]], [[0.0, 2.0, -4.0, 0.0]]
    h.case(
        "magnitude",
        "base 0, tau = (8, 0, 0, -4), (0, 2, -4, 0); lambda 1/2: shared (4, 1, -2, -2), remainders (4, -1, 2, -2) and its "
        "negative; half of the entries: (4, 0, 2, 0), the lower index of 2 and -2",
        [flat[0], flat[1]],
        [[0.0] * 4],
        ("twin_merging", plain([1.0, 0.0], "magnitude"), [[8.0, 1.0, 0.0, -2.0]], ""),
        ("twin_merging", plain([0.25, 0.75], "magnitude"), [[2.0, 1.0, -3.0, -2.0]], "(4, 0, 2, 0) times 1/4 - 3/4"),
        ("twin_merging", plain([1.0, 0.0], "magnitude", 0.0), [[4.0, 1.0, -2.0, -2.0]], "the shared model"),
    )
    h.tests[-2].id = h.tests[-2].id[:-2] + "-weights"
    h.tests[-1].id = h.tests[-1].id[:-2] + "-none"
    h.case(
        "bernoulli",
        "base 0, tau = (8, 0, 0, -4), (0, 2, -4, 0); lambda 1/2: shared (4, 1, -2, -2), remainders (4, -1, 2, -2) and its "
        "negative; kept entries 1 and 2 of the first, 3 of the second, divided by 1/2",
        [flat[0], flat[1]],
        [[0.0] * 4],
        (
            "twin_merging",
            plain([0.5, 0.25], "bernoulli"),
            [[8.0, 0.0, -3.0, -2.0]],
            "+ 1/2 (8, -2, 0, 0) + 1/4 (0, 0, -4, 0)",
        ),
        masks=[[[1, 1, 0, 0]], [[0, 0, 1, 0]]],
    )
    h.case(
        "vector",
        "base 0, tau = 8 and 2, (4, 0) and (0, 2); lambda 1/2: shared 5, (2, 1); vectors and numbers are not compressed",
        [{"b": [4.0, 0.0], "s": 8.0, "e": [], "ids": i64(3)}, {"b": [0.0, 2.0], "s": 2.0, "e": [], "ids": i64(3)}],
        {"b": [0.0, 0.0], "s": 0.0, "e": [], "ids": i64(3)},
        ("twin_merging", plain([1.0, 0.0]), {"b": [4.0, 0.0], "s": 8.0, "e": [], "ids": i64(3)}, "the first model"),
    )
    h.case(
        "number",
        "a tensor without axes",
        [8.0, 2.0],
        0.0,
        ("twin_merging", plain([1.0, 0.0], "magnitude"), 8.0, "not compressed, the first model's"),
        ("official:twin_merging", official([1.0, 0.0], "magnitude"), OPEN, "int(1/2) = 0 entries, an assertion fails"),
        flags="TwinNothingKept",
    )
    h.case(
        "nothing-kept",
        "a matrix of two entries, a quarter of which are to stay: none",
        [[[8.0, 2.0]], [[0.0, 0.0]]],
        [[0.0, 0.0]],
        ("twin_merging", plain([1.0, 0.0], "magnitude", 0.25), [[4.0, 1.0]], "the shared model"),
        ("official:twin_merging", official([1.0, 0.0], "magnitude", 0.75), OPEN, "an assertion fails"),
        flags="TwinNothingKept",
    )
    ten = [[float(i == j) * (10 - i) for j in range(10)] for i in range(10)]
    none = [[0.0] * 10] * 10
    h.case(
        "density",
        "a diagonal matrix 10, 9, ... 1, lambda 0: a tenth of its terms",
        [ten],
        none,
        ("twin_merging", plain(1.0, density=0.1, scale=0.0), [[10.0, *[0.0] * 9], *none[1:]], "int(0.1 * 10) = 1"),
        ("official:twin_merging", official(0.0, rate=0.9, scale=0.0), none, "1 - 0.9 is 0.09999999999999998: int(...) = 0"),
        flags="TwinDensity",
        tolerance=SLACK,
    )
    cube = [[[[y] for y in row] for row in x] for x in models]
    h.case(
        "many-axes",
        six + "; of shape (2, 3, 1)",
        cube,
        [[[1.0]] * 3] * 2,
        (
            "twin_merging",
            plain([0.75, 0.25]),
            [[[3.0], [3.0], [5.0]], [[2.0], [4.0], [3.0]]],
            "a row for each index of the first",
        ),
        ("official:twin_merging", official([1.0, 0.0]), OPEN, "a batch of matrices, of which the wrong axis is cut"),
        flags="TwinManyAxes",
        tolerance=SLACK,
    )
    h.case(
        "equal",
        "equal models of tau = 2, lambda 1/2: shared 1 + 2, remainders 0",
        [[[3.0, 3.0]]] * 2,
        [[1.0, 1.0]],
        ("twin_merging", plain([0.25, 0.5]), [[3.0, 3.0]], ""),
        ("official:twin_merging", official([2.0, 5.0]), [[3.0, 3.0]], ""),
    )
    nan = float("nan")
    h.case(
        "nan-svd", "a remainder with NaN has no singular values", [[[nan, 1.0]]], [[0.0, 0.0]],
        ("twin_merging", plain(1.0), REFUSED, ""),
    )  # fmt: skip
    h.case(
        "nan",
        "NaN is the largest and stays",
        [[[nan, 1.0, 4.0, 2.0]]],
        [[0.0] * 4],
        ("twin_merging", plain(1.0, "magnitude"), [[nan, 0.5, 4.0, 1.0]], "shared (NaN, 1/2, 2, 1), remainder the same"),
    )
    h.case("no-weight", "the router's weights have no default", [[1.0]], [0.0], ("twin_merging", {}, REFUSED, ""))
    h.case("density-negative", "density -1/4", [[1.0]], [0.0], ("twin_merging", plain(1.0, density=-0.25), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("twin_merging", plain(1.0), REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("twin_merging", plain(1.0), REFUSED, ""))
    h.case(
        "two-of-four",
        "int(4/2) = 2 singular terms of diag(8, 4, 2, 1)",
        [np.diag([8.0, 4.0, 2.0, 1.0])],
        np.zeros((4, 4)),
        (
            "twin_merging",
            {"weight": 1.0, "density": 0.5, "lambda_": 0.0},
            {"x": np.diag([8.0, 4.0, 0.0, 0.0])},
            "",
        ),
        tolerance=1e-14,
    )
    h.case(
        "defaults",
        "ten entries 10 k: the shared model has 3 k, of the remainders 7 k int(0.1 * 10) = 1 stays: 30 + 70",
        [[[10.0, 20.0, 30.0, 40.0, 50.0], [60.0, 70.0, 80.0, 90.0, 100.0]]],
        [[0.0] * 5] * 2,
        (
            "twin_merging",
            {"weight": 1.0, "sparsify": "magnitude"},
            [[3.0, 6.0, 9.0, 12.0, 15.0], [18.0, 21.0, 24.0, 27.0, 100.0]],
            "density is 0.1 and lambda 0.3 by default",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "bernoulli-three-quarters",
        "what is kept is divided by 3/4: 3 becomes 4",
        [[[3.0, 3.0], [3.0, 3.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        (
            "twin_merging",
            {"weight": 1.0, "sparsify": "bernoulli", "density": 0.75, "lambda_": 0.0},
            [[4.0, 0.0], [4.0, 4.0]],
            "",
        ),
        masks=[[[1, 0], [1, 1]]],
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "bernoulli-zero",
        "no remainder: the shared model, half of each entry",
        [[[4.0, 0.0], [-4.0, 4.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        (
            "twin_merging",
            {"weight": 1.0, "sparsify": "bernoulli", "density": 0.0, "lambda_": 0.5},
            [[2.0, 0.0], [-2.0, 2.0]],
            "",
        ),
    )
    h.case(
        "nan-uncompressed",
        "at density 1 no singular values are asked for, so NaN stays where it is; 1/2 + (1 - 1/2) = 1",
        [[[float("nan"), 1.0], [1.0, 1.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("twin_merging", {"weight": 1.0, "density": 1.0, "lambda_": 0.5}, [[float("nan"), 1.0], [1.0, 1.0]], ""),
    )
    for id, scale in (("average", 0.5), ("average-of-another-shared", 2.0)):
        h.case(
            id,
            f"base 1; 5 and 9 with weights 1/4 and 3/4, not compressed; lambda {scale}: 5/4 + 27/4, whatever is shared",
            [[[5.0, 1.0]], [[9.0, 5.0]]],
            [[1.0, 1.0]],
            ("twin_merging", plain([0.25, 0.75], density=1.0, scale=scale), [[8.0, 4.0]], ""),
        )
    h.case(
        "vector-density-zero",
        "base 0; of the matrix nothing but the shared (4 + 2) / 2; the vector and the number are the first model's",
        [{"w": [[4.0]], "b": [4.0], "s": 4.0, "ids": i64(7)}, {"w": [[2.0]], "b": [2.0], "s": 2.0, "ids": i64(8)}],
        {"w": [[0.0]], "b": [0.0], "s": 0.0, "ids": i64(3)},
        (
            "twin_merging",
            plain([1.0, 0.0], "magnitude", 0.0),
            {"w": [[3.0]], "b": [4.0], "s": 4.0, "ids": i64(3)},
            "",
        ),
    )
    h.case(
        "weights-zero",
        "base 1, tau = 4 and 2: the shared model, 1 + 3",
        [[[5.0]], [[3.0]]],
        [[1.0]],
        ("twin_merging", plain([0.0, 0.0], density=1.0), [[4.0]], ""),
        ("twin_merging", plain(0.0, "magnitude"), [[4.0]], ""),
    )
    h.case(
        "unchanged",
        "models that equal the base",
        [[[1.0, 2.0], [3.0, 4.0]]] * 2,
        [[1.0, 2.0], [3.0, 4.0]],
        ("twin_merging", plain([0.75, 0.5], "magnitude"), [[1.0, 2.0], [3.0, 4.0]], "the base"),
    )
    inf = float("inf")
    h.case(
        "infinity",
        "the shared model has it too, and infinity less infinity is NaN, kept or not; elsewhere 1/2 of the change is shared",
        [[[inf, 1.0, 4.0, 2.0]]],
        [[0.0] * 4],
        ("twin_merging", plain(1.0, "magnitude", 1.0), [[nan, 1.0, 4.0, 2.0]], "kept"),
        ("twin_merging", plain(1.0, "magnitude", 0.0), [[nan, 0.5, 2.0, 1.0]], "dropped, as everything"),
    )
    return h


def softened(shared: Any, twice_p: Any) -> Any:
    share = float(np.tanh(0.5))
    return [[s + share * p for s, p in zip(*rows)] for rows in zip(shared, twice_p)]
