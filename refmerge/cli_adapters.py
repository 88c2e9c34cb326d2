"""Commands on LoRA adapters: `extract`, `apply`, and the group `adapter`."""

from __future__ import annotations

import json as jsonlib
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from refmerge.terminal import say

if TYPE_CHECKING:
    from refmerge.adapters import Adapter, Fit

# How the tables of words and places are called in most models.
TABLES = (
    "*embed_tokens", "*wte", "*wpe", "*word_embeddings", "*position_embeddings", "*token_type_embeddings", "*tok_embeddings",
    "*embed_in", "*token_embedding", "*position_embedding",
)  # fmt: skip
WORST = 5  # modules that a summary lists

_rank = click.option("--rank", type=click.IntRange(min=1), help="of each module, as far as its shape has so many")
_energy = click.option("--energy", type=float, help="in place of --rank: the share of the squares that stays, as 0.9")
_overwrite = click.option("--overwrite", is_flag=True, help="replace OUT once the new one is complete")
_json = click.option("--json", "json", is_flag=True, help="for programs")
_weight = click.option("--weight", "weights", type=float, multiple=True, help="once for each adapter (default 1)")


@click.command()
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.argument("out", type=click.Path())
@_rank
@_energy
@click.option("--only", default="", metavar="REGEX", help="extract only modules whose names it is found in")
@click.option(
    "--embeddings",
    metavar="GLOB",
    multiple=True,
    default=TABLES,
    help="modules that are tables of words (default: names that are usual for them)",
)
@click.option(
    "--rest",
    type=click.Choice(["error", "skip", "save"]),
    default="error",
    show_default=True,
    help="changes of what is no matrix, or that --only leaves out: refused, lost, or saved whole",
)
@click.option("--fan-in-fan-out", is_flag=True, help="matrices are stored as in x out (GPT-2)")
@click.option("--randomized", is_flag=True, help="seek singular vectors in random directions: faster, less exact")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of the random directions (default 0)")
@_overwrite
@_json
def extract(
    base: str, tuned: str, out: str, rank: int | None, energy: float | None, only: str, embeddings: tuple[str, ...],
    rest: str, fan_in_fan_out: bool, randomized: bool, seed: int, overwrite: bool, json: bool,
) -> None:  # fmt: skip
    """Write what fine-tuning made of BASE in TUNED to OUT, as a LoRA adapter in PEFT's layout.

    The nearest change of a low rank for each matrix that changed, with the error that is made. --rank or --energy says of
    which rank.
    """
    from fnmatch import fnmatchcase

    from refmerge.adapted import open_model
    from refmerge.procedures.adapters.lora_extraction import lora_extraction

    with open_model(tuned) as model, open_model(base) as origin:
        modules = [n.removesuffix(".weight") for n in origin]
        tables = [m for m in modules if any(fnmatchcase(m, glob) for glob in embeddings)]
        adapter, fits = lora_extraction(
            model, origin, rank=rank, energy=energy, only=only, embeddings=tables, rest=rest,
            fan_in_fan_out=fan_in_fan_out, randomized=randomized, seed=seed,
        )  # fmt: skip
        same = {m for m, fit in fits.items() if not fit.size}
        adapter = adapter.with_modules({m: f for m, f in adapter.modules.items() if m not in same})
        fits = {m: fit for m, fit in fits.items() if m not in same}
        _write(adapter, out, overwrite, inputs=[*model.paths, *origin.paths])
    _tell(out, adapter, fits, json)


