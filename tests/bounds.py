"""How far float32 may be from exact arithmetic: a bound for each elementwise method, and what is seen of it.

    python -m tests.bounds       writes spec/bounds.md

The formulas here are the pages', written for exact rational numbers and apart from the methods' texts: nothing below calls
a method but `merged`. They take arrays of Fractions, or of float64, which shows cheaply where a second look is worth while.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import refmerge
from refmerge import pages, registry

U = Fraction(1, 1 << 24)  # half the distance from 1 to the next float32
ETA = Fraction(1, 1 << 149)  # the least positive float32
FORMATS = {
    "bfloat16": (8, -126, 127),
    "float16": (11, -14, 15),
    "float32": (24, -126, 127),
}  # digits, exponents of normal ones
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def gamma(k: int) -> Fraction:
    """What k roundings one upon the other come to, at most: Higham, Accuracy and Stability of Numerical Algorithms, 3.1."""
    return k * U / (1 - k * U)


# -------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """What a method is given. base and models are arrays of rows; drawn are recorded draws, 0 or 1, for each model.
    For the formulas also what was chosen: `kept`, 0 or 1 for each model, and `q`, what a model's
    change is divided by."""

    base: Any
    models: list[Any]
    params: dict[str, Any]
    drawn: list[Any]
    kept: list[Any] = field(default_factory=list)
    q: list[Any] = field(default_factory=list)
    number: Callable[[Any], Any] = float

    @property
    def tau(self) -> list[Any]:
        return [x - self.base for x in self.models]

    def each(self, name: str) -> list[float]:
        """A parameter that takes one value a model."""
        value = self.params[name]
        return list(value) if isinstance(value, Sequence) else [value] * len(self.models)

    def numbers(self, name: str) -> list[Any]:
        return [self.number(value) for value in self.each(name)]

    def taken(self, where: Any, number: Callable[[Any], Any]) -> Sample:
        """These entries alone, in that kind of number."""
        convert = np.frompyfunc(lambda x: number(float(x)), 1, 1)

        def part(x: Any) -> Any:
            entries = np.asarray(x)[where]
            return entries.astype(np.float64) if number is float else np.asarray(convert(entries), dtype=object)

        lists = {name: [part(x) for x in getattr(self, name)] for name in ("models", "kept", "q")}
        return replace(self, base=part(self.base), number=number, **lists)


@dataclass(frozen=True)
class Value:
    """The formula's value, and its bound: gamma(k) size + lost eta."""

    value: Any
    k: int
    size: Any
    lost: Any


@dataclass(frozen=True)
class Bound:
    """needs: the arguments of `merge` beside models. k, size and lost are how the page writes the bound."""

    needs: tuple[str, ...]
    k: str
    size: str
    lost: str
    params: dict[str, Any]
    formula: Callable[[Sample], Value]
    choose: Callable[[Sample], Sample]


BOUNDS: dict[str, Bound] = {}


def bound(*, needs: tuple[str, ...] = ("base",), k: str, size: str, lost: str, params: dict[str, Any], choose: Any = None):
    """The params are those of the measurement."""

    def register(formula: Callable[[Sample], Value]) -> Callable[[Sample], Value]:
        BOUNDS[formula.__name__] = Bound(needs, k, size, lost, params, formula, choose or (lambda s: s))
        return formula

    return register


def magnitudes(terms: Iterable[Any]) -> Any:
    return sum(abs(x) for x in terms)


# ------------------------------------------------------------------------------------------------------------- averages


@bound(needs=(), k="2", size="|scale theta|", lost="1", params={"scale": 0.7})
def passthrough(s: Sample) -> Value:
    value = s.number(s.params["scale"]) * s.models[0]
    return Value(value, 2, abs(value), 1)


@bound(needs=(), k="N + 1", size="sum |c_n theta_n|", lost="N", params={"weight": [0.3, 0.5, 0.4]})
def linear(s: Sample) -> Value:
    w = s.each("weight")
    if s.params.get("normalize", True):
        w = [w_n / sum(w) for w_n in w]
    terms = [s.number(w_n) * x for w_n, x in zip(w, s.models)]
    return Value(sum(terms), len(terms) + 1, magnitudes(terms), len(terms))


