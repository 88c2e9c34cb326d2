"""`refmerge experts`: mixtures of experts shown, counted, merged, compressed and given back."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from refmerge.terminal import say

if TYPE_CHECKING:
    from refmerge.experts import Mixture
    from refmerge.procedures.experts.msmoe import Grouped


@click.group()
def experts() -> None:
    """Mixtures of experts: what a checkpoint holds, and fewer experts of it.

    \b
      refmerge experts show MODEL                             its layers, experts and bytes
      refmerge experts route MODEL TOKENS.npz STATS           where its routers send tokens
      refmerge experts show MODEL --stats STATS --groups 4    which experts would be merged
      refmerge experts merge MODEL OUT --stats STATS --groups 4 --grouping layer --write reduced
      refmerge experts compress OUT STORED                    experts as low rank and a few rows
      refmerge experts restore STORED WHOLE
    """


def _grouping(f: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide on groups."""
    for option in reversed(
        [
            click.option(
                "--grouping", type=click.Choice(["global", "layer"]), default="global", show_default=True,
                help="so many groups on average, or in each layer",
            ),
            click.option("--layers", metavar="GLOB", multiple=True, help="layers to merge, once for each pattern; else all"),
            click.option("--capacity", type=click.IntRange(min=1), help="experts in a group at most"),
            click.option(
                "--similarity", type=click.Choice(["logits", "router", "weights"]), default="logits", show_default=True,
                help="by what experts are alike: the router's scores, its rows, or the experts' weights",
            ),
            click.option(
                "--semantics", type=click.Choice(["paper", "official"]), default="paper", show_default=True,
                help="groups and weights as the authors' code has them",
            ),
            _rule,
        ]
    ):  # fmt: skip
        f = option(f)
    return f