@click.command()
@click.argument("base", type=click.Path())
@click.argument("adapters", type=click.Path(), nargs=-1, required=True)
@click.argument("out", type=click.Path())
@_weight
@click.option("--part", metavar="NAME", help="of an image model's adapter, the part that BASE is: unet, text_encoder, ...")
@click.option("--out-dtype", type=click.Choice(["bfloat16", "float16", "float32", "float64"]), help="default: BASE's")
@click.option("--threads", type=click.IntRange(min=1), help="default: the cores this process may use")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="bytes of one file at the most")
@_overwrite
@_json
def apply(
    base: str, adapters: tuple[str, ...], out: str, weights: tuple[float, ...], part: str | None, out_dtype: str | None,
    threads: int | None, max_shard_size: str, overwrite: bool, json: bool,
) -> None:  # fmt: skip
    """Add ADAPTERS to BASE and write the model to OUT: block by block, rounded once."""
    from refmerge.adapted import adapted, open_model
    from refmerge.api import prepare
    from refmerge.cli import MergeProgress

    model = adapted(open_model(base), *adapters, weights=weights or None, part=part)
    plan = prepare([model], "passthrough", out_dtype=out_dtype, threads=threads)
    with MergeProgress(plan, silent=json):
        plan.run(out, max_shard_size=max_shard_size, overwrite=overwrite)
    changed, count = len(model.changed), f"{len(adapters)} adapter{'s' * (len(adapters) > 1)}"
    if json:
        click.echo(jsonlib.dumps({"out": out, "tensors": len(model), "changed": changed}))
    else:
        say(f"{len(model)} tensors to {out}, {changed} of them changed by {count}")


@click.group()
def adapter() -> None:
    """Merge, compose and re-factor LoRA adapters by themselves, without their base."""


@adapter.command()
@click.argument("adapters", type=click.Path(), nargs=-1, required=True)
@click.argument("out", type=click.Path())
@_weight
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    default="svd",
    show_default=True,
    help="PEFT's: cat, linear, svd, ties, dare_linear, dare_ties, magnitude_prune, or one of these four with _svd",
)
@click.option(
    "--method", metavar="NAME", help="in place of a type: any method of `refmerge methods`, on the changes themselves"
)
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="a parameter of --method, as density=0.2")
@click.option("--rank", type=click.IntRange(min=1), help="of the svd types (default: the largest), or with --method")
@_energy
@click.option("--density", type=float, help="the fraction of entries that stay, for the types that prune")
@click.option("--majority", type=click.Choice(["total", "frequency"]), default="total", help="how the ties types elect")
@click.option("--missing", type=click.Choice(["error", "skip"]), default="error", help="modules that not all adapters have")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of the dare types")
@_overwrite
@_json
def merge(
    adapters: tuple[str, ...], out: str, weights: tuple[float, ...], kind: str, method: str | None,
    settings: tuple[str, ...], rank: int | None, energy: float | None, density: float | None, majority: str, missing: str,
    seed: int, overwrite: bool, json: bool,
) -> None:  # fmt: skip
    """Merge ADAPTERS into one, and write it to OUT: as PEFT's add_weighted_adapter does, or by any --method.

    With --method, --rank or --energy says of which rank, and the error is told; what an adapter has no module for, it does
    not change.
    """
    from refmerge.procedures.adapters.lora_merge import lora_merge

    if method is not None:
        made, fits = _by_method(adapters, method, settings, weights, rank=rank, energy=energy, missing=missing, seed=seed)
        _write(made, out, overwrite, inputs=adapters)
        _tell(out, made, fits, json)
        return
    if settings or energy is not None:
        raise click.UsageError("--set and --energy are for --method")
    made = lora_merge(
        adapters, weights=_each(weights, adapters), combination_type=kind, svd_rank=rank, density=density,
        majority_sign_method=majority, missing=missing, seed=seed,
    )  # fmt: skip
    _write(made, out, overwrite, inputs=adapters)
    _tell(out, made, {}, json)


@adapter.command()
@click.argument("adapters", type=click.Path(), nargs=-1, required=True)
@click.argument("out", type=click.Path())
@click.option(
    "--operation",
    type=click.Choice(["add", "negate", "analogy"]),
    default="add",
    show_default=True,
    help="A + B + ..., -A, or A + B - C",
)
@click.option(
    "--on",
    type=click.Choice(["product", "factors"]),
    default="product",
    show_default=True,
    help="the changes themselves, exactly, so that ranks add up; or factor by factor, as published",
)
@_weight
@click.option("--scale", type=float, default=1.0, show_default=True, help="of a negation")
@_overwrite
@_json
def compose(
    adapters: tuple[str, ...], out: str, operation: str, on: str, weights: tuple[float, ...], scale: float, overwrite: bool,
    json: bool,
) -> None:  # fmt: skip
    """Add, negate or combine ADAPTERS by analogy, and write the adapter that comes out to OUT.

    Weights are normalised to sum 1, as published; `adapter merge --type cat` takes them as they are.
    """
    from refmerge.procedures.adapters.pem import pem

    made = pem(adapters, operation=operation, on=on, weights=weights or None, scale=scale)
    _write(made, out, overwrite, inputs=adapters)
    _tell(out, made, {}, json)


