"""How far float32 may be from exact arithmetic: a bound for each elementwise method, and what is seen of it.

    python -m tests.bounds       writes spec/bounds.md

The formulas here are the pages', written for exact rational numbers and apart from the methods' texts: nothing below calls
a method but `merged`. They take arrays of Fractions, or of float64, which shows cheaply where a second look is worth while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import refmerge
from refmerge import pages

U = Fraction(1, 1 << 24)  # half the distance from 1 to the next float32
ETA = Fraction(1, 1 << 149)  # the least positive float32
FORMATS = {"bfloat16": (8, -126, 127), "float16": (11, -14, 15), "float32": (24, -126, 127)}  # digits, exponents of normal ones
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def gamma(k: int) -> Fraction:
    """What k roundings one upon the other come to, at most: Higham, Accuracy and Stability of Numerical Algorithms, 3.1."""
    return k * U / (1 - k * U)


# -------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """What a method is given. base and models are arrays of rows; drawn are recorded draws, 0 or 1, for each model;
    fisher are statistics. For the formulas also what was chosen: `kept`, 0 or 1 for each model, and `q`, what a model's
    change is divided by."""

    base: Any
    models: list[Any]
    params: dict[str, Any]
    drawn: list[Any]
    fisher: list[Any]
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
            chosen = np.asarray(x)[where]
            return chosen.astype(np.float64) if number is float else np.asarray(convert(chosen), dtype=object)

        lists = {name: [part(x) for x in getattr(self, name)] for name in ("models", "fisher", "kept", "q")}
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


# ---------------------------------------------------------------------------------------- what is measured, and compared


def merged(name: str, s: Sample, out: str) -> np.ndarray:
    """What refmerge makes of a sample, as float64."""
    needs = BOUNDS[name].needs
    stats = None
    if "mask" in needs:
        stats = [{"x.mask": m} for m in s.drawn]
    elif "fisher" in needs:
        stats = [{"x.fisher": F} for F in s.fisher]
    result = refmerge.merge(
        [{"x": x} for x in s.models], name, base={"x": s.base} if "base" in needs else None, stats=stats, out_dtype=out,
        nonfinite="propagate", threads=1, **s.params,
    )  # fmt: skip
    return result["x"].astype(np.float64)


def chosen(name: str, s: Sample) -> Sample:
    """The sample with what the method chooses of it, in numbers of float32."""
    as_float32 = {key: [np.asarray(x, np.float32) for x in getattr(s, key)] for key in ("models", "drawn", "fisher")}
    with np.errstate(all="ignore"):
        return BOUNDS[name].choose(replace(s, base=np.asarray(s.base, np.float32), **as_float32))


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


def misrounded(name: str, s: Sample, dtype: str) -> int:
    """How many entries of the result in that dtype are not the nearest to the exact value."""
    s = chosen(name, s) if not s.kept else s
    result = merged(name, s, dtype)
    value, margin = evaluated(name, s, ..., float)
    near = nearly_nearest(value - 2 * margin, dtype) != nearly_nearest(value + 2 * margin, dtype)
    exact, _ = evaluated(name, s, near, Fraction)
    return sum(nearest(x, dtype) != y for x, y in zip(exact, result[near]))


def furthest(name: str, s: Sample) -> Fraction:
    """The largest |float32 result - exact| in units of the bound."""
    s = chosen(name, s)
    exact, limit = evaluated(name, s, ..., Fraction)
    result = merged(name, s, "float32")
    worst = Fraction(0)
    for x, b, y in zip(exact.flat, limit.flat, result.flat):
        error = abs(Fraction(float(y)) - x)
        if error:
            worst = max(worst, error / b if b else Fraction(10**9))
    return worst
