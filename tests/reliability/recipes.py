"""Recipes that say something that cannot be meant: each is refused with its line, and nothing is created."""

from __future__ import annotations

NATIVE = """\
refmerge: 1
merge_method: task_arithmetic
base_model: base
models:
  - model: one
  - model: two
    parameters: {weight: 0.5}
parameters:
  lambda: 0.5
"""
_BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
)


def _with(line: str) -> str:
    return NATIVE + line + "\n"


def _instead(old: str, new: str) -> str:
    assert old in NATIVE
    return NATIVE.replace(old, new)


REFUSED = [
    "", "~", "3", "text", "- a", "[", "{", "a: b: c", "\ta: 1", "a: 1\n---\nb: 2", "\0", "a: \x1b[31m", "%FOO 1\n--- a",
    _BOMB, "a: &x [*x]", "a: &x {b: *x}", "a: *b", "a: " + "[" * 3000, "refmerge: 2\n", "x" * 1_000_001,
    _with("seed: 1.5"), _with("seed: -1"), _with("seed: true"), _with("seed: 99999999999999999999"), _with("sed: 1"),
    _with("out_dtype: float8"), _with("out_dtype: 16"), _with("work_dtype: bfloat16"), _with("over: layer"),
    _with("merge_method: ties"), _with("models: []"), _with("? [a]\n: b"), _with("1: a"), _with("true: a"),
    _with("!x y: 1"), _with("align: git_rebasin"), _with("align: {}"), _with("align: {method: ties}"),
    _with("components: {}"), _with("components: {vae: 3}"),
    _with("align: {method: no_such}"), _instead("refmerge: 1", "refmerge: '1'"), _instead("refmerge: 1", "refmerge: 1.0"),
    _instead("refmerge: 1", "refmerge: yes"), _instead("task_arithmetic", "task_arithmetics"),
    _instead("task_arithmetic", "[ties]"), _instead("task_arithmetic", "''"),
    _instead("merge_method: task_arithmetic\n", ""), _instead("base_model: base\n", ""),
    _instead("base_model: base", "base_model:"), _instead("base_model: base", "base_model: one"),
    _instead("base_model: base", "base_model: 'a\\0b'\nx: \"\\0\""), _instead("model: two", "modle: two"),
    _instead("model: two", "model: one"), _instead("model: two", "model: 2"), _instead("model: two", "model: ''"),
    _instead("{weight: 0.5}", "{wieght: 0.5}"), _instead("{weight: 0.5}", "[0.5]"),
    _instead("{weight: 0.5}", "{weight: 0.5, weight: 1}"), _instead("{weight: 0.5}", "{weight: }"),
    _instead("lambda: 0.5", "lambda: .nan"), _instead("lambda: 0.5", "lambda: -.inf"),
    _instead("lambda: 0.5", "lambda: 1e999"), _instead("lambda: 0.5", "lambda: '0.5'"),
    _instead("lambda: 0.5", "lambda: true"), _instead("lambda: 0.5", "lambda: 010"),
    _instead("lambda: 0.5", "lambda: {value: 1, fitler: x}"), _instead("lambda: 0.5", "lambda: []"),
    _instead("lambda: 0.5", "lambda: !!python/object/apply:os.system [ls]"),
    _instead("lambda: 0.5", "lambda: !!binary aGk="), _instead("lambda: 0.5", "lambda: 0.5\n  density: 0.5"),
    _instead("lambda: 0.5", "lambda: 0.5\n  lambda: 1"),
]  # fmt: skip
