"""The contract of a method, the registry with other people's plug-ins, and what importing refmerge costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Literal

import numpy as np
import pytest

import refmerge
from refmerge import registry
from refmerge.api import prepare
from refmerge.errors import UsageError
from refmerge.method import PerModel, method, same_as
from refmerge.numeric import total

# --- @method -----------------------------------------------------------------------------------------------------------


def test_the_signature_is_the_contract():
    @method("toy", paper="none", models=(2, 3), domain={"density": (0.0, 1.0)}, stats={"gram": "whole"})
    def toy(
        base,
        models,
        stats,
        name,
        *,
        density: PerModel[float] = 0.5,
        mode: Literal["a", "b"] = "a",
        flag: bool,
        sizes: tuple = (1, 2),
        guess=3,
        t: float | None = None,
        mixed: float | str = 20,
    ):
        """What it says."""
        return density, mode, flag, sizes, guess, t, mixed

    assert (toy.name, toy.paper, toy.models, toy.view, toy.over) == ("toy", "none", (2, 3), "flat", "tensor")
    assert toy.asks == ("base", "models", "stats", "name")
    assert toy.needs_base
    assert toy.doc == "What it says."
    assert dict(toy.stats) == {"gram": "whole"}
    kinds = {k: (p.type, p.per_model, p.optional, p.required, p.domain, p.choices) for k, p in toy.params.items()}
    assert kinds == {
        "density": (float, True, False, False, (0.0, 1.0), None),
        "mode": (str, False, False, False, None, ("a", "b")),
        "flag": (bool, False, False, True, None, None),
        "sizes": (tuple, False, False, False, None, None),
        "guess": (int, False, False, False, None, None),
        "t": (float, False, True, False, None, None),
        "mixed": (object, False, False, False, None, None),
    }
    assert toy({}, [], None, "x", flag=True)[2] is True  # calling the Method calls the function
    with pytest.raises(AttributeError):
        toy.name = "other"
    with pytest.raises(TypeError):
        toy.params["density"] = None


def _args(models, *args):
    return models


def _kwargs(models, **kwargs):
    return models


def _positional_only(models, /):
    return models


def _no_models(base):
    return base


def _unknown(models, weights):
    return models


def _parameter_as_positional(models, density=0.5):
    return models


def _models_with_a_default(models=None):
    return models


def _base_with_another_default(models, base=0):
    return models


def _no_annotation(models, *, k):
    return models


def _none_alone(models, *, k=None):
    return models


def _complex(models, *, k: complex = 1j):
    return models


def _dict(models, *, k: dict):
    return models


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (_args, r"\*args"),
        (_kwargs, r"\*kwargs"),
        (_positional_only, "models"),
        (_no_models, "models"),
        (_unknown, "'weights' is none of models, base, stats, group, rng, name"),
        (_parameter_as_positional, "'density'.*keyword-only"),
        (_models_with_a_default, "models = None: only base may have a default, None"),
        (_base_with_another_default, "base = 0: only base may have a default, None"),
        (_no_annotation, "parameter k"),
        (_none_alone, "parameter k"),
        (_complex, "parameter k"),
        (_dict, "parameter k"),
    ],
)
def test_other_signatures_are_refused(fn, message):
    with pytest.raises(TypeError, match=f"bad.*{message}"):
        method("bad", paper="none")(fn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "row"}, "view.*'row'"),
        ({"over": "model "}, "over.*'model '"),
        ({"stats": {"gram": "all"}}, "stats.*'all'"),
        ({"domain": {"densty": (0.0, 1.0)}}, "domain.*'densty'"),
    ],
)
def test_declarations_with_a_slip_are_refused(options, message):
    def fn(models, *, density: float = 0.5):
        return models[0]

    with pytest.raises(TypeError, match=f"bad.*{message}"):
        method("bad", paper="none", **options)(fn)


# --- bind --------------------------------------------------------------------------------------------------------------


@method("toy", paper="none", models=(2, 3), domain={"density": (0.0, 1.0)})
def toy(
    models,
    base,
    *,
    need: float,
    density: PerModel[float] = 0.5,
    mode: Literal["a", "b"] = "a",
    flag: bool = False,
    count: int = 1,
    t: float | None = None,
    names: tuple = (),
    mixed: float | str = 20,
):
    """Toy."""
    return models[0]


def test_bind_completes():
    bound = toy.bind({"need": 2, "density": [0, 1]}, 2)
    assert bound == {
        "need": 2.0, "density": (0.0, 1.0), "mode": "a", "flag": False, "count": 1, "t": None, "names": (), "mixed": 20,
    }  # fmt: skip
    assert list(bound) == list(toy.params)
    assert type(bound["need"]) is float
    assert all(type(d) is float for d in bound["density"])
    assert toy.bind({"need": np.float64(2)}, 3)["density"] == (0.5, 0.5, 0.5)
    assert toy.bind({"need": float("inf"), "names": ["a"], "mixed": "x"}, 1)["names"] == ("a",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "toy needs the parameter need"),
        ({"need": 1.0, "densty": 0.5}, "no parameter 'densty'; did you mean density.*need, density, mode"),
        ({"need": 1.0, "zzzzz": 0.5}, r"no parameter 'zzzzz' \(its parameters: need"),
        ({"need": 1.0, "density": [0.5]}, "density has 1 values for 2 models"),
        ({"need": 1.0, "density": [0.5] * 3}, "density has 3 values for 2 models"),
        ({"need": 1.0, "density": []}, "density has 0 values for 2 models"),
        ({"need": 1.0, "density": [0.5, 1.5]}, r"density = 1.5 is outside \[0.0, 1.0\]"),
        ({"need": 1.0, "density": -1}, "density = -1.0 is outside"),
        ({"need": 1.0, "density": float("nan")}, "density is NaN"),
        ({"need": 1.0, "density": None}, "density = None is not of type float"),
        ({"need": 1.0, "density": [0.5, "0.5"]}, "density = '0.5' is not of type float"),
        ({"need": True}, "need = True is not of type float"),
        ({"need": "1"}, "need = '1' is not of type float"),
        ({"need": [1.0, 2.0]}, "need = .* is not of type float"),
        ({"need": 1.0, "mode": "c"}, "mode = 'c' is none of 'a', 'b'"),
        ({"need": 1.0, "names": "a"}, "names = 'a' is not of type list"),
        ({"need": 1.0, "flag": 1}, "flag = 1 is not of type bool"),
        ({"need": 1.0, "count": True}, "count = True is not of type int"),
        ({"need": 1.0, "count": 1.0}, "count = 1.0 is not of type int"),
    ],
)
def test_bind_refuses(given, message):
    with pytest.raises(UsageError, match=message):
        toy.bind(given, 2)


def test_bind_takes_numbers_of_numpy():
    bound = toy.bind({"need": np.int64(2), "density": np.float16(0.5), "count": np.int32(3), "flag": np.True_}, 1)
    assert bound["need"] == 2.0 and bound["density"] == (0.5,) and bound["count"] == 3 and bound["flag"] is True
    assert [type(bound[k]) for k in ("need", "count", "flag")] == [float, int, bool]


@pytest.mark.parametrize(
    ("models", "count", "base", "message"),
    [
        ((2, 3), 1, True, "merges 2 to 3 models, 1 given"),
        ((2, 3), 4, True, "merges 2 to 3 models, 4 given"),
        ((2, 2), 1, True, "merges 2 models, 1 given"),
        ((1, 1), 2, True, "merges 1 model, 2 given"),
        ((2, None), 1, True, "merges at least 2 models, 1 given"),
        ((1, None), 0, True, "merges at least 1 models?, 0 given"),
        ((1, None), 1, False, "needs a base model: give base="),
    ],
)
def test_number_of_models(models, count, base, message):
    @method("counted", paper="none", models=models)
    def counted(models, base):
        return models[0]

    with pytest.raises(UsageError, match=f"counted {message}"):
        counted.check_models(count, base)


def test_view_may_depend_on_parameters():
    @method("viewed", paper="none", view=lambda whole: "tensor" if whole else "flat")
    def viewed(models, *, whole: bool = False):
        return models[0]

    assert viewed.view_for({"whole": True}) == "tensor"
    assert viewed.view_for({"whole": False}) == "flat"


def test_view_may_depend_on_the_number_of_dimensions():
    @method("viewed", paper="none", view=lambda ndim: "tensor" if ndim > 2 else "rows")
    def viewed(models, *, scale: float = 1.0):
        return models[0]

    assert [viewed.view_for({"scale": 1.0}, ndim) for ndim in (1, 2, 3)] == ["rows", "rows", "tensor"]
    renamed = same_as(viewed, "tool:viewed", source="tool 1.0", factor="scale")
    assert [renamed.view_for({"factor": 1.0}, ndim) for ndim in (1, 2, 3)] == ["rows", "rows", "tensor"]


# --- A base that may be left out ---------------------------------------------------------------------------------------


@method("from_somewhere", paper="none", models=(2, 2))
def from_somewhere(models, group, base=None, *, half: float = 0.5):
    """The mean, or the base and the mean of the task vectors' products with what they sum to."""
    if base is None:
        return half * total(models)
    return base + half * total(group.sum(x) * (x - base) for x in models)