@bound(k="3", size="|(1 - alpha) theta_0| + |alpha theta_1|", lost="2", params={"alpha": 0.3})
def wise_ft(s: Sample) -> Value:
    alpha = s.params["alpha"]
    terms = [s.number(1 - alpha) * s.base, s.number(alpha) * s.models[0]]
    return Value(sum(terms), 3, magnitudes(terms), 2)


@bound(k="3", size="|(1 - eta) theta_0| + |eta theta_S|", lost="2", params={"eta": 0.3})
def liti(s: Sample) -> Value:
    eta = s.params["eta"]
    terms = [s.number(1 - eta) * s.base, s.number(eta) * s.models[0]]
    return Value(sum(terms), 3, magnitudes(terms), 2)


@bound(k="3 N", size="(1 - mu)^N |theta_0| + sum mu (1 - mu)^(N-n) |theta_n|", lost="2 N", params={"mu": 0.3})
def ema(s: Sample) -> Value:
    mu, rest, N = s.number(s.params["mu"]), s.number(1 - s.params["mu"]), len(s.models)
    terms = [rest**N * s.base, *(mu * rest ** (N - n) * x for n, x in enumerate(s.models, 1))]
    return Value(sum(terms), 3 * N, magnitudes(terms), 2 * N)


# --------------------------------------------------------------------------------------------------------- task vectors


@bound(k="4", size="|theta_1| + |alpha tau|", lost="1", params={"alpha": 0.3})
def expo(s: Sample) -> Value:
    terms = [s.models[0], s.number(s.params["alpha"]) * s.tau[0]]
    return Value(sum(terms), 4, magnitudes(terms), 1)


@bound(
    k="N + 5", size="|theta_0| + |lambda| sum |w_n tau_n|", lost="1 + N |lambda|",
    params={"weight": [0.3, 0.5, 0.4], "lambda_": 0.7},
)  # fmt: skip
def task_arithmetic(s: Sample) -> Value:
    factor, N = s.number(s.params["lambda_"]), len(s.models)
    terms = [w_n * t for w_n, t in zip(s.numbers("weight"), s.tau)]
    return Value(s.base + factor * sum(terms), N + 5, abs(s.base) + abs(factor) * magnitudes(terms), 1 + N * abs(factor))


def by_mask(s: Sample) -> Sample:
    return replace(s, kept=s.drawn)


@bound(
    needs=("base", "mask"), k="N + 7", size="|theta_0| + |lambda| sum |w_n m_n tau_n / density_n|",
    lost="1 + |lambda| sum (1 + |w_n|)", choose=by_mask,
    params={"density": [0.3, 0.6, 0.9], "weight": [0.3, 0.5, 0.4], "lambda_": 0.7},
)  # fmt: skip
def dare_linear(s: Sample) -> Value:
    factor, w, N = s.number(s.params["lambda_"]), s.numbers("weight"), len(s.models)
    terms = [w_n * m * s.number(1 / d) * t for w_n, m, d, t in zip(w, s.kept, s.each("density"), s.tau)]
    lost = 1 + abs(factor) * sum(1 + abs(w_n) for w_n in w)
    return Value(s.base + factor * sum(terms), N + 7, abs(s.base) + abs(factor) * magnitudes(terms), lost)


@bound(
    k="N + 3", size="|theta_0| + |s| sum |tau_n|, s a tensor's scale", lost="1",
    params={"alpha": 0.7, "beta": 0.0, "blocks": 1},
)  # fmt: skip
def lines(s: Sample) -> Value:
    change = [s.number(s.params["alpha"]) * t for t in s.tau]  # of a tensor in no block
    return Value(s.base + sum(change), len(change) + 3, abs(s.base) + magnitudes(change), 1)


def nearest_enough(s: Sample) -> Sample:
    return replace(s, kept=[np.abs(s.tau[0]) <= np.float32(s.params["t"])])


@bound(k="2", size="|theta_0| + t; 0 where theta_1 is taken", lost="0", choose=nearest_enough, params={"t": 0.001})
def nearswap(s: Sample) -> Value:
    (theta_1,), (near,), t = s.models, s.kept, s.number(s.params["t"])
    sign = np.asarray((s.tau[0] > 0), int) - np.asarray((s.tau[0] < 0), int)
    far = s.base + t * sign
    return Value(near * theta_1 + (1 - near) * far, 2, (1 - near) * (abs(s.base) + t), 0)


