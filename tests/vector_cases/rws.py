"""Vectors of rws."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Test, i64, origin

SOURCE = (
    "VITA-Group/Robust_Weight_Signatures@4c796da model_patching.py:decompose (tools.py:get_projection, select_layers; "
    "quantize_utils/func.py:linear_quant)"
)
CODE = {"official:rws": SOURCE}

STAGED = (
    "rws-right-angle", "rws-one-signature", "rws-two-signatures", "rws-weight-two", "rws-levels", "rws-zero-is-no-level",
    "rws-two-levels-of-signs", "rws-shared-range", "rws-along-the-clean", "rws-clean-is-base",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    theta, *robust = given.models
    a, r = theta - given.base, [theta_n - given.base for theta_n in robust]
    v = [r_n - (np.sum(a * r_n) / np.sum(a * a) if np.any(a) else Fraction(0)) * a for r_n in r]
    found: dict[int, dict[str, Any]] = {1: {"a": a, "r": r}, 2: {"v": v}}
    if levels := given.params.get("levels"):
        v = [quantised(v_n, levels) for v_n in v]
        found[3] = {"v": v}
    weight = given.each("weight", 1.0)[1:]
    return found | {4: {"result": theta + sum(w_n * v_n for w_n, v_n in zip(weight, v))}}


def quantised(v: Any, levels: int) -> Any:
    """The nearest of `levels` values from the least to the greatest entry, of two the one with the even code."""
    low, step = np.min(v), (np.max(v) - np.min(v)) / (levels - 1)
    return np.array([low + step * round((x - low) / step) if step else low for x in v], object)


def hand() -> Hand:
    h = Hand("rws", CODE)

    def plain(*weight: float, **more: Any) -> dict[str, Any]:
        return {"weight": [1.0, *weight]} | more

    def official(*weight: float, **more: Any) -> dict[str, Any]:
        return {"weight": [0.0, *weight]} | more

    two = [0.0, 0.0]
    h.case(
        "right-angle",
        "a = (2, 0), r = (3, 5): 6/4 of a goes, and (0, 5) stays",
        [[2.0, 0.0], [3.0, 5.0]],
        two,
        ("rws", {}, [2.0, 5.0], "weight is 1 by default"),
        ("official:rws", official(1.0), [2.0, 5.0], ""),
    )
    six = [1.0] * 6
    clean, fog, snow = [3.0, 3, 1, 1, -1, 3], [6.0, 2, 3, 0, 1, 3], [2.0, 4, -3, 3, 3, 3]
    steps = "base 1, a = (2, 2, 0, 0, -2, 2), <a, a> = 16; r = (5, 1, 2, -1, 0, 2) has <a, r> = 16: v = (3, -1, 2, -1, 2, 0)"
    h.case(
        "one-signature",
        steps,
        [clean, fog],
        six,
        ("rws", plain(1.0), [6.0, 2.0, 3.0, 0.0, 1.0, 3.0], "clean + v"),
        ("official:rws", official(1.0), [6.0, 2.0, 3.0, 0.0, 1.0, 3.0], ""),
    )
    h.case(
        "taken-off",
        steps,
        [[6.0, 2, 3, 0, 1, 3], fog],
        six,
        ("rws", plain(0.0), [6.0, 2.0, 3.0, 0.0, 1.0, 3.0], "weight 0: the clean model, whatever it is"),
        ("official:rws", official(0.0), [6.0, 2.0, 3.0, 0.0, 1.0, 3.0], ""),
    )
    h.case(
        "two-signatures",
        f"{steps}; r = (1, 3, -4, 2, 2, 2) has <a, r> = 8: v = (0, 2, -4, 2, 3, 1)",
        [clean, fog, snow],
        six,
        ("rws", plain(1.0, 0.5), [6.0, 3.0, 1.0, 1.0, 2.5, 3.5], "clean + v_1 + v_2 / 2"),
        ("official:rws", official(1.0, 0.5), [6.0, 2.5, 2.0, 0.5, 1.75, 3.25], "clean + v_1 + v_2 / 4"),
        flags="RwsWeightTwice",
    )
    h.case(
        "weight-two",
        "v = (0, 4)",
        [[2.0, 0.0], [0.0, 4.0]],
        two,
        ("rws", plain(2.0), [2.0, 8.0], ""),
        ("official:rws", official(2.0), [2.0, 16.0], ""),
        flags="RwsWeightTwice",
    )
    h.case(
        "norms",
        "a tensor called bn1.weight: v = (0, 4) and (0, 8), weights 1/2",
        [{"bn1.weight": [2.0, 0.0]}, {"bn1.weight": [0.0, 4.0]}, {"bn1.weight": [8.0, 8.0]}],
        {"bn1.weight": two},
        ("rws", plain(0.5, 0.5), {"bn1.weight": [2.0, 6.0]}, ""),
        ("official:rws", official(0.5, 0.5), {"bn1.weight": [4.0, 6.0]}, "the mean of the robust models"),
        flags="RwsNormsAveraged",
    )
    h.case(
        "clean-is-base",
        "a = 0, r = (1, 2)",
        [[1.0, 1.0], [2.0, 3.0]],
        [1.0, 1.0],
        ("rws", {}, [2.0, 3.0], "nothing is taken out of r"),
        ("official:rws", official(1.0), [math.nan, math.nan], "0 / 0"),
        flags="RwsZeroClean",
    )
    h.case(
        "constant",
        "a = (2, -2), r = v = (3, 3): the range of v is a point",
        [[2.0, -2.0], [3.0, 3.0]],
        two,
        ("rws", {"levels": 16}, [5.0, 1.0], ""),
        ("official:rws", official(1.0, quantization=16), [math.nan, math.nan], "0 / 0"),
        flags="RwsConstantRange",
    )
    h.case(
        "levels",
        "v = (0, 1, 3, 8) in steps of 2: 1/2 and 3/2 of a step go to the even ones, 0 and 2",
        [[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 8.0]],
        [0.0] * 4,
        ("rws", {"levels": 5}, [2.0, 0.0, 4.0, 8.0], ""),
        ("official:rws", official(1.0, quantization=5), [2.0, 0.0, 4.0, 8.0], ""),
    )
    h.case(
        "zero-is-no-level",
        "v = (0, 6, -3): levels -3, 3/2 and 6; 0 is 2/3 of a step above -3",
        [[2.0, 0.0, 0.0], [0.0, 6.0, -3.0]],
        [0.0] * 3,
        ("rws", {"levels": 3}, [3.5, 6.0, -3.0], "2 + 3/2"),
        ("official:rws", official(1.0, quantization=3), [3.5, 6.0, -3.0], ""),
    )
    h.case(
        "two-levels",
        "v = (0, 1, 4): 1 is nearer to 0",
        [[2.0, 0.0, 0.0], [0.0, 1.0, 4.0]],
        [0.0] * 3,
        ("rws", {"levels": 2}, [2.0, 0.0, 4.0], ""),
        ("official:rws", official(1.0, quantization=2), REFUSED, "it takes 2 levels only of -x and x"),
        flags="RwsTwoLevels",
    )
    h.case(
        "two-levels-of-signs",
        "v = (0, 4, -4)",
        [[2.0, 0.0, 0.0], [0.0, 4.0, -4.0]],
        [0.0] * 3,
        ("rws", {"levels": 2}, [-2.0, 4.0, -4.0], "0 is half a step above -4, code 0"),
        ("official:rws", official(1.0, quantization=2), [2.0, 4.0, -4.0], "4 sgn(v), a third value"),
        flags="RwsTwoLevels",
    )
    h.case(
        "shared-range",
        "v = (0, 2, 1) and (0, 8, 4), 3 levels each",
        [[2.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 8.0, 4.0]],
        [0.0] * 3,
        ("rws", {"levels": 3}, [2.0, 10.0, 5.0], "0, 1, 2 and 0, 4, 8: both are exact"),
        ("official:rws", official(1.0, 1.0, quantization=3), [2.0, 8.0, 4.0], "0, 4, 8 for both: 2 becomes 0"),
        flags="RwsSharedRange",
    )
    h.case(
        "logarithm",
        "v = (2, -2, 1, -16)",
        [[2.0, 2.0, 0.0, 0.0], [2.0, -2.0, 1.0, -16.0]],
        [0.0] * 4,
        ("rws", {"levels": 3}, [4.0, 4.0, 2.0, -16.0], "-16, -7, 2: v becomes (2, 2, 2, -16)"),
        (
            "official:rws",
            official(1.0, quantization=6, quantization_method="log"),
            [3.0, 1.0, 1.0, -16.0],
            "log2: 1, 1, 0, 4 in steps of 2, half of 6 levels: 1 goes to the even step, 0; v becomes (1, -1, 1, -16)",
        ),
        flags="RwsCompands",
        tolerance=2.0**-22,
    )
    h.case(
        "logarithm-of-zero",
        "v = (0, 4)",
        [[2.0, 0.0], [0.0, 4.0]],
        two,
        ("rws", {"levels": 3}, [2.0, 4.0], ""),
        (
            "official:rws",
            official(1.0, quantization=8, quantization_method="log"),
            [math.nan, math.nan],
            "log2 0 is -inf, and so is the least level",
        ),
        flags="RwsLogZero",
    )
    h.case(
        "layers",
        "v = (0, 4) in both tensors",
        [{"first.w": [2.0, 0.0], "last.w": [2.0, 0.0]}, {"first.w": [0.0, 4.0], "last.w": [0.0, 4.0]}],
        {"first.w": two, "last.w": two},
        ("rws", {"layers": ["first.*"]}, {"first.w": [2.0, 4.0], "last.w": [2.0, 0.0]}, ""),
        ("official:rws", official(1.0, key_list=["first.w"]), {"first.w": [2.0, 4.0], "last.w": [2.0, 0.0]}, ""),
    )
    h.case(
        "no-layer",
        "no tensor is chosen: the clean model",
        [[2.0, -0.0], [0.0, 4.0]],
        two,
        ("rws", {"layers": []}, [2.0, -0.0], ""),
    )
    h.case(
        "along-the-clean",
        "r = 3 a, and r = 0: nothing at right angles",
        [[2.0, 2.0], [6.0, 6.0], [0.0, 0.0]],
        two,
        ("rws", {}, [2.0, 2.0], ""),
        ("official:rws", official(1.0, 1.0), [2.0, 2.0], ""),
    )
    h.case(
        "number",
        "a tensor of one entry has no right angle; one without entries stays as it is",
        [{"s": 2.0, "e": []}, {"s": 5.0, "e": []}],
        {"s": 0.0, "e": []},
        ("rws", {"levels": 4}, {"s": 2.0, "e": []}, ""),
    )
    h.case("levels-one", "one level says nothing", [[2.0], [1.0]], [0.0], ("rws", {"levels": 1}, REFUSED, ""))
    h.case("clean-alone", "no robust model", [[2.0]], [0.0], ("rws", {}, REFUSED, ""))
    h.case("no-base", "no task vector", [[2.0], [1.0]], None, ("rws", {}, REFUSED, ""))
    h.case(
        "robust-is-clean",
        "r = a = (2, 2): the signature is 0",
        [[2.0, 2.0], [2.0, 2.0]],
        two,
        ("rws", {}, [2.0, 2.0], ""),
    )
    h.case(
        "negative-weight",
        "v = (0, 5)",
        [[2.0, 0.0], [3.0, 5.0]],
        two,
        ("rws", plain(-1.0), [2.0, -5.0], ""),
        ("rws", plain(-0.5, levels=2), [2.0, -2.5], ""),
    )
    tiny = 2.0**-75
    h.case(
        "tiny-clean",
        "a = (2^-75, 0), whose product 2^-150 is a tie that goes to 0 in float32: nothing is taken out of r = (1, 3)",
        [[tiny, 0.0], [1.0, 3.0]],
        two,
        ("rws", {}, [1.0, 3.0], "2^-75 + 1 = 1"),
    )
    h.case(
        "tiny-clean-float64",
        "a = (2^-75, 0), <a, r> / <a, a> = 2^75: all of the first entry of r = (1, 3) goes",
        [[tiny, 0.0], [1.0, 3.0]],
        two,
        ("rws", {}, [tiny, 3.0], ""),
        dtype="F64",
    )
    far = 2.0**127
    h.case(
        "ends-far-apart",
        "a = (2, 0, 0, 0), v = (0, 2^127, -2^127, -2^126): the span 2^128 is infinite in float32; 0 - low = 2^127 and 2^126 "
        "over infinity are 0, code 0; infinity over infinity is NaN",
        [[2.0, 0.0, 0.0, 0.0], [0.0, far, -far, -far / 2]],
        [0.0] * 4,
        ("rws", {"levels": 3}, [-far, math.nan, -far, -far], "2 - 2^127 is -2^127"),
    )
    h.case(
        "ends-far-apart-float64",
        "v = (0, 2^127, -2^127, -2^126): levels -2^127, 0 and 2^127; -2^126 is half a step above -2^127, code 0",
        [[2.0, 0.0, 0.0, 0.0], [0.0, far, -far, -far / 2]],
        [0.0] * 4,
        ("rws", {"levels": 3}, [2.0, far, -far, -far], ""),
        dtype="F64",
    )
    h.case(
        "over-model",
        "a = (2, 0, 0), (2); r = (4, 6, 1), (0): <a, a> = 8 and <a, r> = 8 over both, v = (2, 6, 1), (-2); levels -2, 2, 6 "
        "from the ends of both, of which y is not patched",
        [{"x": [2.0, 0.0, 0.0], "y": [2.0]}, {"x": [4.0, 6.0, 1.0], "y": [0.0]}],
        {"x": [0.0] * 3, "y": [0.0]},
        ("rws", {"levels": 3, "layers": ["x"]}, {"x": [4.0, 6.0, 2.0], "y": [2.0]}, "2 + 2, 6, and 2 for 1"),
        options={"over": "model"},
    )
    nan = {"x": [2.0, 0.0], "y": [2.0, 0.0]}, {"x": [math.nan, 4.0], "y": [0.0, 4.0]}
    h.case(
        "nan",
        "a NaN in one tensor of the robust model",
        list(nan),
        {"x": two, "y": two},
        ("rws", {}, {"x": [math.nan, math.nan], "y": [2.0, 4.0]}, "it is in the inner product"),
        ("rws", {"layers": ["y"]}, {"x": [2.0, 0.0], "y": [2.0, 4.0]}, "x is not patched"),
    )
    h.case(
        "infinity",
        "a = (inf, 2) has no direction: inf / inf",
        [[math.inf, 2.0], [1.0, 4.0]],
        two,
        ("rws", {}, [math.nan, math.nan], ""),
    )
    h.case(
        "counters",
        "v = (0, 4) of running means; a counter stays the base's",
        [{"bn1.running_mean": [2.0, 0.0], "bn1.batches": i64(9)}, {"bn1.running_mean": [0.0, 4.0], "bn1.batches": i64(7)}],
        {"bn1.running_mean": two, "bn1.batches": i64(5)},
        ("rws", {}, {"bn1.running_mean": [2.0, 4.0], "bn1.batches": i64(5)}, ""),
    )
    ran(h)
    h.case(
        "axes",
        "a = (2, 0) and r = (1, 4) of three axes: all of r along a is taken out, (0, 4)",
        [[[[2.0]], [[0.0]]], [[[1.0]], [[4.0]]]],
        [[[0.0]], [[0.0]]],
        ("rws", {}, [[[2.0]], [[4.0]]], ""),
    )
    return h


def ran(h: Hand) -> None:
    """Single tensors of what the authors' code gave for small random networks."""

    def tensor(
        id: str, name: str, shape: tuple[int, ...], weight: list[float], arrays: list[list[float]], **more: Any
    ) -> None:
        base, clean, *robust, expect = (np.array(x, np.float32).reshape(shape) for x in arrays)
        models = [{name: x} for x in (clean, *robust)]
        given = {"entry": "official:rws", "params": {"weight": [0.0, *weight]} | more}
        if not more and len(robust) == 1:
            comment = "the paper's semantics give the same for one model at weight 1"
            h.tests.append(
                Test(
                    id=f"rws-{id}-paper", entry="rws", params={}, models=models, base={name: base}, expect={name: expect},
                    comment=comment, source=origin(SOURCE) | {"how": "ran"}, tolerance=2e-6,
                )
            )  # fmt: skip
        flags = ["RwsNormsAveraged"] if name.startswith("bn") else ["RwsWeightTwice"] if len(robust) > 1 else []
        h.tests.append(
            Test(
                id=f"rws-{id}", models=models, base={name: base}, expect={name: expect}, comment="random weights",
                source=origin(SOURCE) | {"how": "ran"}, tolerance=2e-6, flags=flags, **given,
            )
        )  # fmt: skip

    tensor(
        "official-00",
        "features.0.bias",
        (6,),
        [1.0],
        [
            [-1.3905061, -0.815238, -0.3204377, 0.7377385, -1.753363, 0.60329324],
            [-1.4882796, -0.2359478, -0.607996, 0.83190554, -1.1046214, 0.30857533],
            [-1.1860003, 0.26438674, -1.0698, 0.74076277, -1.500573, 0.9634081],
            [-1.1927674, 0.30448008, -1.0897022, 0.7472802, -1.4556729, 0.94301033],
        ],
    )
    tensor(
        "official-03",
        "features.5.bias",
        (8,),
        [1.0],
        [
            [-0.20545438, 0.0008271055, 1.0546254, -0.26684228, 1.0688465, -0.06180721, 1.1718467, -0.671252],
            [-0.75504327, -0.47713098, 1.0996476, 0.04982011, 0.8343538, -0.084290385, 0.9702888, -0.77626497],
            [-0.7423069, -0.47102457, 0.7903979, -0.032061055, 0.41994134, -0.26947746, 1.0385454, -0.3259781],
            [-0.768158, -0.49024573, 0.7977472, -0.02105178, 0.41693908, -0.27067655, 1.0149312, -0.3273226],
        ],
        quantization=16,
    )
    tensor(
        "official-06-norm",
        "bn1.bias",
        (4,),
        [0.5, 0.5],
        [
            [0.99065095, 0.3348703, 1.1497287, -0.54978603],
            [1.3110801, 0.95662755, 0.8235349, -0.9227903],
            [1.4721602, 1.2411786, 0.76275814, -0.63621265],
            [1.9228604, 1.0657703, 1.3938534, -0.7174366],
            [1.6975102, 1.1534745, 1.0783057, -0.6768246],
        ],
    )
    tensor(
        "official-06",
        "layer1.0.conv1.weight",
        (4, 4, 1, 1),
        [0.5, 0.5],
        [
            [
                0.88424313, -0.11766126, 0.9948668, -0.32596663, -3.0624259, 0.10809849, 0.6539068, 0.4917421, -0.7757881,
                -0.16842808, -2.340107, -1.0378753, -0.012615241, -1.0651609, -2.1343098, 1.2577733,
            ],
            [
                0.91243744, -0.74915546, 1.181348, -0.61183274, -2.8124807, 0.3296097, 0.16785654, 0.58021796, -0.2246483,
                -0.53134257, -2.5588157, -0.89440876, 0.39875102, -0.9850042, -2.3309243, 1.4671183,
            ],
            [
                0.9557365, -0.7379798, 0.98178476, -0.84600013, -3.1522062, 0.58993775, 0.1555576, 0.14895128, -0.11782479,
                -0.5227049, -2.241928, -1.1123664, 0.5863719, -0.6131692, -2.545342, 1.6134955,
            ],
            [
                0.44279408, -0.85330015, 0.73166823, -0.46735254, -2.6863909, 0.14968905, -0.1605267, 0.1786841, -0.46723494,
                -0.7246668, -2.0011773, -0.9442533, 1.254904, -1.1148971, -2.1322198, 1.9933966,
            ],
            [
                0.80428624, -0.73734176, 1.0086851, -0.6183853, -2.8797648, 0.33741486, 0.109667934, 0.3671063, -0.2891843,
                -0.5573678, -2.328043, -0.9693235, 0.63685846, -0.92896837, -2.323938, 1.6236608,
            ],
        ],
    )  # fmt: skip