_rule = click.option(
    "--rule", type=click.Path(), metavar="RULE", help="of the experts' names: mixtral, qwen, switch, or a file in TOML"
)
_shards = click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="bytes of one file at the most"
)
_overwrite = click.option("--overwrite", is_flag=True, help="replace OUT once the new checkpoint is complete")
_json = click.option("--json", "json", is_flag=True, help="for programs")
_quiet = click.option("--quiet", "-q", is_flag=True, help="say nothing but errors")


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line as those of the procedures."""
    from refmerge.experts import RULES, Rule

    if options.get("rule") not in (None, *RULES):
        options["rule"] = Rule.load(options["rule"])
    if "layers" in options:
        options["layers"] = options["layers"] or ("*",)
    return options


@experts.command()
@click.argument("model", type=click.Path())
@click.option("--stats", type=click.Path(), help="where the routers send tokens, as `route` writes it")
@click.option("--groups", type=int, help="show the groups of experts that so many would make, with --stats")
@_grouping
@_json
def show(model: str, stats: str | None, groups: int | None, json: bool, **options: Any) -> None:
    """Show the mixtures of MODEL: experts, their sizes and, with --stats, how often each is chosen; with --groups which of
    them would be merged."""
    from refmerge.checkpoint import open_checkpoint
    from refmerge.cli import size
    from refmerge.experts import find, routing_of
    from refmerge.procedures.experts.msmoe import groups_of

    if groups is not None and stats is None:
        raise click.UsageError("--groups wants --stats")
    options = _options(options)
    with open_checkpoint(model) as checkpoint:
        mixtures = find(checkpoint, options["rule"])
        found = None if groups is None else groups_of(checkpoint, stats, groups=groups, **options)
        usage = {}
        if stats is not None:
            routing = routing_of(stats, mixtures, ("routed",))
            usage = {layer: r["routed"] / r["routed"].sum() for layer, r in routing.items()}
        nbytes = checkpoint.nbytes
    if json:
        told = {layer: _facts(m, usage.get(layer), None if found is None else found[layer]) for layer, m in mixtures.items()}
        click.echo(jsonlib.dumps(told, indent=2))
        return
    for layer, mixture in mixtures.items():
        say(_line(mixture))
        if found is not None:
            for group in range(len(found[layer].dominant)):
                say(_group(found[layer], group))
        elif layer in usage:
            shares = sorted(enumerate(usage[layer]), key=lambda item: -item[1])
            say("  " + ", ".join(f"{e} {u:.1%}" for e, u in shares))
    if found is not None:
        gone = {layer: len(mixtures[layer].experts) - len(g.dominant) for layer, g in found.items()}
        less = sum(count * mixtures[layer].nbytes for layer, count in gone.items())
        before = sum(len(m.experts) for m in mixtures.values())
        after = before - sum(gone.values())
        say(f"{before} experts to {after}: {size(nbytes)} to {size(nbytes - less)}, shared or reduced")


def _line(mixture: Mixture) -> str:
    from refmerge.cli import size

    count = f"{len(mixture.experts)} experts"
    if mixture.shared:
        count += f" for {len(mixture.slots)} scores"
    style = mixture.rule.name
    return f"{mixture.layer}: {count} of {mixture.units} hidden units, {size(mixture.nbytes)} each ({style})"


def _group(g: Grouped, group: int) -> str:
    members, dominant = g.members(group), g.dominant[group]
    others = sorted((e for e in members if e != dominant), key=lambda e: -g.usage[e])
    text = f"  group {group}, {sum(g.usage[members]):.1%}: {dominant} {g.usage[dominant]:.1%}"
    return text + "".join(f", {e} {g.usage[e]:.1%} (alike {g.similarity[e, dominant]:.3f})" for e in others)


def _facts(mixture: Mixture, usage: Any, g: Grouped | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "style": mixture.rule.name, "router": mixture.router, "experts": len(mixture.experts), "units": mixture.units,
        "bytes_of_an_expert": mixture.nbytes, "slots": list(mixture.slots),
    }  # fmt: skip
    if usage is not None:
        told["usage"] = usage.tolist()
    if g is not None:
        told |= {"labels": g.labels.tolist(), "dominant": list(g.dominant)}
    return told


@experts.command()
@click.argument("model", type=click.Path())
@click.argument("tokens", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--batch", type=click.IntRange(min=1), help="samples that go through together; else 4096 tokens")
@_quiet
def route(model: str, tokens: str, out: str, batch: int | None, quiet: bool) -> None:
    """Run MODEL on TOKENS, an .npz with `inputs` (samples, places) and, where some are padding, `mask`, and write where its
    routers send them to OUT, a file that ends in .safetensors.

    For Mixtral and Qwen-MoE, on the CPU. Of other models, and large ones, a framework's own run can write the same file: see
    `refmerge methods msmoe`.
    """
    import os
    import zipfile

    import numpy as np

    from refmerge.checkpoint import open_checkpoint, refuse_input
    from refmerge.errors import InputError, UsageError
    from refmerge.experts import route as run

    if not out.endswith(".safetensors"):
        raise click.UsageError(f"OUT is a file that ends in .safetensors, and {out!r} does not")
    if os.path.exists(out):
        raise UsageError(f"{out}: exists; statistics are not overwritten")
    try:
        with np.load(tokens, allow_pickle=False) as file:
            if "inputs" not in file:
                raise InputError(f"{tokens}: there is no array 'inputs' of tokens")
            inputs, mask = file["inputs"], file.get("mask")
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{tokens}: cannot be read as .npz with an array 'inputs': {error}") from None
    with open_checkpoint(model) as checkpoint:
        refuse_input(out, [checkpoint.path])
        found = run(checkpoint, inputs, mask, batch=batch)
    try:
        found.save(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error}") from None
    if not quiet:
        routers = [name for name in found if name.endswith(".routed")]
        say(f"{len(routers)} routers, {found.count(routers[0]):.0f} tokens, to {out}")


@experts.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--stats", type=click.Path(), required=True, help="where the routers send tokens, as `route` writes it")
@click.option("--groups", type=int, required=True, help="groups of experts, on average or in each layer")
@_grouping
@click.option(
    "--align", type=click.Choice(["dominant", "lowest", "first", "none"]), default="dominant", show_default=True,
    help="whose order of hidden units the others are brought into",
)  # fmt: skip
@click.option("--columns/--no-columns", default=True, help="align by what reads the units, too")
@click.option("--weighting", type=click.Choice(["usage", "equal"]), default="usage", show_default=True)
@click.option("--epsilon", type=float, help="added to the sum of usage by which a group is divided")
@click.option(
    "--write", type=click.Choice(["tied", "shared", "reduced"]), default="tied", show_default=True,
    help="a copy for each score of the router; each expert once, for `restore`; or a smaller model with smaller routers",
)  # fmt: skip
@click.option(
    "--router", type=click.Choice(["mean", "dominant"]), default="mean", show_default=True,
    help="with --write reduced: the row of a group",
)  # fmt: skip
@_shards
@_overwrite
@_quiet
@_json
def merge(model: str, out: str, stats: str, quiet: bool, json: bool, **options: Any) -> None:
    """Merge experts of MODEL in groups by M-SMoE, expert by expert, and write OUT."""
    from refmerge.procedures.experts.msmoe import msmoe, told

    start, seen = time.perf_counter(), set[str]()

    def progress(layer: str, group: int) -> None:
        if not (quiet or json) and layer not in seen:
            seen.add(layer)
            say(layer, err=True)

    found = msmoe(model, stats, out, progress=progress, **_options(options))
    if json:
        facts = {"out": out, "bytes": found.model.nbytes, "seconds": time.perf_counter() - start}
        click.echo(jsonlib.dumps({**facts, "layers": told(found.groups)}))
    elif not quiet:
        before = sum(len(g.labels) for g in found.groups.values())
        after = sum(len(g.dominant) for g in found.groups.values())
        _done(f"{before} experts in {len(found.groups)} layers merged to {after}", out, found.model.nbytes, start)


@experts.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--ratio", type=float, default=0.15, show_default=True, help="numbers in the low-rank part, of a matrix's")
@click.option("--rank-ratio", type=float, help="in place of --ratio: the rank, of the lower side of a matrix")
@click.option("--keep", type=float, default=0.1, show_default=True, help="share of the rest that stays, in whole rows")
@click.option("--importance", type=click.Path(), metavar="FILE", help="of rows or entries, by name; else their magnitude")
@_rule
@_shards
@_overwrite
@_quiet
def compress(model: str, out: str, quiet: bool, **options: Any) -> None:
    """Store the experts of MODEL as products of low rank and a few rows, as MC-SMoE does, and write OUT."""
    from refmerge.procedures.experts.mc_smoe import mc_smoe

    start = time.perf_counter()
    stored = mc_smoe(model, out, **_options(options))
    if not quiet:
        count = sum(name.startswith("left/") for name in stored)
        _done(f"{count} matrices of experts in factors", out, stored.nbytes, start)


@experts.command()
@click.argument("stored", type=click.Path())
@click.argument("out", type=click.Path())
@_rule
@_shards
@_overwrite
@_quiet
def restore(stored: str, out: str, quiet: bool, rule: str | None, **options: Any) -> None:
    """Give back what `compress` stored, or what `merge --write shared` did, as a model that other tools load.

    Of a model that was merged and then compressed, each by itself: restore twice.
    """
    from refmerge.checkpoint import open_checkpoint
    from refmerge.experts import FACTORS
    from refmerge.procedures.experts.mc_smoe_restore import mc_smoe_restore
    from refmerge.procedures.experts.msmoe_restore import msmoe_restore

    start = time.perf_counter()
    with open_checkpoint(stored) as checkpoint:
        if FACTORS in checkpoint.metadata:
            whole = mc_smoe_restore(checkpoint, out, **options)
        else:
            whole = msmoe_restore(checkpoint, out, **_options({"rule": rule, **options}))
    if not quiet:
        _done(f"{len(whole)} tensors given back", out, whole.nbytes, start)


def _done(what: str, out: str, nbytes: int, start: float) -> None:
    from refmerge.cli import size

    say(f"{what}: {out}, {size(nbytes)} in {time.perf_counter() - start:.1f} s")
