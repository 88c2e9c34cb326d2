"""Array libraries, backends and every method as fixtures. A library that is not installed is skipped with the reason.

BLAS has one thread in each test process: more would wait for each other where pytest-xdist has a process on each core.

REFMERGE_TEST_BACKENDS is a comma list of names ("numpy,torch,array_api_strict,torch:cuda:0,cupy"). A backend that is named
there and missing is a failure instead of a skip.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

from refmerge import registry

settings.register_profile("no_clock", deadline=None, derandomize=True)  # machines are busy, and a run can be repeated
settings.load_profile("no_clock")

DEMANDED = {name.strip() for name in os.environ.get("REFMERGE_TEST_BACKENDS", "").split(",")} - {""}
KNOWN = ("numpy", "torch", "array_api_strict", "torch:cuda:0", "cupy")


def pytest_configure(config):
    if unknown := DEMANDED - set(KNOWN):
        raise pytest.UsageError(f"REFMERGE_TEST_BACKENDS: {', '.join(sorted(unknown))} is none of {', '.join(KNOWN)}")
    if importlib.util.find_spec("tqdm"):  # which libraries under test bring
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its thread would stay, and with another thread about no merge forks


def _params(*names):
    return [pytest.param(n, marks=[pytest.mark.gpu] if n in KNOWN[3:] else []) for n in names]


def _missing(name: str, reason: str):
    if name in DEMANDED:
        pytest.fail(f"REFMERGE_TEST_BACKENDS names {name}: {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Library:
    """One array library on one device. `spec` is what `backend=` takes, None where there is no such backend."""

    name: str
    spec: str | None
    module: Any

    def array(self, x: np.ndarray) -> Any:
        """A NumPy array in this library, bfloat16 included where the library has it. Never shares memory."""
        x = np.array(x)
        if self.name == "numpy":
            return x
        if self.name.startswith("torch"):
            device = self.name.partition(":")[2] or "cpu"
            if x.dtype == ml_dtypes.bfloat16:
                return self.module.from_numpy(x.view(np.int16)).view(self.module.bfloat16).to(device)
            return self.module.from_numpy(x).to(device)
        return self.module.asarray(x)

    def host(self, x: Any) -> np.ndarray:
        """One of its arrays as a NumPy array of the same dtype."""
        if self.name.startswith("torch"):
            x = x.detach().cpu().contiguous()
            if x.dtype == self.module.bfloat16:
                return x.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
            return x.numpy()
        return x.get() if self.name == "cupy" else np.asarray(x)

    def holds(self, x: np.ndarray) -> bool:
        """Whether it has arrays of this dtype at all."""
        if self.name.startswith("torch"):
            return x.dtype.kind != "V" or x.dtype == ml_dtypes.bfloat16
        if self.name == "array_api_strict":
            return x.dtype.kind != "V" and x.dtype != np.float16
        return self.name == "numpy" or x.dtype.kind != "V"

    def owns(self, x: Any) -> bool:
        """Whether x is this library's array, on this device."""
        if type(x).__module__.partition(".")[0] != self.name.partition(":")[0]:
            return False
        return not self.name.startswith("torch") or str(x.device) == (self.name.partition(":")[2] or "cpu")


def open_library(name: str) -> Library:
    """The library; skips, or fails where REFMERGE_TEST_BACKENDS demands it, if it or its device is not here."""
    module = None
    try:
        module = importlib.import_module(name.partition(":")[0])
    except ImportError as error:
        _missing(name, f"{name} is not installed: {error}")
    if name == "torch:cuda:0" and not module.cuda.is_available():
        _missing(name, "torch has no CUDA device here")
    if name == "cupy":
        try:
            count = module.cuda.runtime.getDeviceCount()
        except Exception:  # CuPy raises errors of several kinds without a driver
            count = 0
        if not count:
            _missing(name, "CuPy has no CUDA device here")
    return Library(name, None if name == "array_api_strict" else name, module)


@pytest.fixture(params=_params(*KNOWN))
def library(request) -> Library:
    """Every array library that refmerge is held to."""
    return open_library(request.param)