def largest(s: Sample) -> Sample:
    size = np.abs(s.tau)
    last = len(size) - 1 - np.argmax(size[::-1], axis=0)
    return replace(s, kept=[last == n for n in range(len(size))])


@bound(k="4", size="|theta_0| + |lambda tau_n|, n the one taken", lost="1", choose=largest, params={"lambda_": 0.7})
def magmax(s: Sample) -> Value:
    return summed(s, s.tau, 4, 1)


def summed(s: Sample, change: list[Any], k: int, lost: Any) -> Value:
    """theta_0 + lambda (the sum of what is kept of each change)."""
    factor = s.number(s.params["lambda_"])
    terms = [m * t for m, t in zip(s.kept, change)]
    return Value(s.base + factor * sum(terms), k, abs(s.base) + abs(factor) * magnitudes(terms), lost)


def averaged(s: Sample, change: list[Any], k: int, lost: int) -> Value:
    """theta_0 + lambda (the mean of what is kept of each change). lost: underflows on the way to an entry of the mean."""
    factor, count = s.number(s.params["lambda_"]), sum(s.kept)
    terms = [m * t / (count + (count == 0)) for m, t in zip(s.kept, change)]
    return Value(s.base + factor * sum(terms), k, abs(s.base) + abs(factor) * magnitudes(terms), 1 + lost * abs(factor))


def top(x: Any, k: int) -> Any:
    """True at the k largest magnitudes, of equal ones at the first."""
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    mask = np.zeros(x.size, bool)
    mask[order[:k]] = True
    return mask.reshape(x.shape)


def elected(change: list[Any]) -> list[Any]:
    """True where a change has the sign of their sum from the left, and is not 0."""
    whole = change[0]
    for x in change[1:]:
        whole = whole + x
    return [np.sign(whole) * np.sign(x) > 0 for x in change]


def middle(s: Sample) -> list[Any]:
    outliers, kept = int(s.params["gamma"] * s.base.size), int(s.params["density"] * s.base.size)
    return [top(t, outliers + kept) & ~top(t, outliers) for t in s.tau]


def between(s: Sample) -> Sample:
    return replace(s, kept=middle(s))


@bound(
    k="N + 3", size="|theta_0| + |lambda| sum |m_n tau_n|", lost="1", choose=between,
    params={"density": 0.7, "gamma": 0.02, "lambda_": 0.7},
)  # fmt: skip
def breadcrumbs(s: Sample) -> Value:
    return summed(s, s.tau, len(s.models) + 3, 1)


def between_and_elected(s: Sample) -> Sample:
    return replace(s, kept=elected([m * t for m, t in zip(middle(s), s.tau)]))


MEAN = "|theta_0| + |lambda| mean |tau_n|, over those that agree"


@bound(
    k="N + 4", size=MEAN, lost="1 + |lambda|", choose=between_and_elected,
    params={"density": 0.7, "gamma": 0.02, "lambda_": 0.7},
)  # fmt: skip
def breadcrumbs_ties(s: Sample) -> Value:
    return averaged(s, s.tau, len(s.models) + 4, 1)


def trimmed_and_elected(s: Sample) -> Sample:
    k = int(s.params["density"] * s.base.size)
    return replace(s, kept=elected([top(t, k) * t for t in s.tau]))


@bound(k="N + 4", size=MEAN, lost="1 + |lambda|", choose=trimmed_and_elected, params={"density": 0.7, "lambda_": 0.7})
def ties(s: Sample) -> Value:
    return averaged(s, s.tau, len(s.models) + 4, 1)


def drawn_trimmed_and_elected(s: Sample) -> Sample:
    k = int(s.params["trim"] * s.base.size)
    change = [np.float32(1 / d) * (m * t) for d, m, t in zip(s.each("density"), s.drawn, s.tau)]
    return replace(s, kept=elected([top(x, k) * x for x in change]))


