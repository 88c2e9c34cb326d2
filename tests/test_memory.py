"""What methods of whole matrices take: the estimate, and what --max-memory makes of it."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from refmerge import ResourceError, merge
from refmerge.api import prepare
from refmerge.memory import of_whole
from refmerge.method import method

LONG = (6000, 40)
HELD = {"iso_c": 3.2, "tsvm": 3.5, "iso_cts": 3.9, "dc_merge": 3.8, "svc": 3.2}  # matrices of float64 beside the inputs


def models(shape, count, names=("w",)):
    draw = np.random.default_rng(0)
    return [{n: draw.standard_normal(shape).astype(np.float32) for n in names} for _ in range(count + 1)]


@pytest.mark.parametrize("shape", [LONG, (150, 140)])
@pytest.mark.parametrize("name", [*HELD, "knots", "opcm", "doge", "wudi", "official:tsvm"])
def test_the_estimate_is_what_is_held(name, shape):
    base, *tuned = models(shape, 2)
    steps = {"steps": 2} if name in ("doge", "wudi") else {}
    work = prepare(tuned, name, base=base, params=steps).work
    (t,) = work.tensors
    short, long = sorted(shape)
    lapack = 8 * (2 * min(long, 8 * short) + 5 * short) * short  # which is not traced
    text = of_whole(work, t) - 3 * 4 * t.size - 3 * 4 * t.size - lapack - 4 * t.size
    merge(tuned, name, base=base, **steps)
    tracemalloc.start()
    merge(tuned, name, base=base, **steps)
    held = tracemalloc.get_traced_memory()[1] - 4 * t.size
    tracemalloc.stop()
    assert text == pytest.approx(held, rel=0.3)


@pytest.mark.parametrize("name", HELD)
def test_a_long_matrix_is_held_few_times(name):
    base, *tuned = models(LONG, 2)
    merge(tuned, name, base=base)  # what is imported on the way does not count
    tracemalloc.start()
    merge(tuned, name, base=base)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < HELD[name] * 8 * base["w"].size


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("turned", [False, True])
def test_long_matrices_are_merged_as_others_are(name, turned):
    """Rows of zeros below a matrix make it long, and change nothing of what is above them."""
    draw = np.random.default_rng(3)
    base, *tuned = (draw.standard_normal((20, 6)) for _ in range(4))

    def long(x):
        y = np.zeros((400, 6))
        y[::20] = x
        return {"w": y.T if turned else y}

    params = {"density": 1.0} if name == "dc_merge" else {}
    of = [{"w": x.T if turned else x} for x in (base, *tuned)]
    short = merge(of[1:], name, base=of[0], **params)["w"]
    made = merge([long(x) for x in tuned], name, base=long(base), **params)["w"]
    np.testing.assert_allclose(made, long(short.T if turned else short)["w"], atol=1e-9)


def test_only_so_many_at_a_time_as_fit():
    at_once, most, lock = 0, 0, threading.Lock()

    @method("counts", paper="none", view="tensor")
    def counts(models):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        result = np.linalg.svd(models[0])[0] @ models[0]
        with lock:
            at_once -= 1
        return result

    arrays = models((260, 260), 0, names=[f"w{i}" for i in range(12)])
    (need,) = {of_whole(work, t) for work in [prepare(arrays, counts).work] for t in work.tensors}
    most = 0
    merge(arrays, counts, threads=4, max_memory=2 * need - 1)
    assert most == 1
    merge(arrays, counts, threads=4, max_memory=2 * need)
    assert most <= 2


def test_one_that_does_not_fit_is_named():
    base, *tuned = models((300, 280), 2, names=("small", "w"))
    for x in (base, *tuned):
        x["small"] = x["small"][:30]
    wanted = r"iso_c needs tensor 'w' whole: --max-memory \d+kB is the least, and 1000000 bytes are given"
    with pytest.raises(ResourceError, match=wanted):
        merge(tuned, "iso_c", base=base, max_memory="1MB")


def test_what_is_left_alone_says_nothing_about_the_others():
    base, *tuned = models((150, 140), 2, names=("head", "mlp"))
    work = prepare(tuned, "wudi", base=base, params={"layers": ("mlp",), "steps": 2}).work
    head, mlp = sorted(work.tensors, key=lambda t: t.name)
    assert of_whole(work, head) < 0.7 * of_whole(work, mlp)
