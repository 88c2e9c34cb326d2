"""Laws: what must hold of a merge whatever the numbers. A page that names a law switches its property test on.

A law is a function of a `Trial`, which draws inputs that bite (`refmerge.testing.checkpoints`) and parameters at and
between the ends of their domains, merges, and compares. Nothing is filtered: where a law needs exact sums it maps
subnormals to zero, and where the parameters are refused (weights that sum to zero) both sides must refuse them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.api import merge, prepare
from refmerge.errors import UsageError
from refmerge.method import Method, Param
from refmerge.registry import get
from refmerge.work import stat_name

__all__ = ["ALWAYS", "LAWS", "Law", "Trial", "statistics"]

Tensors = dict[str, np.ndarray]
NEUTRAL = {
    "lambda_": 1.0, "density": 1.0, "trim": 1.0, "gamma": 0.0, "weight": 1.0, "normalize": True, "epsilon": 0.0,
    "tolerance": 1e-12,
}  # fmt: skip


@dataclass(frozen=True)
class Law:
    """ulps: the tolerance that a page gets unless its [law_ulps] says another, in ulps of the largest number around."""

    name: str
    says: str
    ulps: float
    check: Callable[[Trial], None]


class Informed(dict[str, np.ndarray]):
    """A model with the statistics that go with it wherever a law moves it."""

    stats: Tensors


def informed(tensors: Tensors, of: Tensors) -> Tensors:
    """The tensors, with the statistics of another model where it has some."""
    if isinstance(of, Informed):
        tensors = Informed(tensors)
        tensors.stats = of.stats
    return tensors


def statistics(method: Method, tensors: Tensors, draw: np.random.Generator) -> Tensors:
    """Statistics that the method may be given for these tensors: positive numbers for "element", and for "whole" a positive
    definite matrix of each matrix's columns (of its rows, where the key speaks of gradients)."""
    found: Tensors = {}
    for key, kind in method.stats.items():
        for name, x in tensors.items():
            if kind == "element":
                found[stat_name(name, key)] = np.asarray(draw.integers(1, 9, x.shape) / 4, x.dtype)
            elif kind == "whole" and x.ndim == 2:
                side = x.shape[0 if "gradient" in key else 1]
                rows = draw.integers(-2, 3, (side, side)).astype(x.dtype)
                found[stat_name(name, key)] = rows.T @ rows + np.eye(side, dtype=x.dtype)
    return found


LAWS: dict[str, Law] = {}
ALWAYS = ("blocks", "backends")


def law(ulps: float = 0) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    def register(check: Callable[[Trial], None]) -> Callable[[Trial], None]:
        LAWS[check.__name__] = Law(check.__name__, (inspect.getdoc(check) or "").partition("\n")[0], ulps, check)
        return check

    return register