@bound(
    needs=("base", "mask"), k="N + 6", size="|theta_0| + |lambda| mean |tau_n / density_n|, over those that agree",
    lost="1 + (N + 1) |lambda|", choose=drawn_trimmed_and_elected,
    params={"density": [0.3, 0.6, 0.9], "trim": 0.7, "lambda_": 0.7},
)  # fmt: skip
def dare_ties(s: Sample) -> Value:
    N = len(s.models)
    return averaged(s, [s.number(1 / d) * t for d, t in zip(s.each("density"), s.tau)], N + 6, N + 1)


def row_probabilities(s: Sample) -> list[Any]:
    """q by rank of magnitude in the row, in float64: its roundings are far less than the room in gamma(k)."""
    columns = s.base.shape[-1]
    found = []
    for d, e, t in zip(s.each("density"), s.each("epsilon"), s.tau):
        ranks = np.argsort(np.argsort(np.abs(t), axis=-1, kind="stable"), axis=-1, kind="stable")
        found.append((d - e) + 2 * e * ranks / (columns - 1))
    return found


def drawn_by_rank(s: Sample) -> Sample:
    return replace(s, kept=s.drawn, q=row_probabilities(s))


def drawn_by_rank_and_elected(s: Sample) -> Sample:
    q = row_probabilities(s)
    return replace(s, kept=elected([m * t / np.asarray(q_n, np.float32) for m, t, q_n in zip(s.drawn, s.tau, q)]), q=q)


@bound(
    needs=("base", "mask"), k="N + 7", size="|theta_0| + |lambda| sum |w_n m_n tau_n / q_n|",
    lost="1 + |lambda| sum (1 + |w_n|)", choose=drawn_by_rank,
    params={"density": 0.6, "epsilon": 0.1, "weight": [0.3, 0.5, 0.4], "lambda_": 0.7},
)  # fmt: skip
def della_linear(s: Sample) -> Value:
    w, factor = s.numbers("weight"), abs(s.number(s.params["lambda_"]))
    change = [w_n * t / q_n for w_n, t, q_n in zip(w, s.tau, s.q)]
    return summed(s, change, len(w) + 7, 1 + factor * sum(1 + abs(w_n) for w_n in w))


@bound(
    needs=("base", "mask"), k="N + 6", size="|theta_0| + |lambda| mean |tau_n / q_n|, over those that agree",
    lost="1 + (N + 1) |lambda|", choose=drawn_by_rank_and_elected,
    params={"density": 0.6, "epsilon": 0.1, "lambda_": 0.7},
)  # fmt: skip
def della(s: Sample) -> Value:
    N = len(s.models)
    return averaged(s, [t / q_n for t, q_n in zip(s.tau, s.q)], N + 6, N + 1)


def changed_enough(s: Sample) -> Sample:
    return replace(s, kept=[np.abs(t) > np.float32(s.params["epsilon"]) for t in s.tau])


@bound(
    k="N + 2", size="|theta_0| + mean |tau_n|, over those that are above epsilon", lost="1", choose=changed_enough,
    params={"epsilon": 0.0005},
)  # fmt: skip
def ram(s: Sample) -> Value:
    return of_those_that_count(s, s.tau, len(s.models) + 2, 1)


def of_those_that_count(s: Sample, change: list[Any], k: int, lost: Any) -> Value:
    """theta_0 + the mean of what is kept of each change."""
    count = sum(s.kept)
    terms = [m * t / (count + (count == 0)) for m, t in zip(s.kept, change)]
    return Value(s.base + sum(terms), k, abs(s.base) + magnitudes(terms), lost)


def changed_and_enlarged(s: Sample) -> Sample:
    """What a model alone changed is enlarged by a number of counts, which are exact."""
    kept = changed_enough(s).kept
    count = sum(m.astype(int) for m in kept)
    scales = []
    for m in kept:
        shared, alone = int(np.sum(m & (count > 1))), int(np.sum(m & (count == 1)))
        scale = 1 + s.params["r"] * min(shared / alone if alone else 0.0, s.params["alpha"])
        scales.append(np.where(count == 1, scale, 1.0))
    return replace(s, kept=kept, q=scales)


