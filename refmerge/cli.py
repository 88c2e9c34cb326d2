"""The command line. Modules are imported inside the commands: `--help` answers at once."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json as jsonlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import click

from refmerge.terminal import say

if TYPE_CHECKING:
    from refmerge.plan import Plan
    from refmerge.procedures.experts.moe_from_dense import Mixture
    from refmerge.recipe.plan import Resolved
    from refmerge.work import Tensor

INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that partial output is removed on the way out."""


class Lines(click.Group):
    """A group whose errors are one line on standard error and an exit status, without a traceback. Commands of other modules
    are imported when they are asked for."""

    elsewhere: Mapping[str, str] = {
        "extract": "refmerge.cli_adapters", "apply": "refmerge.cli_adapters", "adapter": "refmerge.cli_adapters",
        "experts": "refmerge.cli_experts",
    }  # fmt: skip

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.elsewhere})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.elsewhere:
            return getattr(importlib.import_module(self.elsewhere[cmd_name]), cmd_name)
        return super().get_command(ctx, cmd_name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        import signal

        from refmerge.errors import RefmergeError

        def terminate(*_: Any) -> None:
            raise Terminated

        warnings.showwarning = lambda message, *_: say(f"refmerge: warning: {message}", err=True)
        with contextlib.suppress(ValueError):  # not the main thread: whoever embeds the command line handles signals
            signal.signal(signal.SIGTERM, terminate)
        try:
            kwargs["standalone_mode"] = False
            status = super().main(*args, **kwargs)
            sys.exit(status if isinstance(status, int) else 0)
        except click.exceptions.Abort as e:
            _fail(_with_notes("interrupted", e.__context__ or e), INTERRUPTED)
        except KeyboardInterrupt as e:
            _fail(_with_notes("interrupted", e), INTERRUPTED)
        except Terminated as e:
            _fail(_with_notes("terminated", e), TERMINATED)
        except click.ClickException as e:
            e.show()
            sys.exit(e.exit_code)
        except RefmergeError as e:
            _fail(_with_notes(str(e), e), e.status)
        except MemoryError as e:
            _fail(_with_notes("out of memory: --max-memory and fewer --threads need less", e), 5)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)


def _with_notes(message: str, error: BaseException) -> str:
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _fail(message: str, status: int) -> None:
    say(f"refmerge: {message}", err=True)
    sys.exit(status)


@click.group(cls=Lines, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="refmerge")
def main() -> None:
    """Merge models: every algorithm as its paper has it, or as another tool computes it.

    Exit status: 0 done, 1 differs, 2 usage or recipe, 3 input, 5 disk or memory, 130 and 143 interrupted.
    """