class Trial:
    """One trial of a law: `draw` is hypothesis' function that draws from a strategy."""

    def __init__(self, method: Method, draw: Callable[[Any], Any], ulps: float) -> None:
        self.method, self.draw, self.ulps = method, draw, ulps

    # What goes in.

    def choose(self, *values: Any) -> Any:
        from hypothesis import strategies as st

        return self.draw(st.sampled_from(values))

    def inputs(
        self, *, exact: bool = False, nonfinite: bool = False, most: int = 4, based: bool = False
    ) -> tuple[list[Tensors], Tensors | None]:
        """(models, base). exact: subnormals become zero, so that sums of a few entries and their multiples are exact.
        based: with a base also where it may be left out."""
        from refmerge.testing import checkpoints

        least, bound = self.method.models
        models, base = self.draw(
            checkpoints(
                min_models=least,
                max_models=max(least, min(most, bound or most)),
                base=self.with_base() if not based else self.method.takes_base,
                nonfinite=nonfinite,
            )
        )
        if exact:
            models, base = [normal(m) for m in models], base and normal(base)
        return self.informed(models), base

    def informed(self, models: Sequence[Tensors]) -> list[Tensors]:
        """The models, each with statistics of its own where the method rests on some."""
        if self.method.needs != "models":
            return list(models)
        draw, found = np.random.default_rng(self.choose(*range(64))), []
        for m in models:
            found.append(Informed(m))
            found[-1].stats = statistics(self.method, m, draw)
        return list(found)

    @staticmethod
    def stats(models: Sequence[Tensors]) -> dict[str, Any]:
        """What `merge` and `prepare` are given beside the models."""
        return {"stats": [m.stats for m in models if isinstance(m, Informed)]} if isinstance(models[0], Informed) else {}

    def with_base(self) -> bool:
        """Whether this trial has a base."""
        return self.method.needs_base or (self.method.takes_base and self.choose(False, True))

    def params(self, count: int, lists: bool = True, /, **fixed: Any) -> dict[str, Any]:
        """Parameters for `count` models; `fixed` are taken where the method has them."""
        chosen = {}
        for key, p in self.method.params.items():
            if key in fixed:
                chosen[key] = fixed[key]
            elif p.per_model and lists and self.choose(False, True):
                chosen[key] = [self._value(p) for _ in range(count)]
            else:
                chosen[key] = self._value(p)
        return chosen

    def _value(self, p: Param) -> Any:
        default = () if p.required or p.default is None else (p.default,)
        if p.choices:
            return self.choose(*p.choices)
        if p.type is bool:
            return self.choose(*default, False, True)
        if p.type is float:
            low, high = p.domain or (-np.inf, np.inf)
            return self.choose(*default, *(x for x in (1.0, 0.5, 0.0, 0.25, 2.0, -1.0) if low <= x <= high))
        if p.type is tuple and p.default and all(isinstance(glob, str) for glob in p.default):
            return self.choose(p.default, ("*",))  # globs of names: those drawn here are single letters
        if p.type is int and p.domain is not None:
            return self.choose(*default, *(n for n in (1, 0, 2, 3) if p.domain[0] <= n <= p.domain[1]))
        return p.default

    @property
    def along(self) -> str:
        """The parameter that goes from the first input (0) to the last (1)."""
        return next(key for key in ("t", "alpha", "mu", "eta") if key in self.method.params)

    # What comes out.

    def merge(self, models: Sequence[Tensors], base: Tensors | None, params: Mapping[str, Any], **options: Any) -> Any:
        """The merged tensors, or the error by which parameters are refused."""
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                given = self.stats(models) | options
                return merge(models, self.method, base=base, threads=1, nonfinite="propagate", **given, **params)
        except UsageError as refused:
            return refused

    def same(self, got: Any, expected: Any, *around: Tensors | None, ulps: float | None = None) -> None:
        """Equal up to the law's ulps of the largest number among `expected` and `around`; zeros of both signs are equal."""
        from refmerge.testing import assert_same

        ulps = self.ulps if ulps is None else ulps
        if isinstance(got, UsageError) or isinstance(expected, UsageError):
            assert type(got) is type(expected), (got, expected)
            return
        if not ulps:
            assert_same(got, expected, signed_zero=False)
            return
        assert got.keys() == expected.keys()
        everything = [x for t in (expected, *around) if t is not None for x in t.values()]
        largest = max((np.max(np.abs(x[np.isfinite(x)]), initial=0.0) for x in everything), default=0.0)
        for name, y in expected.items():
            x = got[name]
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            info = np.finfo(y.dtype)
            with np.errstate(invalid="ignore"):
                off = np.abs(x.astype(np.float64) - y.astype(np.float64))
            fits = (off <= ulps * (float(info.eps) * float(largest) + float(info.smallest_subnormal))) | (x == y)
            assert np.all(fits | (np.isnan(x) & np.isnan(y))), f"{name}: {x} is not {y} within {ulps} ulps of {largest}"


def normal(model: Tensors) -> Tensors:
    return informed({name: np.where(np.abs(x) < 2.0**-20, 0, x).astype(x.dtype) for name, x in model.items()}, model)


def each(f: Callable[..., Any], *models: Any) -> Tensors:
    """f on the tensors of some models, name by name, in their dtype."""
    with np.errstate(all="ignore"):
        made = {name: np.asarray(f(*(m[name] for m in models)), dtype=x.dtype) for name, x in models[0].items()}
        return informed(made, models[0])


def dyadic(t: Trial, like: Tensors) -> Tensors:
    """A shift of small dyadic numbers for each entry, made from one drawn number."""
    draw = np.random.default_rng(t.choose(*range(64)))
    return {name: (draw.integers(-8, 9, x.shape) / 4).astype(x.dtype) for name, x in like.items()}