def test_a_base_may_be_left_out():
    assert from_somewhere.asks == ("models", "group", "base")
    assert (from_somewhere.takes_base, from_somewhere.needs_base, from_somewhere.optional_base) == (True, False, True)
    assert not toy.optional_base and not from_somewhere.check_models(2, False)
    assert refmerge.call(from_somewhere, [[2.0, 0.0], [4.0, 2.0]]).tolist() == [3.0, 1.0]
    assert refmerge.call(from_somewhere, [[2.0, 0.0], [4.0, 2.0]], [1.0, 1.0]).tolist() == [11.0, 3.0]
    renamed = same_as(from_somewhere, "tool:somewhere", source="tool 1.0", a="half")
    assert renamed.optional_base
    assert refmerge.call(renamed, [[2.0, 0.0], [4.0, 2.0]], a=1.0).tolist() == [6.0, 2.0]


def test_an_optional_base_is_read_where_it_is_given():
    models = [{"x": np.arange(3000.0) + i} for i in range(2)]
    for base, inputs in ((None, 2), ({"x": np.ones(3000)}, 3)):
        plan = prepare(models, from_somewhere, base=base, threads=1)
        plan.elements = 1024
        plan.run()
        assert plan.ran.bytes_read == plan.ran.passes * inputs * 3000 * 8
        assert plan.ran.passes == (1 if base is None else 3)