@pytest.fixture(params=_params("torch", "array_api_strict", "torch:cuda:0", "cupy"))
def foreign(request) -> Library:
    """Every array library but NumPy, which the others are compared with."""
    return open_library(request.param)


@pytest.fixture(params=_params("numpy", "torch", "torch:cuda:0", "cupy"))
def backend(request) -> Library:
    """Every library that has a backend of its own."""
    return open_library(request.param)


@pytest.fixture
def torch():
    return open_library("torch").module


# --- Every method ------------------------------------------------------------------------------------------------------

# Beside each method with its defaults: parameters that lead elsewhere in its text.
VARIANTS = [
    ("linear", {"normalize": False}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"per": "row"}),
    ("nuslerp", {"per": "column"}),
    ("multislerp", {"normalize": False}),
    ("mergekit:nuslerp", {"nuslerp_flatten": False}),
    ("mergekit:nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("dare_linear", {"density": 0.3}),
    ("dare_ties", {"density": 0.3}),
    ("tall_masks", {"multitask": "ties"}),
    ("consensus", {"multitask": "ties", "k": 1}),
    ("low_rank_residual", {"rank": 2}),
    ("emr", {"average": "tensors"}),
    ("bitdelta", {"layers": ("*",)}),
    ("cart", {"layers": ("*",)}),
    ("twin_merging", {"sparsify": "magnitude"}),
    ("twin_merging", {"sparsify": "bernoulli"}),
    ("mergekit:model_stock", {"filter_wise": True}),
    ("mergekit:ties", {"rescale": True}),
    ("mergekit:breadcrumbs", {"rescale": True}),
    ("fusion_bench:dare", {"threshold": 30.0}),
    ("fusion_bench:dare", {"only_on_linear_weights": True}),
    ("fusion_bench:linear", {"weights": 0.375}),
    ("fusion_bench:ties", {"merge_func": "max"}),
    ("official:breadcrumbs", {"remove_first": False}),
    ("official:emr", {"flat": True}),
    ("official:dare", {"mask_strategy": "magnitude"}),
    ("official:dare", {"mask_apply_method": "ties_merging", "use_weight_rescale": True}),
    ("official:consensus", {"use_ties": True, "prun_thre_k": 1}),
    ("official:tall_masks", {"use_ties": True}),
    ("official:tall_masks", {"k": 50.0}),
    ("official:task_arithmetic", {"op": "negate"}),
    ("official:ties", {"reset_type": "std"}),
    ("official:ties", {"resolve_method": "normfrac", "merge_func": "dis-max"}),
    ("official:ties", {"resolve_method": "normmass", "merge_func": "dis-sum"}),
    ("peft:ties", {"majority_sign_method": "frequency"}),
    ("sd_mecha:ties", {"vote_sgn": True}),
]


STEPS = ("steps", "num_steps", "steps_per_layer", "iter_num")  # of descent: a few show what hundreds would


@dataclass(frozen=True)
class Case:
    """A method with parameters that do something."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)

    def arguments(self, models: int = 3) -> tuple[Any, int, dict[str, Any]]:
        """The method, how many models to give it (as asked, if it takes so many), and its parameters."""
        m = registry.get(self.name)
        least, most = m.models
        given = dict(self.params)
        for key, p in m.params.items():
            if p.required and key not in given:
                given[key] = {float: 0.375, int: 1, bool: True, str: (p.choices or ("",))[0]}[p.type]
            elif key == "density" and key not in given:
                given[key] = 0.25
            elif key in STEPS and key not in given:
                given[key] = 3
        return m, max(least, min(models, most or models)), given


def pytest_generate_tests(metafunc):
    """`case`, where a test does not say itself what it is: every method, with its defaults and the variants above."""
    own = any("case" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "case" in metafunc.fixturenames and not own:
        # What rests on statistics is tried in test_data_driven.py, which has some.
        names = [name for name in registry.names() if not registry.get(name).needs]
        cases = [*map(Case, names), *(Case(name, params) for name, params in VARIANTS)]
        ids = [c.name + "".join(f",{k}={v}" for k, v in c.params.items()) for c in cases]
        metafunc.parametrize("case", cases, ids=ids)


@pytest.fixture
def make_case():
    return Case