# ---------------------------------------------------------------------------------------------------------- always on


@law()
def blocks(t: Trial) -> None:
    """Neither block size nor the number of threads changes a bit."""
    if t.choose(False, True):
        models, base = t.inputs(nonfinite=True)
        sizes: tuple[int, ...] = (1, 2, 3, 7)
    else:  # more than one leaf of a sum, and blocks that cut leaves
        models, base = t.inputs()
        columns = 70 if "whole" in t.method.stats.values() else 700  # a matrix of all pairs of columns has to be made
        shapes = {"a": (t.choose(2500, 1024, 1025),), "b": (3, columns)}
        draw = np.random.default_rng(t.choose(*range(64)))
        large = [{k: (draw.integers(-8, 9, s) / 4).astype(np.float32) for k, s in shapes.items()} for _ in range(9)]
        models, base = t.informed(large[1 : len(models) + 1]), base and large[0]
        sizes = (1000, 1024, 2048, 300)
    params = t.params(len(models))
    over = t.choose(None, "tensor", "model")
    expected = t.merge(models, base, params, over=over)
    try:
        plan = prepare(models, t.method, base=base, over=over, nonfinite="propagate", params=params, **t.stats(models))
        plan.elements, plan.threads = t.choose(*sizes), t.choose(1, 2, 3)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            got = plan.run()
    except UsageError as refused:
        got = refused
    bits(got, expected)


def bits(got: Any, expected: Any) -> None:
    from refmerge.testing import assert_same

    if isinstance(got, UsageError) or isinstance(expected, UsageError):
        assert type(got) is type(expected), (got, expected)
    else:
        assert_same(got, expected)


@law()
def backends(t: Trial) -> None:
    """NumPy, torch and array-api-strict give the same bits, or what the page's ulps allow."""
    models, base = t.inputs(nonfinite=t.choose(False, True))
    params = t.params(len(models))
    expected = t.merge(models, base, params)
    for put in _libraries():
        given = [{k: put(x) for k, x in m.items()} for m in models]
        there = {"stats": [{k: put(x) for k, x in s.items()} for ss in t.stats(models).values() for s in ss] or None}
        got = t.merge(given, base and {k: put(x) for k, x in base.items()}, params, **there)
        if not isinstance(got, UsageError):
            got = {k: np.asarray(x) for k, x in got.items()}
        if t.ulps:
            t.same(got, expected, base, *models)
        else:
            bits(got, expected)


def _libraries() -> list[Callable[[np.ndarray], Any]]:
    """Functions that bring a NumPy array into the libraries that are installed."""
    from importlib.util import find_spec

    put: list[Callable[[np.ndarray], Any]] = []
    if find_spec("torch"):
        import torch

        put.append(lambda x: torch.from_numpy(x.copy()))
    if find_spec("array_api_strict"):
        import array_api_strict

        put.append(lambda x: array_api_strict.asarray(x.copy()))
    return put


# ------------------------------------------------------------------------------------------------ models among themselves


@law()
def identical_models(t: Trial) -> None:
    """Models that equal each other, and the base where there is one, give themselves."""
    models, _ = t.inputs(exact=True)
    same = [models[0]] * len(models)
    params = t.params(len(models), normalize=True)
    got = t.merge(same, models[0] if t.with_base() else None, params)
    if not isinstance(got, UsageError):
        t.same(got, models[0])


@law()
def copies(t: Trial) -> None:
    """Copies of one model merge as that model alone."""
    models, base = t.inputs(exact=True, most=1)
    count = t.choose(2, 3, 4)
    params = t.params(1, False, normalize=True)
    t.same(t.merge(models * count, base, params), t.merge(models, base, params), *models, base)


@law()
def one_model(t: Trial) -> None:
    """One model at full strength (weight, density and lambda 1) comes back."""
    models, base = t.inputs(exact=True, most=1)
    t.same(t.merge(models, base, t.params(1, **NEUTRAL)), models[0], base)


@law()
def base_copy(t: Trial) -> None:
    """A further model that equals the base changes nothing."""
    models, base = t.inputs(exact=True)
    assert base is not None
    params = t.params(len(models), False)
    t.same(t.merge([*models, base], base, params), t.merge(models, base, params), *models, base)