def test_an_optional_base_of_whole_models():
    @method("whole", paper="none", view="model")
    def whole(models, base=None):
        return {n: models[0][n] - (0 if base is None else base[n]) for n in models[0]}

    assert refmerge.call(whole, [[3.0]]).tolist() == [3.0]
    assert refmerge.call(whole, [[3.0]], [1.0]).tolist() == [2.0]


# --- same_as -----------------------------------------------------------------------------------------------------------


@method("scaled", paper="none", domain={"scale": (0.0, 10.0)})
def scaled(models, *, scale: float = 2.0, weight: PerModel[float] = 3.0, shift: float = 0.0):
    """scale sum w x + shift."""
    return scale * total(w * x for w, x in zip(weight, models)) + shift


def test_same_as_maps_names_and_defaults():
    theirs = same_as(scaled, "tool:scaled", source="tool 1.0", alpha="scale", offset=("shift", 1.0))
    assert (theirs.name, theirs.paper, theirs.doc) == ("tool:scaled", "tool 1.0", scaled.doc)
    assert {k: p.default for k, p in theirs.params.items()} == {"alpha": 2.0, "offset": 1.0}
    assert theirs.params["alpha"].domain == (0.0, 10.0)
    a, b = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    assert refmerge.call(theirs, [a, b]).tolist() == [2 * 33 + 1, 2 * 66 + 1]
    assert refmerge.call(theirs, [a, b], alpha=1.0, offset=0.0).tolist() == [33, 66]
    for key in ("scale", "weight", "shift"):  # our names are not theirs
        with pytest.raises(UsageError, match=f"no parameter '{key}'"):
            refmerge.call(theirs, [a, b], **{key: 1.0})
    with pytest.raises(UsageError, match=r"alpha = 11.0 is outside"):
        refmerge.call(theirs, [a, b], alpha=11.0)