class _Size(click.ParamType):
    """A number of bytes as people write it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from refmerge.checkpoint.sizes import parse_size
        from refmerge.errors import UsageError

        try:
            parse_size(value)
        except UsageError as e:
            raise UsageError(f"{param.opts[0] if param is not None else 'size'}: {e}") from None
        return value


SIZE = _Size()


def _options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    known = {
        "backend": click.option("--backend", help="numpy (default), torch, torch:cuda:0, cupy"),
        "dtype": click.option("--dtype", type=click.Choice(["float32", "float64"]), help="compute in this dtype"),
        "threads": click.option("--threads", type=click.IntRange(min=1), help="default: the cores this process may use"),
        "seed": click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="of the random draws (default 0)"),
        "max_memory": click.option(
            "--max-memory", type=SIZE, metavar="SIZE", help="bound on the memory of all blocks together: 500MB, 2GiB"
        ),
        "nonfinite": click.option(
            "--nonfinite", type=click.Choice(["error", "propagate", "skip-model"]), default="error", show_default=True,
            help="NaN and infinities in the inputs: merge them, or each tensor from the models in which it is finite",
        ),
        "integers": click.option(
            "--integers", type=click.Choice(["equal", "base"]), default="equal", show_default=True,
            help="integer tensors must be equal, or are the base's",
        ),
        "missing": click.option(
            "--missing", type=click.Choice(["error", "base", "skip"]), default="error", show_default=True,
            help="tensors that not all models have: copy the base's, or leave them out",
        ),
        "download": click.option(
            "--download", is_flag=True,
            help="fetch models of the Hugging Face Hub (org/name@revision) that are not in its cache",
        ),
        "allow_pickle": click.option(
            "--allow-pickle", is_flag=True, help="read pickled models (.bin, .pt), too, by torch's weights_only reader"
        ),
        "json": click.option("--json", "json", is_flag=True, help="for programs"),
    }  # fmt: skip

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            f = known[name](f)
        return f

    return wrap


_RUN = ("backend", "dtype", "threads", "seed", "max_memory", "nonfinite", "integers", "missing", "download", "allow_pickle")


@main.command()
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@_options(*_RUN)
@click.option("--max-shard-size", type=SIZE, default="5GB", show_default=True, metavar="SIZE", help="largest file, in bytes")
@click.option("--overwrite", is_flag=True, help="replace OUT once the new checkpoint is complete")
@click.option("--resume", is_flag=True, help="go on where this merge was interrupted, and keep what is done if it is again")
@click.option(
    "--intermediate-dir", "-I", "intermediates", type=click.Path(), metavar="DIR",
    help="of several merges in one file, keep the results of those before the last one, in DIR/NAME",
)
@click.option("--hash/--no-hash", "hashes", default=None, help="SHA-256 of all files in the report (default: of small ones)")
@click.option(
    "--figures", is_flag=True, help="norms of each tensor in the report, and angles to the models and to what they changed"
)
@click.option("--quiet", "-q", is_flag=True, help="say nothing but errors")
@_options("json")
def merge(
    recipe: str, out: str, max_shard_size: str, overwrite: bool, resume: bool, intermediates: str | None,
    hashes: bool | None, quiet: bool, json: bool, **options: Any,
) -> None:  # fmt: skip
    """Run RECIPE and write the merged checkpoint to OUT, a directory or a file that ends in .safetensors.

    A recipe with experts, as mergekit-moe has it, makes a mixture of experts.
    """
    from refmerge.recipe.moe import prepare_moe
    from refmerge.recipe.run import prepare_recipe

    if not out:
        raise click.UsageError("OUT is empty")
    start = time.perf_counter()
    plan: Any = prepare_moe(recipe, **options)
    resolved, bar = plan, cast(Any, contextlib.nullcontext)
    given: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite, "resume": resume}
    if plan is not None and (hashes or intermediates is not None):
        raise click.UsageError("--hash and -I are for merges, not for mixtures of experts")
    if plan is None:
        resolved, plan = prepare_recipe(recipe, out=out, overwrite=overwrite, hashes=hashes, **options)
        given |= {"intermediates": intermediates}
        bar = partial(MergeProgress, plan, silent=quiet or json)
    if not quiet:
        for stage in getattr(plan, "stages", ()):
            for note in stage.recipe.notes:
                say(f"note: {stage.name}: {note}", err=True)
        for note in resolved.notes:
            say(f"note: {note}", err=True)
    with bar():
        plan.run(out, **given)
    wall = time.perf_counter() - start
    figures = plan.figures()
    if json:
        click.echo(jsonlib.dumps({"out": out, "seconds": wall, **figures}))
    elif not quiet:
        rate = (figures["bytes_read"] + figures["bytes_written"]) / wall
        say(
            f"{_tensors(figures['tensors'])} by {figures['method']} to {out} in {wall:.1f} s: "
            f"{size(figures['bytes_read'])} read, {size(figures['bytes_written'])} written, {size(rate)}/s"
        )


@main.command()
@click.argument("recipe", type=click.Path())
@_options(*_RUN)
@click.option("--tensor", metavar="GLOB", help="list the tensors whose names match, with their parameters")
@click.option("--time/--no-time", "time_it", default=True, help="try small merges, to say how long this one takes here")
@_options("json")
def plan(recipe: str, tensor: str | None, time_it: bool, json: bool, **options: Any) -> None:
    """Check RECIPE and its checkpoints, and print what a merge would read, compute and write."""
    from refmerge.recipe.moe import prepare_moe
    from refmerge.recipe.run import prepare_recipe

    if (mixture := prepare_moe(recipe, **options)) is not None:
        _plan_of_mixture(mixture, tensor, json)
        return
    resolved, last = prepare_recipe(recipe, **options)
    parts = [*((stage.name, stage.recipe, stage.plan) for stage in last.stages), (None, resolved, last)]
    found = [_told(r, p, tensor, time_it) for _, r, p in parts]
    if tensor and not any(facts["listed"] for facts in found):
        say(f"refmerge: no tensor of the result has a name that {tensor!r} matches", err=True)
    for stage, facts in zip(last.stages, found):
        facts["written"] = stage.written or None
        facts["figures"] |= {} if stage.written else {"bytes_written": 0}
    if json:
        stages = [{"name": name, **facts} for (name, *_), facts in zip(parts[:-1], found)]
        click.echo(jsonlib.dumps({**found[-1], **({"stages": stages} if stages else {})}, indent=2))
        return
    for (name, r, _), facts in zip(parts, found):
        if last.stages:
            say(f"--- {name or 'the result'}")
        _show_plan(r, facts)


def _told(resolved: Resolved, p: Plan, tensor: str | None, time_it: bool) -> dict[str, Any]:
    """What a program hears of a plan."""
    from fnmatch import fnmatchcase

    from refmerge.adapted import described
    from refmerge.cost import estimate
    from refmerge.recipe import describe
    from refmerge.recipe.parameters import recipe_key

    figures = p.figures(estimate=True)
    expected = estimate(p) if time_it else None
    if expected is not None:
        figures |= {"seconds": expected.seconds, "needs_bytes_per_second": expected.needs_per_second}
    listed = [
        {
            "name": t.name,
            "shape": list(t.shape),
            "dtype": p.specs[t.name][0],
            "work": t.work,
            "method": resolved.method,
            "parameters": {recipe_key(k): v for k, v in t.params.items()},
            "from": [s.told(t.name) for s in w.read],
        }
        for w in p.works
        for t in w.tensors
        if tensor and fnmatchcase(t.name, tensor)
    ]
    listed += [
        {"name": n, "shape": list(p.specs[n][1]), "dtype": p.specs[n][0], "method": "copy", "from": [s.told(n)]}
        for n, s in p.copied.items()
        if tensor and fnmatchcase(n, tensor)
    ]
    listed.sort(key=lambda t: str(t["name"]))
    adapters = list(dict.fromkeys(line for c in p.checkpoints for line in described(c)))
    read_as = [c.note for c in p.checkpoints if c.note]
    found = {**describe(resolved), "adapters": adapters, "read_as": read_as, "figures": figures}
    found |= {} if p.arranged is None else {"arranged": p.arranged.told()}
    found |= {} if p.before is None else {"alignment": {"products": p.before.products, "matrix": p.before.matrix}}
    return {**found, **({"listed": listed} if tensor else {})}


def _show_plan(resolved: Resolved, facts: dict[str, Any]) -> None:
    """What a person hears of a plan."""
    from refmerge.recipe import describe

    figures, told = facts["figures"], describe(resolved)
    tool = resolved.method.rpartition(":")[0]
    whose = {"": "the paper", "official": "the authors' code"}.get(tool, tool)
    reason = ": a recipe without refmerge: 1 at its top" if resolved.semantics == "mergekit" else ""
    say(f"method      {resolved.method} (as {whose} has it{reason})")
    for i, m in enumerate(resolved.models):
        say(f"{'models' if i == 0 else '':12}{m}")
    if resolved.base is not None:
        say(f"base        {resolved.base}")
    given = [s for s in resolved.stats or () if s]
    for i, path in enumerate(given):
        say(f"{'' if i else 'statistics':12}{path}")
    for i, line in enumerate(facts["adapters"]):
        say(f"{'adapters' if i == 0 else '':12}{line}")
    if "arranged" in facts:
        of = facts["arranged"]
        lines = [f"{', '.join(of['merged']) or 'none'} merged"]
        for m in sorted({*of["taken"].values()}):
            lines.append(f"{', '.join(n for n in of['taken'] if of['taken'][n] == m)} of {m}")
        lines += [f"{', '.join(of['left_out'])} left out"] if of["left_out"] else []
        for i, line in enumerate(lines):
            say(f"{'' if i else 'components':12}{line}")
    if resolved.align is not None:
        say(f"aligned     to {resolved.align.to} by {resolved.align.method}, before anything else")
        if "alignment" in facts:
            of = facts["alignment"]
            more = f"{of['products']:,} multiplications to compare the units of a pair once"
            say(f"{'':12}{more}, {size(of['matrix'])} for the largest matrix; memory and time below are without that")
    for module in resolved.modules:
        layers = 0
        for s in () if module.whole else module.slices:
            pieces = ", ".join(f"{p.model} {p.start}-{(p.stop or 0) - 1}" for p in s.everything)
            length = (s.everything[0].stop or 0) - s.everything[0].start
            where = "" if module.name == "default" else f" of {module.name}"
            say(f"layers      {layers}-{layers + length - 1}{where} from {pieces}")
            layers += length
    if told["vocabulary"] is not None:
        v = told["vocabulary"]
        say(f"vocabulary  {v['source']}: {v['tokens']} tokens in {v['rows']} rows")
        for t in v["tables"]:
            all_of = ", ".join(t["models"])
            say(f"{'':12}{t['own_in_all']} are in all of {all_of}, {len(t['others'])} are given to others")
    say(f"tensors     {figures['tensors']} merged, {figures['copied']} copied, {figures['parameters']:,} parameters")
    say(
        f"reads       {size(figures['bytes_read'])} in at most {figures['passes']} pass{'es' * (figures['passes'] > 1)}"
    )
    say(f"writes      {size(figures['bytes_written'])}")
    if "written" in facts:
        why = facts["written"]
        say(f"result      {f'written first: {why}' if why else 'merged in memory as it is read, not written'}")
    compiled = ", compiled programs" if figures["compiled"] else ""
    blocks = f"about {size(figures['peak_memory'])}, {size(figures['block_memory'])} of it blocks"
    say(f"memory      {blocks}; {figures['threads']} thread{'s' * (figures['threads'] > 1)}{compiled}")
    if "seconds" in figures:
        disk = size(round(figures["needs_bytes_per_second"]))
        say(f"time        about {figures['seconds']:.1f} s here, where the disk reads {disk} a second or more")
    for note in facts["read_as"]:
        say(f"note        {note}")
    for note in resolved.notes:
        say(f"note        {note}")
    for t in facts.get("listed", ()):
        values = " ".join(f"{k}={v}" for k, v in t.get("parameters", {}).items())
        say(f"{t['name']} {t['dtype']}{t['shape']} {t['method']}{' ' * bool(values)}{values}")


def _plan_of_mixture(mixture: Mixture, tensor: str | None, json: bool) -> None:
    from fnmatch import fnmatchcase

    figures = mixture.figures()
    listed = [(name, *spec) for name, spec in sorted(mixture.specs.items()) if tensor and fnmatchcase(name, tensor)]
    if json:
        told = [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in listed]
        found = {**mixture.described(), "figures": figures, **({"listed": told} if tensor else {})}
        say(jsonlib.dumps(found, indent=2))
        return
    say(f"mixture     {mixture.form.name}, {mixture.config['num_experts_per_tok']} experts a token")
    say(f"base        {mixture.base.path}")
    for i, expert in enumerate(mixture.experts):
        say(f"{'' if i else 'experts':12}{expert.model.path}")
    for expert in mixture.shared:
        say(f"shared      {expert.model.path}")
    say(f"routers     {mixture.gate_mode}{'' if mixture.hidden_states is None else f', {mixture.hidden_states}'}")
    say(f"tensors     {figures['tensors']}, {figures['parameters']:,} parameters")
    say(f"reads       {size(figures['bytes_read'])}")
    say(f"writes      {size(figures['bytes_written'])}")
    for note in mixture.notes:
        say(f"note        {note}")
    for name, dtype, shape in listed:
        say(f"{name} {dtype}{list(shape)}")


@main.command()
@click.argument("merged", type=click.Path())
@click.option("--recipe", type=click.Path(), help="how it was made; default: the recipe that lies beside its weights")
@click.option("--exact", is_flag=True, help="rounding and choices among ties are differences too")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="how many tensors to list")
@_options(*_RUN, "json")
def verify(merged: str, recipe: str | None, exact: bool, top: int, json: bool, **options: Any) -> None:
    """Compute what a recipe makes and compare it with the checkpoint MERGED, tensor by tensor, in blocks.

    Says of each tensor whether it is equal to the bit, within rounding, equal up to which of several tied entries were kept,
    or by how much it differs and where; and whose semantics do explain it. Exit status 1 where something differs.
    """
    from refmerge.verify import verify

    found = verify(merged, recipe, **{k: v for k, v in options.items() if v is not None})
    say(jsonlib.dumps(found.told(), indent=2) if json else found.text(top))
    if not (found.exact if exact else found.ok):
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path())
@click.option("--tensor", metavar="GLOB", help="list the tensors whose names match; with --values, read no others")
@click.option("--values", is_flag=True, help="read the weights, too: norms, ranges, zeros, NaN, tensors that are the same")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="with --values: how many to list")
@click.option(
    "--by", type=click.Choice(["norm", "magnitude", "largest", "zeros", "rank", "size"]), default="norm", show_default=True,
    help="with --values: which tensors first",
)  # fmt: skip
@click.option("--rank", is_flag=True, help="with --values: the effective rank of each matrix, which is held whole")
@click.option("--rank-limit", type=click.IntRange(min=1), metavar="N", help="entries of the largest such matrix (16777216)")
@click.option("--html", type=click.Path(), metavar="OUT.HTML", help="with --values: one page, with plots by layer")
@_options("allow_pickle", "json")
def inspect(
    path: str, tensor: str | None, values: bool, top: int, by: str, rank: bool, rank_limit: int | None, html: str | None,
    allow_pickle: bool, json: bool,
) -> None:  # fmt: skip
    """Show what a checkpoint holds: from its headers alone, or with --values from all of it, read in blocks."""
    from fnmatch import fnmatchcase

    from refmerge.adapted import open_model

    for option, given in (("--rank", rank), ("--html", html is not None)):
        if given and not values:
            raise click.UsageError(f"{option} wants --values")
    if by == "rank" and not rank:
        raise click.UsageError("--by rank wants --rank")
    _check_page(html)
    if rank_limit is not None and not rank:
        raise click.UsageError("--rank-limit wants --rank")
    with open_model(path, allow_pickle=allow_pickle, values=values) as c:
        infos = list(c.tensors.values())
        dtypes: dict[str, dict[str, int]] = {}
        for i in infos:
            d = dtypes.setdefault(i.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
            d["tensors"], d["parameters"], d["bytes"] = (
                d["tensors"] + 1,
                d["parameters"] + i.size,
                d["bytes"] + i.nbytes,
            )
        within = {i.file: i.file.relative_to(c.directory or i.file.parent).as_posix() for i in infos}
        files = sorted(within.values())
        shown = [i for i in infos if fnmatchcase(i.name, tensor or "*")]
        seen = None
        if values:
            from refmerge import inspection
            from refmerge.compare import RANKED

            names = {i.name for i in shown}
            with _Reading(sum(i.nbytes for i in shown), silent=json) as reading:
                seen = inspection.values(c, reading, (rank_limit or RANKED) if rank else None, only=names)
        parameters = sum(i.size for i in infos)
        in_files = f"{len(files)} file{'s' * (len(files) != 1)}"
        facts = [(path, f"{_tensors(len(infos))}, {parameters:,} parameters, {size(c.nbytes)} in {in_files}")]
        if c.config:
            known = [
                k for k in ("architectures", "model_type", "num_hidden_layers", "hidden_size", "vocab_size") if k in c.config
            ]
            facts.append(("config", ", ".join(f"{k} {c.config[k]}" for k in known) or "of no kind that is known"))
        for part in c.components.values():
            weights = f", {_tensors(len(part.weights))}" if part.weights is not None else ""
            facts.append((part.name, f"{part.kind}{weights}"))
        for name, d in dtypes.items():
            facts.append((name, f"{_tensors(d['tensors'])}, {d['parameters']:,} parameters, {size(d['bytes'])}"))
        if html is not None and seen is not None:
            from refmerge.compare_page import inspected

            _write(html, inspected(seen, path, facts, by))
        if json:
            tensors = {i.name: {"dtype": i.dtype, "shape": list(i.shape), "file": within[i.file]} for i in shown}
            found = {"path": str(c.path), "files": files, "metadata": c.metadata, "dtypes": dtypes, "tensors": tensors}
            if seen is not None:
                told = seen.told()
                found |= told | {"tensors": {name: of | told["tensors"][name] for name, of in tensors.items()}}
            click.echo(jsonlib.dumps(found, indent=2))
            return
        for label, sentence in facts:
            say(f"{label}: {sentence}")
        if seen is not None:
            say(seen.text(top, by))
            return
        width = max((len(i.name) for i in shown), default=0)
        for i in shown if tensor or len(shown) <= 40 else []:
            say(f"  {i.name:{width}}  {i.dtype} {list(i.shape)}")
        if not tensor and len(shown) > 40:
            say("  --tensor '*' lists them all")


@main.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--base", type=click.Path(), help="also how far A and B agree in what they changed of this checkpoint")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="how many tensors to list")
@click.option(
    "--by", type=click.Choice(["relative", "distance", "cosine", "largest", "differing"]), default="relative",
    show_default=True, help="which tensors differ most",
)  # fmt: skip
@click.option("--rank", is_flag=True, help="also the effective rank of each matrix of A - B, which is held whole")
@click.option("--rank-limit", type=click.IntRange(min=1), metavar="N", help="entries of the largest such matrix (16777216)")
@click.option("--html", type=click.Path(), metavar="OUT.HTML", help="write it all as one page, with plots by layer")
@click.option("--data", type=click.Path(), help="an .npz with inputs and labels: the loss on the line from A to B")
@click.option("--net", metavar="NAME", help="the network whose weights these are, with --data: mlp, resnet, vit, ...")
@click.option("--heads", type=click.IntRange(min=1), help="of attention, where the network has it; else as config.json says")
@click.option("--points", type=click.IntRange(min=2), default=25, show_default=True, help="on the line, its ends among them")
@click.option("--layers", is_flag=True, help="the barrier of each layer by itself, too: --measure layers")
@click.option(
    "--measure", "measures", multiple=True, help="what else to measure, with --data; more than once",
    type=click.Choice(
        ["layers", "shallow", "deep", "activations", "stragglers", "sharpness", "quadratic", "aligned", "dropout"]
    ),
)  # fmt: skip
@click.option("--plot", type=click.Path(), metavar="OUT.SVG", help="draw the loss on the line")
@_options("json")
def compare(
    a: str, b: str, base: str | None, top: int, by: str, rank: bool, rank_limit: int | None, html: str | None,
    data: str | None, net: str | None, heads: int | None, points: int, layers: bool, measures: tuple[str, ...],
    plot: str | None, json: bool,
) -> None:  # fmt: skip
    """Compare the checkpoints A and B: tensor by tensor, or with --data by the loss on the line between them.

    The norm of A - B relative to that of A, the cosine of the angle between them, their norms, and the entries that differ
    or are not finite; tensors are read in blocks. With --base also the cosine and the conflicts of sign of what A and B
    changed, with --rank the effective rank of A - B: exp of the entropy of its singular values. With --data nothing of that,
    but the barrier: how far the loss rises above the line between its ends. Measures with it: barriers of one layer alone
    (layers), of the first or the last ones (shallow, deep); CKA and correlations of activations; stragglers, B being a
    fine-tune of A; sharpness by layer; barriers predicted from slopes (quadratic, by torch); and, in the plot too, the line
    to B with its units reordered (aligned) and the path through halves of both networks (dropout).
    """
    from refmerge import compare as comparing
    from refmerge.adapted import open_model

    if (data is None) != (net is None):
        raise click.UsageError("--data and --net want each other")
    if data is None and (plot is not None or layers or measures or heads is not None):
        raise click.UsageError("--plot, --layers, --measure and --heads want --data and --net")
    if plot is not None and not plot.endswith(".svg"):
        raise click.UsageError(f"--plot writes SVG, and {plot} does not end in .svg")
    if data is not None and base is not None:
        raise click.UsageError("--base is for weights, without --data")
    for option, given in (("--rank", rank), ("--html", html is not None)):
        if data is not None and given:
            raise click.UsageError(f"{option} is for weights, without --data")
    _check_page(html)
    if rank_limit is not None and not rank:
        raise click.UsageError("--rank-limit wants --rank")
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(open_model(path)) for path in (a, b))
        if data is None or net is None:
            origin = None if base is None else stack.enter_context(open_model(base))
            total = one.nbytes + other.nbytes + (origin.nbytes if origin is not None else 0)
            with _Reading(total, silent=json) as reading:
                limit = (rank_limit or comparing.RANKED) if rank else None
                found = comparing.weights(one, other, origin, reading, limit)
            if html is not None:
                from refmerge.compare_page import page

                _write(html, page(found, a, b, base, by))
            say(found.text(top, by) if not json else jsonlib.dumps(found.told(), indent=2))
            return
        of = comparing.task(net, data, **comparing.options_of(net, one.config, heads))
        line = comparing.along([one, other], of, points, ("layers",) * layers + measures)
        if plot is not None:
            from refmerge.plots import draw_paths

            _write(plot, draw_paths(line.paths(), f"{net}: the loss from {a} to {b}"))
        click.echo(line.text() if not json else jsonlib.dumps(line.told(), indent=2))


diff = copy.copy(compare)
diff.short_help = "Another name of compare."
main.add_command(diff, "diff")


@main.command()
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--score", required=True, metavar="COMMAND", help="gets a checkpoint's path, prints the score last")
@click.option("--greedy", is_flag=True, help="which of the models to average, and not with what parameters")
@click.option("--rule", type=click.Choice(["strict", "at_least", "repeats"]), help="when a model stays, with --greedy")
@click.option("--search", "names", metavar="NAMES", help="parameters, with commas; else weight, density and t if not given")
@click.option("--evaluations", type=click.IntRange(min=1), help="how many merges are scored (100), or --greedy repeats (20)")
@click.option("--groups", type=click.IntRange(min=1), help="values over the layers for each parameter (1)")
@click.option("--filter", "filters", multiple=True, metavar="TEXT", help="tensors with it in their names have own values")
@click.option("--negative", is_flag=True, help="weights may be negative")
@click.option("--sigma", type=float, help="the first step size (1/6)")
@click.option("--population", type=click.IntRange(min=2), help="merges drawn at a time")
@click.option("--log", type=click.Path(), help="a file that keeps the scores, and from which the search goes on")
@click.option("--plot", type=click.Path(), metavar="P.SVG", help="draw the scores and the best so far")
@click.option("--save", type=click.Path(), metavar="BEST.YML", help="write the best recipe")
@_options(*_RUN)
@click.option("--overwrite", is_flag=True, help="replace OUT once the best merge is complete")
@_options("json")
def search(
    recipe: str, out: str, score: str, greedy: bool, rule: str | None, evaluations: int | None, names: str | None,
    filters: tuple[str, ...], negative: bool, plot: str | None, save: str | None, json: bool, **options: Any,
) -> None:  # fmt: skip
    """Search for the merge of RECIPE's models that scores best, and write it to OUT.

    By CMA-ES over parameters that the recipe leaves open (`refmerge methods evolutionary_merge`), or for the models that
    are worth averaging (--greedy, `refmerge methods greedy_soup`). Trials are checkpoints beside OUT while they are scored.
    """
    from refmerge.recipe.search import search as run
    from refmerge.scoring import judged

    of_genes = {key: options.pop(key) for key in ("groups", "sigma", "population")}
    of_genes |= {"search": names, "filter": filters or None, "negative": negative or None, "save": save}
    if greedy and (wrong := sorted(key for key, value in of_genes.items() if value is not None)):
        raise click.UsageError(f"--{wrong[0]} is for parameters, and --greedy has none")
    if rule is not None and not greedy:
        raise click.UsageError("--rule is for --greedy")
    if greedy and evaluations is not None and rule != "repeats":
        raise click.UsageError("--evaluations with --greedy is for --rule repeats: the others try each model once")
    if plot is not None and not plot.endswith(".svg"):
        raise click.UsageError(f"--plot writes SVG, and {plot} does not end in .svg")
    if greedy:
        own: dict[str, Any] = {"rule": rule, "trials": evaluations}
    else:
        own = {"evaluations": evaluations, "filters": filters or None, "negative": negative or None, **of_genes}
        own |= {"names": None if names is None else [name.strip() for name in names.split(",")]}
    own = {key: value for key, value in own.items() if value is not None and key not in ("search", "filter", "save")}
    done: list[float] = []

    def told(candidate: Any) -> float:
        value = judged(score, candidate, "search")
        done.append(value)
        if not json:
            click.echo(f"{len(done):5}  {value:.6g}", err=True)
        return value

    found = run(recipe, out, told, greedy=greedy, **own, **{k: v for k, v in options.items() if v is not None})
    if plot is not None:
        _write(plot, found.plot())
    if save is not None:
        _write(save, found.recipe)
    best = {"ingredients": list(found.ingredients)} if greedy else {"recipe": found.recipe}
    if json:
        click.echo(jsonlib.dumps({"out": out, "score": found.score, "trials": [t.score for t in found.trials], **best}))
        return
    say(f"{len(found.trials)} trials, the best {found.score:.6g}, to {out}")
    taken = ", ".join(str(k + 1) for k in getattr(found, "ingredients", ()))
    say(f"models {taken} of the recipe" if greedy else found.recipe.rstrip("\n"))


def _check_page(html: str | None) -> None:
    """UsageError where the page could not be written, before anything is read."""
    import os

    if html is not None and not html.endswith(".html"):
        raise click.UsageError(f"--html writes HTML, and {html} does not end in .html")
    if html is not None and not os.path.isdir(os.path.dirname(html) or "."):
        raise click.UsageError(f"{html} cannot be written: it is in no folder that exists")


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as e:
        raise click.UsageError(f"{path} cannot be written: {e.strerror}") from e


@main.command()
@click.argument("paths", nargs=-1, type=click.Path(), metavar="CHECKPOINT OUT")
@click.option("--net", metavar="NET", help="mlp, resnet, gpt2, ...; module:function; or a folder of transformers")
@click.option("--data", metavar="DATA", help=".npz, .npy or .safetensors with inputs, labels, mask; or module:function")
@click.option("--kinds", default="gram", show_default=True, help="gram, moments, outputs, kfac, fisher, with commas")
@click.option(
    "--likelihood", type=click.Choice(["exact", "sampled", "given", "next"]), default="exact", show_default=True,
    help="whose gradient kfac and fisher take: of all classes, a drawn one, the labels, the next token",
)
@click.option("--layers", metavar="GLOB", default="*", help="only of the layers whose names match")
@click.option("--samples", metavar="START:STOP", help="a part of the data, whose statistics --merge adds to the others'")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="samples at a time")
@click.option("--option", "options", metavar="NAME=VALUE", multiple=True, help="of the network: heads=12, activation=gelu")
@click.option("--device", help="of torch: cuda:0")
@_options("dtype", "seed")
@click.option("--merge", "parts", is_flag=True, help="add statistics of parts of the data: --merge PART... OUT")
@click.option("--overwrite", is_flag=True, help="replace OUT once the new file is complete")
@_options("json")
def collect(
    paths: tuple[str, ...], net: str | None, data: str | None, kinds: str, samples: str | None, options: tuple[str, ...],
    device: str | None, parts: bool, overwrite: bool, json: bool, seed: int | None, **choices: Any,
) -> None:  # fmt: skip
    """Run CHECKPOINT on data, and write statistics of what its layers read and of its gradients to OUT, a .safetensors file.

    fisher, regmean and mats read them, as `stats` of a model in a recipe. A folder of transformers is its own network where
    --net is left out.
    """
    import os

    from refmerge.checkpoint import open_checkpoint, refuse_input
    from refmerge.collect import gathered, option
    from refmerge.stats import Statistics

    *inputs, out = paths or ("",)
    if not inputs or (len(inputs) > 1 and not parts):
        raise click.UsageError("one CHECKPOINT and OUT are wanted, or --merge with parts and OUT")
    if not out.endswith(".safetensors"):
        raise click.UsageError(f"OUT is a file, and {out!r} does not end in .safetensors")
    if os.path.exists(out) and not overwrite:
        raise click.UsageError(f"output {out!r} exists; --overwrite replaces it")
    refuse_input(out, inputs)
    if parts:
        if net is not None or data is not None:
            raise click.UsageError("--merge adds what is there: --net and --data go with a CHECKPOINT")
        found = Statistics.load(inputs[0])
        for path in inputs[1:]:
            found.add(Statistics.load(path))
    else:
        with open_checkpoint(inputs[0]) as checkpoint:
            net = net or (str(checkpoint.directory) if checkpoint.config else None)
            if net is None or data is None:
                raise click.UsageError("--net and --data are wanted: what to run, and on what")
            start, stop = _range(samples)
            with _Counting(silent=json) as progress:
                found = gathered(
                    checkpoint, net, data, [k.strip() for k in kinds.split(",")], on=device, seed=seed or 0, start=start,
                    stop=stop, options=dict(map(option, options)), progress=progress, **choices,
                )  # fmt: skip
    found.save(out, overwrite=overwrite)
    names, counted = list(found), sorted({found.count(name) for name in found})
    if json:
        click.echo(jsonlib.dumps({"out": out, "facts": found.facts, "counts": {n: found.count(n) for n in names}}))
        return
    rows = f"{counted[0]:,.0f}" + (f" to {counted[-1]:,.0f}" if len(counted) > 1 else "")
    say(f"{len(names)} statistics of {rows} rows or samples to {out}: {size(sum(found[n].nbytes for n in names))}")


def _range(samples: str | None) -> tuple[int, int | None]:
    """`100:200`, `100:` or `:200`."""
    start, sign, stop = (samples or ":").partition(":")
    try:
        found = int(start or 0), int(stop) if stop else None
    except ValueError:
        found = -1, None
    if not sign or found[0] < 0 or (found[1] is not None and found[1] <= found[0]):
        raise click.UsageError(f"--samples is START:STOP, two whole numbers, not {samples!r}")
    return found


@main.command()
@click.argument("target")
@click.option("--method", "methods", metavar="NAME", multiple=True, help="only these; default: all that have vectors")
@click.option("--entry", help="whose semantics a function or a command claims, mergekit:ties; default: the paper's")
@click.option("--command", is_flag=True, help="TARGET is a command line that answers requests, in any language")
@click.option("--python", type=click.Path(), help="the interpreter in which the tool is installed")
@click.option("--path", type=click.Path(), metavar="CHECKOUT", help="with official: the authors' repository")
@click.option("--fuzz", type=click.IntRange(min=1), metavar="N", help="N random inputs for each entry of the tool, too")
@click.option("--html", type=click.Path(), metavar="OUT.HTML", help="write the table and the flags as one page")
@click.option("--junit", type=click.Path(), metavar="OUT.XML", help="write the cases for a build server")
@_options("json")
def conform(
    target: str, methods: tuple[str, ...], entry: str | None, command: bool, python: str | None, path: str | None,
    fuzz: int | None, html: str | None, junit: str | None, json: bool,
) -> None:  # fmt: skip
    """Run the test vectors against TARGET, another implementation, and say method by method whether it is right, or why not.

    TARGET is a tool with an adapter (fusion_bench, mergekit, peft, sd_mecha), `official` with the --path of a checkout of
    the authors' code, a Python function as module:function, or with --command any command. A difference that a flag explains
    is a choice that a tool has made; exit status 1 where there are others, and where a function or a command differs from
    the semantics that it claims.
    """
    from refmerge.conform import conform, fuzzed

    if fuzz is not None and (command or ":" in target):
        raise click.UsageError("--fuzz is for tools that have an adapter")
    found = conform(target, methods, entry=entry, python=python, command=command, path=path)
    differences = [] if fuzz is None else fuzzed(target, methods, fuzz, python, path)
    for out, made in ((html, found.html), (junit, found.junit)):
        if out is not None:
            try:
                with open(out, "w", encoding="utf-8", newline="\n") as file:
                    file.write(made())
            except OSError as e:
                raise click.UsageError(f"{out} cannot be written: {e.strerror}") from e
    if json:
        click.echo(jsonlib.dumps({**found.told(), "fuzz": [vars(d) for d in differences]}, indent=2))
    else:
        click.echo("\n".join([found.text(), *(d.text() for d in differences)]))
    if not found.ok or differences:
        sys.exit(1)


@main.command()
@click.argument("name", required=False)
@click.option("--bibtex", is_flag=True, help="only the BibTeX entry of the paper")
@click.option("--page", is_flag=True, help="all of the page, with its examples and exercises")
@_options("json")
def methods(name: str | None, bibtex: bool, page: bool, json: bool) -> None:
    """List the methods, procedures, recipes and other tools' entries, or show what is known of one: definition, parameters,
    needs, laws, who disagrees, citation."""
    from refmerge import catalogue
    from refmerge.errors import UsageError

    if bibtex + page + json > 1:
        raise click.UsageError("--bibtex, --page and --json exclude each other")
    if name is None:
        if bibtex or page:
            raise click.UsageError("--bibtex and --page want the NAME of a method")
        listed = catalogue.entries()
        if json:
            click.echo(jsonlib.dumps([catalogue.described(e) for e in listed], indent=2))
        else:
            from refmerge import show

            click.echo(show.catalogue(listed))
        return
    entry = catalogue.find(name)
    if json:
        click.echo(jsonlib.dumps(catalogue.described(entry), indent=2))
    elif bibtex:
        click.echo(catalogue.bibtex(entry))
    elif page and entry.tool:
        own = " and ".join(f"`refmerge methods {p.name} --page`" for p in entry.pages)
        raise UsageError(f"{name} has no page of its own{own and ': see ' + own}")
    else:
        from refmerge import show

        click.echo(show.printed(show.sheet(entry, whole=page)))


@main.command()
@_options("json")
def backends(json: bool) -> None:
    """List the backends, and why one cannot run here."""
    from refmerge import registry
    from refmerge.errors import UsageError

    found = []
    for name in registry.backend_names():
        try:
            backend = registry.open_backend(name)
            found.append({"name": name, "available": True, "kernels": sorted(backend.kernels)})
        except UsageError as e:
            found.append({"name": name, "available": False, "reason": str(e)})
    if json:
        click.echo(jsonlib.dumps(found, indent=2))
        return
    for b in found:
        click.echo(f"{b['name']:8} {'available' if b['available'] else b['reason']}")


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("method")
@click.option("--base", metavar="NUMBERS", help="comma-separated: 0,0.5,-1")
@click.option("--models", "models", metavar="NUMBERS", multiple=True, help="comma-separated, once for each model")
@_options("seed")
@click.option("--over", type=click.Choice(["tensor", "model"]), help="what the method's thresholds and sums range over")
@click.pass_context
def explain(
    context: click.Context, method: str, base: str | None, models: tuple[str, ...], **options: Any
) -> None:  # fmt: skip
    """Print every numbered step of METHOD with its arrays, traced from its own text.

    On the worked example of its page, or on numbers given with --base and --models. The method's parameters are
    options: --density 0.5, or one value per model, --weight 1,0.5.
    """
    from refmerge import catalogue
    from refmerge.errors import UsageError
    from refmerge.explain import explain as trace
    from refmerge.explain import render

    entry = catalogue.find(method)
    if entry.kind != "method":
        raise UsageError(
            f"{method} is a {entry.kind}, and only methods have steps to explain: `refmerge methods {method}` shows its page"
        )
    params = parameters_of(context.args, entry.code)
    given = [_numbers("--models", m) for m in models] or None
    params |= {name: value for name, value in options.items() if value is not None}
    steps = trace(method, base=None if base is None else _numbers("--base", base), models=given, **params)
    click.echo(render(steps))


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{option} takes numbers with commas between them, not {text!r}") from None


def parameters_of(words: list[str], method: Any) -> dict[str, Any]:
    """`--density 0.5 --normalize false` as the method's parameters."""
    params: dict[str, Any] = {}
    words = [part for w in words for part in (w.split("=", 1) if w.startswith("--") else [w])]
    while words:
        option = words.pop(0)
        key = option.removeprefix("--").replace("-", "_")
        key = f"{key}_" if f"{key}_" in method.params else key
        if not option.startswith("--") or not words:
            raise click.UsageError(f"{option!r} is no option with a value")
        if key not in method.params:
            method.bind({key: None}, 1)  # raises the error that says what is near
        values = [_value(v, method.params[key].type, option) for v in words.pop(0).split(",")]
        params[key] = values[0] if len(values) == 1 and method.params[key].type is not tuple else values
    return params