@law()
def permutation(t: Trial) -> None:
    """The order of the models, each with its parameters, does not matter where sums are exact."""
    from hypothesis import strategies as st

    models, base = t.inputs(exact=True)
    params = t.params(len(models))
    order = t.draw(st.permutations(range(len(models))))
    moved = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in params.items()}
    t.same(t.merge([models[i] for i in order], base, moved), t.merge(models, base, params), *models, base)


@law(ulps=2)
def between(t: Trial) -> None:
    """At lambda 1 and weights that are not negative every entry lies between the least and the largest input."""
    models, base = t.inputs(exact=True)
    fixed: dict[str, Any] = {"lambda_": 1.0, "normalize": True}
    if "weight" in t.method.params:
        fixed["weight"] = [t.choose(1.0, 0.5, 3.0) for _ in models]
    fixed |= {key: t.choose(0.0, 0.25, 0.5, 1.0) for key in ("t", "alpha", "eta")}
    merged = t.merge(models, base, t.params(len(models), **fixed))
    inputs = [*models, *([base] if base else [])]
    held = each(lambda x, *ys: np.clip(x, np.min(ys, axis=0), np.max(ys, axis=0)) if x.size else x, merged, *inputs)
    t.same(merged, held, *inputs)


@law(ulps=4)
def additive(t: Trial) -> None:
    """Two models add what each would add alone."""
    models, base = t.inputs(exact=True, most=1)
    assert base is not None
    other = dyadic(t, base)
    params = t.params(1, False)
    alone = [t.merge([m], base, params) for m in (models[0], other)]
    both = each(lambda a, b, o: a + (b - o), *alone, base)
    t.same(t.merge([models[0], other], base, params), both, models[0], other, base)


@law()
def weight_scale(t: Trial) -> None:
    """Normalised weights may all be multiplied by one number."""
    models, base = t.inputs()
    params = t.params(len(models), normalize=True)
    assert "weight" in params, f"{t.method.name} has no weights"
    params["weight"] = [t.choose(1.0, 0.5, 2.0, 0.0, -1.0) for _ in models]
    lowest = (t.method.params["weight"].domain or (-np.inf,))[0]
    factor = t.choose(*(f for f in (0.5, 2.0, 8.0, -4.0) if f > lowest))
    scaled = params | {"weight": [factor * w for w in params["weight"]]}
    t.same(t.merge(models, base, scaled), t.merge(models, base, params), *models)


# --------------------------------------------------------------------------------------------------- maps of the inputs


@law(ulps=2)
def base_shift(t: Trial) -> None:
    """Shifting all models, and the base where the method takes one, shifts the result."""
    models, base = t.inputs(exact=True, based=True)
    by = dyadic(t, models[0])
    params = t.params(len(models), normalize=True)
    merged = t.merge(models, base, params)
    shifted = t.merge([each(np.add, m, by) for m in models], base and each(np.add, base, by), params)
    expected = merged if isinstance(merged, UsageError) else each(np.add, merged, by)
    t.same(shifted, expected, merged if isinstance(merged, dict) else None, by, *models, base)


@law()
def scale(t: Trial) -> None:
    """Multiplying all models, and the base, by a positive number multiplies the result."""
    _map_inputs(t, t.choose(0.25, 2.0, 4.0))


@law()
def negation(t: Trial) -> None:
    """Negating all models, and the base, negates the result."""
    _map_inputs(t, -1.0)


def _map_inputs(t: Trial, factor: float) -> None:
    models, base = t.inputs(exact=True)
    params = t.params(len(models))
    merged = t.merge(models, base, params)

    def times(m: Tensors) -> Tensors:
        return each(lambda x: factor * x, m)

    expected = merged if isinstance(merged, UsageError) else times(merged)
    t.same(t.merge([times(m) for m in models], base and times(base), params), expected, *map(times, models))


# ---------------------------------------------------------------------------------------------- particular parameters


@law()
def zero_lambda_is_base(t: Trial) -> None:
    """lambda 0 gives the base."""
    models, base = t.inputs()
    got = t.merge(models, base, t.params(len(models), lambda_=0.0))
    if not isinstance(got, UsageError):
        t.same(got, base)