def test_same_as_of_a_parameter_per_model():
    theirs = same_as(scaled, "tool:scaled", source="tool 1.0", coefficients="weight")
    a, b = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    assert refmerge.call(theirs, [a, b], coefficients=[1, 2]).tolist() == [2 * 21, 2 * 42]
    with pytest.raises(UsageError, match="coefficients has 3 values for 2 models"):
        refmerge.call(theirs, [a, b], coefficients=[1, 2, 3])


def test_same_as_of_a_view_that_depends_on_parameters():
    @method("either", paper="none", view=lambda whole: "tensor" if whole else "flat")
    def either(models, *, whole: bool = False):
        return models[0]

    renamed = same_as(either, "tool:either", source="tool 1.0", entire="whole")
    assert renamed.view_for({"entire": True}) == "tensor"
    assert renamed.view_for({"entire": False}) == "flat"
    assert same_as(either, "tool:either", source="tool 1.0").view_for({}) == "flat"


# --- Registry ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugins(monkeypatch):
    """Add entry points for a test: plugins("refmerge.methods", name="module:attribute")."""
    real = registry._entry_points

    def add(group, **targets):
        extra = {name: EntryPoint(name, target, group) for name, target in targets.items()}
        monkeypatch.setattr(registry, "_entry_points", lambda g: {**real(g), **(extra if g == group else {})})
        monkeypatch.setattr(registry, "get", registry.get.__wrapped__)  # a cache would outlive the test

    return add


@pytest.fixture
def plugin_module(tmp_path, monkeypatch):
    (tmp_path / "someones_plugin.py").write_text(
        "from refmerge import method\n"
        "@method('halve', paper='none', models=(1, 1))\n"
        "def halve(models):\n"
        "    '''Half of it.'''\n"
        "    return 0.5 * models[0]\n"
        "not_a_method = 3\n"
    )
    (tmp_path / "someones_broken_plugin.py").write_text("raise RuntimeError('out of order')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("someones_plugin", None)


def test_a_plug_in_is_a_method_like_others(plugins, plugin_module):
    plugins("refmerge.methods", halve="someones_plugin:halve")
    assert "halve" in registry.names()
    assert refmerge.call(registry.get("halve"), [np.array([3.0])]).tolist() == [1.5]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("someones_broken_plugin:halve", "RuntimeError: out of order"),
        ("no_such_module_anywhere:halve", "ModuleNotFoundError: .*no_such_module_anywhere"),
        ("someones_plugin:no_such_name", "AttributeError: .*no_such_name"),
    ],
)
def test_a_broken_plug_in_is_named_and_then_missing(plugins, plugin_module, target, reason):
    plugins("refmerge.methods", halve=target)
    with pytest.warns(UserWarning, match=f"'halve' of refmerge.methods failed to load: {reason}"):
        with pytest.raises(UsageError, match=r"no method 'halve'.*available: .*linear.*ties") as error:
            registry.get("halve")
    assert str(error.value).count("halve") == 1  # it is not on the list of what there is
    assert registry.get("linear").name == "linear"  # others are not harmed


def test_a_plug_in_that_is_no_method(plugins, plugin_module):
    plugins("refmerge.methods", halve="someones_plugin:not_a_method")
    with pytest.warns(UserWarning, match="'halve'.*int"):
        with pytest.raises(UsageError, match="no method 'halve'"):
            registry.get("halve")