@bound(
    k="N + 4", size="|theta_0| + mean |s_n tau_n|, over those that are above epsilon", lost="N + 1",
    choose=changed_and_enlarged, params={"epsilon": 0.0005, "r": 0.1, "alpha": 0.2},
)  # fmt: skip
def ramplus_tl(s: Sample) -> Value:
    N = len(s.models)
    return of_those_that_count(s, [s_n * t for s_n, t in zip(s.q, s.tau)], N + 4, N + 1)


# -------------------------------------------------------------------------------------------------- one task's, and few bits


def sign_of_change(s: Sample) -> Sample:
    (tau,) = s.tau
    alpha = math.fsum(np.abs(tau, dtype=np.float64).flat) / tau.size
    return replace(s, kept=[tau >= 0], q=[np.full(tau.shape, alpha)])


@bound(k="2", size="|theta_0| + alpha", lost="1", choose=sign_of_change, params={"layers": ["*"]})
def bitdelta(s: Sample) -> Value:
    (positive,), (alpha,) = s.kept, s.q
    return Value(s.base + (2 * positive - 1) * alpha, 2, abs(s.base) + alpha, 1)


def from_the_left(x: list[Any]) -> Any:
    whole = x[0]
    for more in x[1:]:
        whole = whole + more
    return whole


def masked(s: Sample, thresholds: Sequence[float]) -> list[Any]:
    """Where the multi-task vector is near enough to each task's."""
    whole = from_the_left(s.tau)
    return [np.abs(t) > np.float32(c) * np.abs(whole - t) for c, t in zip(thresholds, s.tau)]


def of_first_task(s: Sample) -> Sample:
    return replace(s, kept=[masked(s, [s.params["threshold"]])[0]])


@bound(k="N + 1", size="|theta_0| + m sum |tau_n|", lost="0", choose=of_first_task, params={"threshold": 0.7})
def tall_masks(s: Sample) -> Value:
    terms = [s.kept[0] * t for t in s.tau]
    return Value(s.base + sum(terms), len(terms) + 1, abs(s.base) + magnitudes(terms), 0)


def of_enough_tasks(s: Sample) -> Sample:
    count = sum(m.astype(int) for m in masked(s, s.each("threshold")))
    return replace(s, kept=[count >= s.params["k"]] * len(s.models))


@bound(
    k="N + 3", size="|theta_0| + |lambda| m sum |tau_n|", lost="1", choose=of_enough_tasks,
    params={"threshold": [0.3, 0.5, 0.4], "k": 2, "lambda_": 0.7},
)  # fmt: skip
def consensus(s: Sample) -> Value:
    return summed(s, s.tau, len(s.models) + 3, 1)


def largest_of_elected(s: Sample) -> Sample:
    agrees = elected(s.tau)
    size = np.stack([m * np.abs(t) for m, t in zip(agrees, s.tau)])
    first = np.argmax(size, axis=0)
    left = agrees[0] * np.max(size, axis=0)
    own, rest = (math.fsum(np.abs(x, dtype=np.float64).flat) for x in (s.tau[0], left))
    factor = np.full(s.base.shape, own / rest if rest else 0.0)
    return replace(s, kept=[agrees[0] & (first == n) for n in range(len(s.models))], q=[factor])


@bound(
    k="4", size="|theta_0| + |lambda_t tau_n|, n the one elected", lost="1", choose=largest_of_elected, params={"task": 0}
)
def emr(s: Sample) -> Value:
    terms = [s.q[0] * m * t for m, t in zip(s.kept, s.tau)]
    return Value(s.base + sum(terms), 4, abs(s.base) + magnitudes(terms), 1)


# What is merged entry by entry, too, and has no bound of this kind: why.
UNBOUNDED = {
    "fisher": "a quotient of sums of statistics, which may be as near to 0 as they like",
    "iso_c": "a singular value decomposition, but for vectors, which are averaged",
    "iso_cts": "a singular value decomposition, but for vectors, which are averaged",
    "dc_merge": "a singular value decomposition, but for vectors, which are averaged",
    "tsvm": "a singular value decomposition, but for vectors, which are averaged",
    "svc": "a singular value decomposition, but for vectors, which stay",
    "karcher": "coefficients are quotients of angles and their sines, found by iteration",
    "model_stock": "the ratio is a function of an angle, which is ill-conditioned where models are opposite",
    "multislerp": "directions are divided by the norm of their sum, which may cancel",
    "nuslerp": "coefficients are quotients of sines, of angles between whole vectors",
    "slerp": "coefficients are quotients of sines, of an angle between whole vectors",
    "warp": "coefficients are quotients of sines, of an angle between whole vectors",
    "pcb": "exponentials and hyperbolic tangents, whose rounding the platform's library decides",
    "rws": "the part along the clean model is taken off, and levels are chosen, by quotients of norms",
    "sce": "weights are shares of squares, which may underflow beside each other",
}