@law(ulps=4)
def lambda_linear(t: Trial) -> None:
    """Twice the lambda goes twice as far from the base."""
    models, base = t.inputs(exact=True)
    assert base is not None
    params = t.params(len(models), lambda_=t.choose(0.25, 0.3, 1.0, -0.5))
    near, far = (t.merge(models, base, params | {"lambda_": k * params["lambda_"]}) for k in (1, 2))
    refused = isinstance(near, UsageError)
    expected = near if refused else each(lambda x, b: b + 2 * (x - b), near, base)
    t.same(far, expected, None if refused else near, base)


@law()
def density_zero_is_base(t: Trial) -> None:
    """density 0 gives the base."""
    models, base = t.inputs()
    t.same(t.merge(models, base, t.params(len(models), density=0.0)), base)


@law()
def density_one(t: Trial) -> None:
    """Where nothing is trimmed, every entry is merged for itself: a part of the tensors gives that part of the result."""
    models, base = t.inputs()
    params = t.params(len(models), density=1.0, trim=1.0, gamma=0.0)

    def part(m: Tensors) -> Tensors:
        return {name: x.reshape(-1)[x.size // 2 :] for name, x in m.items()}

    t.same(t.merge([part(m) for m in models], base and part(base), params), part(t.merge(models, base, params)))


@law()
def task_arithmetic(t: Trial) -> None:
    """Where nothing is dropped, it is task arithmetic with the same weights and lambda (or alpha)."""
    models, base = t.inputs(exact=True)
    params = t.params(len(models), density=1.0, trim=1.0, gamma=0.0)
    plain = {key: params[key] for key in ("weight", "lambda_") if key in params}
    if "alpha" in params:
        plain["lambda_"] = params["alpha"]
    expected = merge(models, get("task_arithmetic"), base=base, threads=1, **plain)
    t.same(t.merge(models, base, params), expected, *models, base)


@law()
def endpoints(t: Trial) -> None:
    """t (or alpha, mu or eta) 0 gives the first input and 1 the last."""
    models, base = t.inputs()
    first = models[0] if base is None else base
    t.same(t.merge(models, base, t.params(len(models)) | {t.along: 0.0}), first)
    t.same(t.merge(models, base, t.params(len(models)) | {t.along: 1.0}), models[-1])


@law(ulps=4)
def reversal(t: Trial) -> None:
    """From b to a at 1 - t is from a to b at t."""
    models, base = t.inputs(most=1 if t.method.needs_base else 2)
    inputs = [*([base] if base else []), *models]
    assert len(inputs) == 2
    a, b = inputs
    params = t.params(len(models)) | {t.along: t.choose(0.0, 0.25, 0.3, 0.5, 1.0)}
    back = params | {t.along: 1 - params[t.along]}
    there = t.merge([b] if base else [a, b], a if base else None, params)
    t.same(t.merge([a] if base else [b, a], b if base else None, back), there, a, b)


@law(ulps=8)
def norm(t: Trial) -> None:
    """Between two tensors of one norm, unless opposite, the norm stays."""
    draw = np.random.default_rng(t.choose(*range(1024)))
    n = t.choose(2, 3, 6)
    a = draw.integers(-8, 9, n) / 4
    b = draw.permutation(a) * draw.choice([-1.0, 1.0], n)
    dtype = t.choose(np.float32, np.float64)
    merged = t.merge([{"x": a.astype(dtype)}, {"x": b.astype(dtype)}], None, {t.along: t.choose(0.1, 0.25, 0.5, 1.0)})
    if np.any(a + b):
        got, expected = (np.asarray([np.linalg.norm(x.astype(np.float64))], dtype) for x in (merged["x"], a))
        t.same({"x": got}, {"x": expected})


@law()
def unbiased(t: Trial) -> None:
    """In expectation over the draws nothing is lost: the mean of many entries is theirs within six deviations."""
    count, density = 1 << 14, t.choose(0.1, 0.5, 0.9)
    base, model = {"x": np.zeros(count)}, {"x": np.ones(count)}
    fixed = NEUTRAL | {"density": density, "rescale": True}
    got = t.merge([model], base, t.params(1, **fixed), seed=t.choose(*range(1000)))["x"]
    deviation = float(np.sqrt((1 - density) / density / count))
    assert abs(float(np.mean(got)) - 1) < 6 * deviation
    kept = got[got != 0]
    assert np.all(np.abs(kept * density - 1) < 1e-12)