def test_a_plug_in_does_not_replace_what_is_built_in(plugins, plugin_module):
    plugins("refmerge.methods", linear="someones_plugin:halve")
    assert registry.get("linear") is refmerge.get("linear")
    assert registry.names().count("linear") == 1


def test_a_broken_backend_is_named_and_the_others_listed(plugins, plugin_module):
    plugins("refmerge.backends", fast="someones_broken_plugin")
    assert "fast" in registry.backend_names()
    with pytest.warns(UserWarning, match="'fast' of refmerge.backends failed to load: RuntimeError: out of order"):
        with pytest.raises(UsageError, match=r"backend 'fast' is broken \(available: cupy, numpy, torch\)"):
            registry.open_backend("fast")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tise", r"no method 'tise'; did you mean ties\? \(available: arcee_fusion, .*wise_ft, wudi\)"),
        ("qqqq", r"no method 'qqqq' \(available: arcee_fusion"),
        ("TIES", r"no method 'TIES'; did you mean ties\?"),
        ("mergekit:widen", r"\(mergekit has mergekit:arcee_fusion, .*; widen exists as widen, official:widen\)$"),
        ("mergekit:tise", r"'mergekit:tise'; did you mean mergekit:ties\? \(mergekit has mergekit:arcee_fusion, "),
        ("mergkit:ties", r"'mergkit:ties'; did you mean mergekit:ties\? \(no entry of that tool exists; tools are "),
        ("MergeLM:TIES", r"'MergeLM:TIES'; did you mean mergelm:ties\? "),
        ("nobody:ties", r"'nobody:ties' \(no entry .*; ties exists as ties, .*mergekit:ties, .*official:ties, "),
        (":ties", r"no method ':ties' \(no entry of that tool .*; ties exists as ties, "),
        ("", "no method ''"),
    ],
)
def test_unknown_method(name, message):
    with pytest.raises(UsageError, match=message):
        registry.get(name)


def test_every_file_is_the_method_of_its_name():
    names = registry.names()
    assert names == sorted(set(names), key=lambda n: (":" in n, n))
    assert {"linear", "slerp", "ties", "official:ties", "mergekit:ties"} <= set(names)
    for name in names:
        assert registry.get(name).name == name
        assert registry.get(name) is registry.get(name)


# --- Backends that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_a_missing_library_is_a_usage_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    with pytest.raises(UsageError, match=rf"backend {name} needs .*pip install 'refmerge\[{name}\]'"):
        registry.open_backend(name)


@pytest.mark.parametrize("spec", ["jax", "Numpy", "", ":cpu"])
def test_unknown_backend(spec):
    with pytest.raises(UsageError, match=r"no backend .*available: cupy, numpy, torch"):
        registry.open_backend(spec)


def test_numpy_has_no_other_device():
    assert registry.open_backend("numpy").name == "numpy"
    assert registry.open_backend("numpy:cpu").name == "numpy"
    with pytest.raises(UsageError, match="no device 'cuda:0'"):
        registry.open_backend("numpy:cuda:0")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x"])
def test_torch_device_that_is_not_there(torch, device):
    with pytest.raises(UsageError, match=rf"torch.*{device}"):
        registry.open_backend(f"torch:{device}")


# --- Importing ---------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "cupy", "jax", "array_api_strict", "pydantic", "ruamel.yaml", "rich", "click", "hypothesis")


@pytest.mark.parametrize(
    "code",
    [
        "import refmerge",
        "import refmerge; refmerge.methods()",
        "import refmerge, numpy as n; refmerge.call('ties', [n.ones(3), n.zeros(3)], n.zeros(3))",
    ],
)
def test_import_is_light(code):
    check = f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
    assert ran.stderr == ""


def test_all_is_there():
    for name in refmerge.__all__:
        assert getattr(refmerge, name) is not None
    assert callable(refmerge.methods)  # the function, not the package of the same name
    assert refmerge.methods() == registry.names()
