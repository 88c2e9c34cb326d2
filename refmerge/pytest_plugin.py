"""The vectors in anybody's tests, once refmerge is installed beside pytest:

    @pytest.mark.refmerge("ties")
    def test_ties(case):
        return my_ties(case.models, case.base, **case.params)

becomes one test for each vector of the method. What the function returns, a mapping name -> array, or raises is compared
with what the vector expects; returned with its own steps, `(mapping, {2: {"tau": [...]}})`, a failure names the first that
differs (see `refmerge.testing.check`). `entry="mergekit:ties"` takes another tool's semantics; `options=("over", "stats")`
says that the function looks at these of `case` too, where vectors that need more than `case.params` are skipped otherwise.
`ulps` and `tolerance` are those of `refmerge.testing.check`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "refmerge(method, entry=None, options=(), tolerance=None, ulps=None): compare with its test vectors"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from refmerge import testing

    marker = metafunc.definition.get_closest_marker("refmerge")
    if marker is None:
        return
    method = marker.args[0] if marker.args else ""
    entry = marker.kwargs.get("entry") or method
    try:
        cases = list(testing.vectors(method, entry))
    except LookupError as e:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: {e.args[0]}") from None
    if not cases:
        known = ", ".join(sorted({case.entry for case in testing.vectors(method)}))
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: no vectors of {method} for {entry!r} (entries: {known})")
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    from refmerge import testing

    marker = pyfuncitem.get_closest_marker("refmerge")
    if marker is None:
        return None
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    case = arguments["case"]
    needs = [*case.options, *(["stats"] if case.stats is not None else [])]
    if missing := [name for name in needs if name not in marker.kwargs.get("options", ())]:
        pytest.skip(f"needs {' and '.join(missing)}")
    run = partial(pyfuncitem.obj, **arguments)
    if problem := testing.outcome(case, run, marker.kwargs.get("tolerance"), marker.kwargs.get("ulps")):
        pytest.fail(str(testing.Failure(case, problem)), pytrace=False)
    return True