@adapter.command()
@click.argument("path", metavar="ADAPTER", type=click.Path())
@click.argument("out", type=click.Path())
@_rank
@_energy
@click.option("--scale", type=click.Choice(["both", "A", "B"]), default="both", help="where singular values go")
@_overwrite
@_json
def refactor(
    path: str, out: str, rank: int | None, energy: float | None, scale: str, overwrite: bool, json: bool
) -> None:  # fmt: skip
    """Write the adapter of another rank that changes the weights most nearly as ADAPTER does to OUT, with the errors."""
    from refmerge.procedures.adapters.refactor import refactor as run

    made, fits = run(path, rank=rank, energy=energy, scale=scale)
    _write(made, out, overwrite, inputs=[path])
    _tell(out, made, fits, json)


def _by_method(
    adapters: tuple[str, ...],
    name: str,
    settings: tuple[str, ...],
    weights: tuple[float, ...],
    *,
    missing: str,
    **options: Any,
) -> tuple[Adapter, Mapping[str, Fit]]:
    """A merge by a method of the registry."""
    from refmerge.cli import parameters_of
    from refmerge.procedures.adapters.delta_merge import delta_merge
    from refmerge.registry import get

    method = get(name)
    if wrong := [s for s in settings if "=" not in s]:
        raise click.UsageError(f"--set takes NAME=VALUE, not {wrong[0]!r}")
    parameters = parameters_of([f"--{s}" for s in settings], method)
    if weights:
        parameters["weight"] = list(weights)
    zero = "zero" if missing == "skip" else missing
    return delta_merge(adapters, method, parameters=parameters, missing=zero, **options)


def _each(weights: tuple[float, ...], adapters: tuple[str, ...]) -> list[float]:
    return list(weights) or [1.0] * len(adapters)


def _write(adapter: Adapter, out: str, overwrite: bool, inputs: Any) -> None:
    from refmerge.adapters import write_adapter
    from refmerge.checkpoint import refuse_input

    refuse_input(out, inputs)
    write_adapter(adapter, out, overwrite=overwrite)


def _tell(out: str, adapter: Adapter, fits: Mapping[str, Fit], json: bool) -> None:
    """What was written, and how far it is from what was asked for."""
    ranks = {module: f.rank for module, f in adapter.modules.items()}
    if json:
        modules = {m: {"rank": r, **_error(fits.get(m))} for m, r in ranks.items()}
        click.echo(jsonlib.dumps({"out": out, "modules": modules, "saved": sorted(adapter.saved)}, indent=2))
        return
    low, high = min(ranks.values(), default=0), max(ranks.values(), default=0)
    span = f"rank {low}" if low == high else f"ranks {low} to {high}"
    saved = f", {len(adapter.saved)} tensors whole" if adapter.saved else ""
    say(f"{len(ranks)} modules of {span}{saved} to {out}")
    if not fits:
        return
    whole = math.sqrt(math.fsum(f.size**2 for f in fits.values()))
    error = math.sqrt(math.fsum(f.error**2 for f in fits.values()))
    middle = statistics.median(f.relative for f in fits.values())
    share = f"{error / whole:.3g}" if whole else "0"
    say(f"error {share} of the change in the Frobenius norm; of a module {middle:.3g} in the median, at most:")
    for module, f in sorted(fits.items(), key=lambda entry: -entry[1].relative)[:WORST]:
        say(f"  {f.relative:.3g}  rank {f.rank}  {module}")


def _error(fit: Fit | None) -> dict[str, float]:
    return {} if fit is None else {"error": fit.error, "relative": fit.relative}
