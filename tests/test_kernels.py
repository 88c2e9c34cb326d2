"""Kernels, the fast twins of methods: same name and signature, and within the ulps they declare of the reference.

There may be no kernel at all. `problem` is what finds fault with one, and is itself tested on kernels that are wrong.
"""

from __future__ import annotations

import inspect
import pkgutil

import numpy as np
import pytest

import refmerge
from refmerge import registry, testing
from refmerge.method import method
from refmerge.numeric import total
from refmerge.testing import assert_same

SHAPES = {"b": (33, 65), "a": (3000,), "one": (1,), "none": (0, 2)}


def inputs(m, dtype, seed, coarse):
    draw = np.random.default_rng(seed)

    def model():
        made = {n: draw.standard_normal(s) for n, s in SHAPES.items()}
        return {n: np.asarray(np.round(x * 4) / 4 if coarse else x, dtype) for n, x in made.items()}

    least, most = m.models
    return [model() for _ in range(max(least, min(3, most or 3)))], model() if m.takes_base else None


def problem(kernel, reference, library=None):
    """What is wrong with a kernel as a twin of a method; nothing where it is right.

    A kernel is called as its method is, and declares `kernel.ulps`, how far it may be.
    """
    if not isinstance(getattr(kernel, "ulps", None), int) or kernel.ulps < 0:
        return "declares no ulps"
    ours, theirs = inspect.signature(reference.run), inspect.signature(kernel)
    if [(p.name, p.kind, p.default) for p in ours.parameters.values()] != [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]:
        return f"has the signature {theirs}, the method {ours}"
    options = {"view": reference.view, "over": reference.over, "models": reference.models, "stats": reference.stats}
    twin = method(reference.name, paper=reference.paper, outputs=reference.outputs, work=reference.work, **options)(kernel)
    required = {k: 0.375 for k, p in reference.params.items() if p.required}

    def across(model):
        return model if library is None or model is None else {n: library.array(x) for n, x in model.items()}

    def back(model):
        return model if library is None else {n: library.host(x) for n, x in model.items()}

    for dtype, coarse in ((np.float32, False), (np.float32, True), (np.float64, False)):
        models, base = inputs(reference, dtype, 0, coarse)
        expected = refmerge.merge(models, reference, base=base, **required)
        try:
            got = back(refmerge.merge([across(m) for m in models], twin, base=across(base), **required))
            assert_same(got, expected, ulps=kernel.ulps)
        except Exception as error:
            return f"{np.dtype(dtype)}: {type(error).__name__}: {error}"
    if reference.name in testing.names():
        for case in testing.vectors(reference.name, reference.name):
            everything = [x for t in [*case.models, case.base or {}] for x in t.values()]
            if library is not None and not all(map(library.holds, everything)):
                continue
            models = [across(m) for m in case.models]
            call = case.call | {"base": across(case.base)}
            if wrong := testing.outcome(case, lambda models=models, call=call: back(refmerge.merge(models, twin, **call))):
                return f"vector {case.id}: {wrong}"
    return ""


def test_kernels_of_a_backend(backend):
    """Each kernel is right, and each file of the folder is a kernel of the method of its name."""
    opened = registry.open_backend(backend.spec)
    package = __import__(f"refmerge.backends.{backend.name.partition(':')[0]}.kernels", fromlist=["KERNELS"])
    files = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
    assert files == set(opened.kernels)
    for name, kernel in opened.kernels.items():
        assert problem(kernel, registry.get(name), backend) == "", name


# --- The check itself --------------------------------------------------------------------------------------------------


def declares(ulps):
    def mark(fn):
        fn.ulps = ulps
        return fn

    return mark


@declares(0)
def right(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    """The same sum in the same order, by another text."""
    share = [w / total(weight) if normalize else w for w in weight]
    merged = share[0] * models[0]
    for w, x in zip(share[1:], models[1:]):
        merged = merged + w * x
    return merged


def off_by(models, weight, factor):
    return factor * total(w * x for w, x in zip(weight, models)) / total(weight)


@declares(0)
def an_ulp_off(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    return off_by(models, weight, 1 + 2.0**-23)


@declares(2)
def far_off(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    return off_by(models, weight, 1.001)


@declares(0)
def forgets_normalize(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    """Right wherever the weights are to be normalised: only the vectors tell."""
    return right(models, weight=weight, normalize=True)


@declares(0)
def changes_a_block(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    out = right(models, weight=weight, normalize=normalize)
    return out[: out.shape[0] // 2]


@declares(0)
def another_default(models, *, weight: refmerge.PerModel[float] = 0.5, normalize: bool = True):
    return right(models, weight=weight, normalize=normalize)


@declares(0)
def another_parameter(models, *, weights: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    return right(models, weight=weights, normalize=normalize)


def undeclared(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    return right(models, weight=weight, normalize=normalize)


@declares(0)
def fails(models, *, weight: refmerge.PerModel[float] = 1.0, normalize: bool = True):
    raise NotImplementedError("for this dtype")


def test_the_check_accepts_a_right_kernel(library):
    assert problem(right, registry.get("linear"), library) == ""


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (an_ulp_off, "float32: AssertionError"),
        (far_off, "float32: AssertionError"),
        (forgets_normalize, "vector"),
        (changes_a_block, "TypeError"),
        (another_default, "signature"),
        (another_parameter, "signature"),
        (undeclared, "declares no ulps"),
        (fails, "NotImplementedError: for this dtype"),
    ],
)
def test_the_check_rejects_a_wrong_kernel(kernel, reason):
    assert reason in problem(kernel, registry.get("linear"))