# ---------------------------------------------------------------------------------------- what is measured, and compared


def merged(name: str, s: Sample, out: str) -> np.ndarray:
    """What refmerge makes of a sample, as float64."""
    needs = BOUNDS[name].needs
    stats = [{"x.mask": m} for m in s.drawn] if "mask" in needs else None
    result = refmerge.merge(
        [{"x": x} for x in s.models], name, base={"x": s.base} if "base" in needs else None, stats=stats, out_dtype=out,
        nonfinite="propagate", threads=1, **s.params,
    )  # fmt: skip
    return result["x"].astype(np.float64)


def chosen(name: str, s: Sample) -> Sample:
    """The sample with what the method chooses of it, in numbers of float32."""
    as_float32 = {key: [np.asarray(x, np.float32) for x in getattr(s, key)] for key in ("models", "drawn")}
    with np.errstate(all="ignore"):
        found = BOUNDS[name].choose(replace(s, base=np.asarray(s.base, np.float32), **as_float32))
    return replace(s, kept=found.kept, q=found.q)


def evaluated(name: str, s: Sample, where: Any, number: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(value, bound) of some entries of a `chosen` sample."""
    v = BOUNDS[name].formula(s.taken(where, number))
    return v.value, number(gamma(v.k)) * v.size + number(ETA) * v.lost


def nearest(x: Fraction, dtype: str) -> float:
    """The float of that dtype nearest to x, of two the even one; beyond the largest infinity, as IEEE 754 has it."""
    digits, least, greatest = FORMATS[dtype]
    top = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if x and abs(x) < Fraction(2) ** top:
        top -= 1
    step = Fraction(2) ** (max(top, least) - digits + 1)
    rounded = round(x / step) * step
    return float(rounded) if abs(rounded) < 2 ** (greatest + 1) else float("inf") * (1 if x > 0 else -1)


def nearly_nearest(x: np.ndarray, dtype: str) -> np.ndarray:
    """As `nearest`, of float64 without a regard to what is too large."""
    digits, least, _ = FORMATS[dtype]
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, least) - digits + 1)
    return np.rint(x / step) * step


def misrounded(name: str, s: Sample, dtype: str, coefficient: Callable[[Any], Fraction] = Fraction) -> int:
    """How many entries of the result in that dtype are not the nearest to the exact value, with coefficients as they are, or
    as the function reads them."""
    s = chosen(name, s)
    result = merged(name, s, dtype)
    value, margin = evaluated(name, s, ..., float)
    near = nearly_nearest(value - 2 * margin, dtype) != nearly_nearest(value + 2 * margin, dtype)
    exact = BOUNDS[name].formula(replace(s.taken(near, Fraction), number=coefficient)).value
    return int(sum(nearest(x, dtype) != y for x, y in zip(exact, result[near])))


def furthest(name: str, s: Sample) -> Fraction | float:
    """The largest |float32 result - exact| in units of the bound."""
    s = chosen(name, s)
    exact, limit = evaluated(name, s, ..., Fraction)
    result = merged(name, s, "float32")
    worst: Fraction | float = Fraction(0)
    for x, b, y in zip(exact.flat, limit.flat, result.flat):
        error = abs(Fraction(float(y)) - x)
        if error:
            worst = max(worst, error / b if b else math.inf)
    return worst


# ------------------------------------------------------------------------------------------------------------- the page

FINE_TUNES = {"float32": (16, 1024), "bfloat16": (512, 1024), "float16": (512, 1024)}


def fine_tunes(name: str, dtype: str, shape: tuple[int, int], seed: int = 0) -> Sample:
    """Weights of the size of a language model's, and three models that differ from them by a twentieth of it."""
    draw, kind = np.random.default_rng(seed), DTYPES[dtype]
    models = min(3, registry.get(name).models[1] or 3)
    base = draw.normal(0, 0.02, shape).astype(kind)
    others = [(base.astype(np.float64) + draw.normal(0, 0.001, shape)).astype(kind) for _ in range(models)]
    return finished(name, base, others, draw)


def adversaries(name: str, shape: tuple[int, int], seed: int = 0) -> Sample:
    """Numbers of float32 of all magnitudes from the least subnormal to 2^60; half of the models' entries are the base's own,
    opposite, neighbours, or subnormals away from it."""
    draw = np.random.default_rng(seed)

    def any_magnitude() -> np.ndarray:
        return np.ldexp(draw.uniform(-1, 1, shape), draw.integers(-149, 60, shape)).astype(np.float32)

    def near(base: np.ndarray) -> np.ndarray:
        least = np.float32(2.0**-149)
        kinds = [base, -base, np.nextafter(base, np.float32(1)), base * np.float32(0.5), base + 3 * least, 5 * least - base]
        return np.choose(draw.integers(0, 2 * len(kinds), shape), [*kinds, *(any_magnitude() for _ in kinds)])

    base = any_magnitude()
    return finished(name, base, [near(base) for _ in range(min(3, registry.get(name).models[1] or 3))], draw)


def finished(name: str, base: np.ndarray, models: list[np.ndarray], draw: np.random.Generator) -> Sample:
    drawn = [(draw.uniform(size=base.shape) < 0.6).astype(np.float32) for _ in models]
    return Sample(base, models, BOUNDS[name].params, drawn)


def stated(name: str) -> str:
    """The bound as the page writes it."""
    b = BOUNDS[name]
    lost = {"0": "", "1": " + eta"}.get(b.lost, f" + ({b.lost}) eta" if " + " in b.lost else f" + {b.lost} eta")
    return f"g({b.k}) [{b.size}]{lost}"


def row(name: str) -> str:
    """What the page says of a method."""
    usual = furthest(name, fine_tunes(name, "float32", FINE_TUNES["float32"]))
    worst = furthest(name, adversaries(name, (4, 1024)))
    wrong = []
    for dtype in ("bfloat16", "float16"):
        s = fine_tunes(name, dtype, FINE_TUNES[dtype])
        counts = [misrounded(name, replace(s, params=of_many_digits(s.params)), dtype), misrounded(name, s, dtype)]
        counts.append(misrounded(name, s, dtype, as_written))
        wrong += [in_a_million(count, s.base.size) for count in counts]
    link = f"[{name}]({pages.page(name).family}/{name}.md)"
    bound = stated(name).replace("|", "\\|")
    return f"| {link} | {bound} | {float(usual):.2f} | {float(worst):.2f} | {' | '.join(wrong)} |"


def of_many_digits(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters a little changed, so that none of them is a short decimal or a simple fraction."""

    def changed(x: Any) -> Any:
        return x**1.0937 if type(x) is float else x

    return {key: [changed(x) for x in value] if isinstance(value, list) else changed(value) for key, value in params.items()}


def as_written(x: Any) -> Fraction:
    """The simple fraction or short decimal that a float64 stands for."""
    return Fraction(x).limit_denominator(1000)


def in_a_million(count: int, size: int) -> str:
    millionths = 1e6 * count / size
    return f"{millionths:.0f}" if millionths >= 10 or not count else f"{millionths:.1f}"


HEAD = """# Bounds

How far a result computed in float32 may be from the exact value of the page's formula, for methods whose result at an entry
is a fixed expression of that entry's inputs. Measured by `python -m tests.bounds`, which wrote this page;
`tests/test_bounds.py` holds every bound on inputs that cancel, underflow, and mix magnitudes.

## What is bounded

    |float32 result - exact value| <= g(k) [size] + a few eta

- The exact value is computed in rational numbers, with no rounding at all, from the inputs as they are stored and the
  coefficients as rule 2 has them: numbers of float64, such as 1 - alpha, w_n / (w_1 + ... + w_N), or 1 / density.
- u = 2^-24 is half the distance from 1 to the next float32, and g(k) = k u / (1 - k u) what k roundings one upon the other
  come to at most (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1). k counts the roundings on the
  longest way from an input to the result; that of a coefficient to float32 is one of them.
- The size is the sum of the magnitudes of what is added, with tau_n = theta_n - theta_0 taken exactly. So nothing is lost
  where models are close: a task vector enters with its own magnitude, not with that of the two models.
- eta = 2^-149 is the least positive float32: a product or a quotient may underflow, a sum never does.
- It holds where coefficients are 0 or normal numbers of float32 (from 1.2e-38), and nothing overflows on the way.
- What is *chosen* is given: masks, elected signs, the largest change, ranks. Choices are made of numbers of float32, and
  exact arithmetic may choose otherwise where two of them tie or a sum cancels. The bound is that of the formula with the
  choice that was made.

## In 16 bits

Inputs in bfloat16 or float16 are read exactly and the result is rounded once more, to nearest. It is the correctly rounded
exact value unless a number halfway between two values of 16 bits lies within the bound of it. Then it may be the other
neighbour, which is further away by no more than twice the bound. How often that happens depends on the coefficients:

- Those of many digits meet numbers halfway by chance: the columns *long* below.
- Short decimals and simple fractions, 0.7 or 1/3, often lead from numbers of 8 or 11 digits to one that is halfway but for
  the error of the coefficient itself, which is no number of float64: the columns *short*, some entries in a hundred. In
  float32 it is mostly just halfway and goes to the even neighbour, as it must with the coefficient that was written. The
  columns *as written* compare with the exact value for that one, 7/10 or 1/3.

```python
>>> import ml_dtypes
>>> import numpy as np
>>> from fractions import Fraction
>>> import refmerge
>>> x = np.array([205], dtype=ml_dtypes.bfloat16)
>>> float(refmerge.call("passthrough", [x], scale=0.7)[0]), Fraction("0.7") * 205, Fraction(0.7) * 205 < Fraction("143.5")
(144.0, Fraction(287, 2), True)

```

"""
TABLE = """## Measured

| method | bound | fine-tunes | adversaries | bfloat16: long | short | as written | float16: long | short | as written |
|---|---|---|---|---|---|---|---|---|---|
"""
FOOT = """
*fine-tunes* and *adversaries*: the largest error seen, in units of the bound, in {few} entries of fine-tuned weights
(normal, 0.02, changed by 0.001), and in 4096 entries of all magnitudes from 2^-149 to 2^60, half of them equal, opposite or
next to the base's. *bfloat16* and *float16*: how many entries in a million of the result are not the correctly rounded exact
value, counted over {many} entries of such fine-tunes in that dtype. The coefficients are short decimals, such as 0.7, means
of three models, and 1 / 0.6; *long* are their powers with exponent 1.0937. The probabilities q_n of `della` and
`della_linear`, alpha of `bitdelta` and lambda_t of `emr` are of many digits everywhere; the scales of `ramplus_tl`, mostly
1.02, are taken as found in float64 everywhere, *as written* too. N is the number of models, three where a method takes so
many; `lines` is shown for a tensor in no block; in the brackets of `liti` eta is its parameter.

## What has no bound here

Coefficients that are functions of whole tensors (an angle, a norm, a share of squares: slerp, model_stock, sce) are computed
in float64 by the rules for sums; quotients of sums of statistics (fisher) depend on these; decompositions and solvers state
a tolerance on their pages. Given their coefficients, those of the first kind are sums as the ones above, with the bound of
one. Method by method:

{unbounded}
"""


def unbounded() -> str:
    """The list of what has no bound."""
    return "\n".join(f"- [{name}]({pages.page(name).family}/{name}.md): {why}." for name, why in UNBOUNDED.items())


def main() -> None:
    few, many = (rows * columns for rows, columns in (FINE_TUNES["float32"], FINE_TUNES["bfloat16"]))
    rows = "".join(f"{row(name)}\n" for name in BOUNDS)
    text = HEAD + TABLE + rows + FOOT.format(few=few, many=many, unbounded=unbounded())
    Path(str(resources.files("refmerge.spec") / "bounds.md")).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