def _value(text: str, kind: type, option: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise click.UsageError(f"{option} is true or false, not {text!r}")
        return text == "true"
    try:
        if kind is object:
            try:
                return float(text)
            except ValueError:
                return text
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise click.UsageError(f"{option} is a number, not {text!r}") from None


@main.command()
@click.argument("out", type=click.Path(), required=False)
@_options("json")
def demo(out: str | None, json: bool) -> None:
    """Merge five small networks that read digits, and show what each merge is worth. Writes OUT (refmerge-demo)."""
    from refmerge.demo import run

    run(out, json=json)


def size(n: float) -> str:
    """Bytes for people, in decimal units as disks and shards are measured."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


class _Reading:
    """A bar in bytes that have been read, on a terminal; nothing elsewhere."""

    def __init__(self, total: int, silent: bool) -> None:
        self._total, self._bar = total, None if silent or not sys.stderr.isatty() else _bar()

    def __enter__(self) -> Callable[[int], None]:
        if self._bar is None:
            return lambda nbytes: None
        task, bar = self._bar.add_task("compare", total=self._total), self._bar
        shown = [time.monotonic()]
        bar.start()

        def advance(nbytes: int) -> None:
            bar.advance(task, nbytes)
            if time.monotonic() - shown[0] > 0.1:
                shown[0] = time.monotonic()
                bar.refresh()

        return advance

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()


class _Counting:
    """How many samples are done, on a terminal; nothing elsewhere."""

    def __init__(self, silent: bool) -> None:
        self._shows, self._done = not silent and sys.stderr.isatty(), 0

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def _advance(self, samples: int) -> None:
        self._done += samples
        if self._shows:
            click.echo(f"\r{self._done:,} samples", nl=False, err=True)

    def __exit__(self, *_: Any) -> None:
        if self._shows and self._done:
            click.echo("", err=True)


class MergeProgress:
    """A bar in bytes that have been read, on a terminal; nothing elsewhere. Of tensors that are merged as a whole, which may
    take minutes, the largest of those in work is named."""

    def __init__(self, plan: Plan, silent: bool) -> None:
        self._plan, self._bar = plan, None if silent or not sys.stderr.isatty() else _bar()

    def __enter__(self) -> None:
        if self._bar is None:
            return
        plans, bar = self._plan.all_plans, self._bar
        total = sum(p.figures(estimate=True)["bytes_read"] for p in plans)
        self._task: Any = bar.add_task(self._plan.work.method.name, total=total)
        self._shown = time.monotonic()
        for work in (w for p in plans for w in p.works):
            work.progress, work.working = self._advance, self._name
        for p in plans:
            if p.before is not None:
                p.before.progress = self._describe
        bar.start()

    def _advance(self, nbytes: int) -> None:
        assert self._bar is not None
        self._bar.advance(self._task, nbytes)
        if time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            self._bar.refresh()

    def _name(self, tensor: Tensor) -> None:
        self._describe(f"{self._plan.work.method.name} {tensor.name}")

    def _describe(self, what: str) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=what, refresh=True)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._bar is None:
            return
        if kind is None:  # there may have been fewer passes than were thought
            self._bar.update(self._task, total=self._bar.tasks[0].completed)
        self._bar.stop()


def _bar() -> Any:
    """A bar that does not refresh itself: the thread in which it would keep the merge from forking workers."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    said = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=60))
    one_line = Column(no_wrap=True)
    return Progress(
        said, BarColumn(None), DownloadColumn(table_column=one_line), TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), auto_refresh=False, expand=True,
    )  # fmt: skip
