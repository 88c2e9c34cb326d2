"""From a recipe file to a checked plan, and from there to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from refmerge.adapted import open_model
from refmerge.api import prepare
from refmerge.checkpoint import Checkpoint, check_target
from refmerge.errors import RefmergeError, UsageError, together
from refmerge.method import Method
from refmerge.plan import Plan, Stage
from refmerge.recipe.alignment import Aligner
from refmerge.recipe.assemble import assemble, layer_config, tied_heads
from refmerge.recipe.moe import prepare_moe
from refmerge.recipe.plan import Module, Resolved, Slice, load_recipes, pieces, resolve_all
from refmerge.recipe.record import alone, keep_record
from refmerge.recipe.stages import ComingCheckpoint, why_written
from refmerge.recipe.templates import template_for
from refmerge.recipe.tokenizers import (
    TOKENIZER_FILES,
    json_bytes,
    read_json_file,
    read_tokenizer_config,
    read_vocabulary,
    renumbered,
)
from refmerge.recipe.vocabulary import Alignment as Vocabularies
from refmerge.recipe.vocabulary import align, check_alike
from refmerge.registry import get, open_backend
from refmerge.skipping import POLICY
from refmerge.sources import ByteSource, DiskSource

__all__ = ["prepare_recipe", "run_recipe"]


def prepare_recipe(
    recipe: str | os.PathLike[str],
    *,
    method: Method | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    hashes: bool | None = None,
    download: bool = False,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    figures: bool = False,
    **options: Any,
) -> tuple[Resolved, Plan]:
    """Check a recipe and the checkpoints it names, without reading a weight.

    method: stands in for the one that the recipe names. options: as those of `refmerge.api.prepare`; dtype and seed go
    before the recipe's own. hashes: whether the report has the hashes of what is read and written; None is for small models
    only. out: where the result is to be, if that is to be checked already. download: fetch models of the Hub that are not in
    its cache. figures: whether the report has each tensor's figures (see refmerge.figures). A native recipe's paths are
    relative to its folder, another tool's to the working directory, as that tool has it. Where the file holds several
    recipes, those that come before the last one are the plan's stages.
    """
    recipes = load_recipes(recipe)
    coming: dict[str, ComingCheckpoint] = {}
    stages: list[Stage] = []
    inputs: dict[str, Checkpoint] = {}
    for one, resolved in zip(recipes, resolve_all(recipes, method)):
        folder = Path(recipe).parent if resolved.semantics == "refmerge" else Path()
        models = _Models(folder, coming, download, bool(options.get("allow_pickle")))
        last = one is recipes[-1]
        target = {"out": out, "overwrite": overwrite} if last else {}
        try:
            resolved, plan = _prepare(resolved, models, method if last else None, dtype, seed, {**options, **target})
        except RefmergeError as error:
            if not last or out is None or (method or get(resolved.method)).outputs:
                raise
            raise together([error, *_wrong_with(out, overwrite)]) from error
        named = [*resolved.models, *(p.model for m in resolved.modules for s in m.slices for p in s.everything)]
        named += [] if resolved.base is None else [resolved.base]
        named += [model for model in (resolved.components or {}).values() if model is not None]
        opened = {m: models.open(m) for m in dict.fromkeys(named)}
        inputs = {**inputs, **opened}
        keep_record(
            recipes if last else [alone(one)],
            resolved,
            plan,
            opened,
            inputs if last else opened,
            {"dtype": dtype, **options},
            hashes,
        )
        if not last:
            assert resolved.name is not None
            coming[resolved.name] = ComingCheckpoint(resolved.name, plan)
            stages.append(Stage(resolved.name, plan, coming[resolved.name], recipe=resolved))
    plan.stages, plan.wants_figures = stages, figures
    for stage in stages:
        result = coming[stage.name]
        stage.written = why_written(result, stage.plan, plan.all_plans)
        result.may_stream = not stage.written
    return resolved, plan


def _wrong_with(out: str | os.PathLike[str], overwrite: bool) -> list[RefmergeError]:
    """Why no result can be written there."""
    try:
        check_target(out, overwrite)
    except RefmergeError as error:
        return [error]
    return []


@dataclass(frozen=True)
class _Models:
    """Where the models of a recipe are. folder: what paths are relative to. coming: results of merges before it, by name.
    download: whether models of the Hub are fetched. allow_pickle: whether torch's files are read."""

    folder: Path
    coming: Mapping[str, ComingCheckpoint]
    download: bool
    allow_pickle: bool
    opened: dict[str, Checkpoint] = field(default_factory=dict)

    def place(self, path: str) -> Path:
        return self.folder / Path(path).expanduser()

    def open(self, model: str) -> Checkpoint:
        if model in self.coming:
            return self.coming[model]
        if model not in self.opened:
            self.opened[model] = open_model(
                model, self.folder, download=self.download, allow_pickle=self.allow_pickle
            )
        return self.opened[model]

    def open_all(self, models: Collection[str], donor: str) -> dict[str, Checkpoint]:
        """These models, without repetition. InputError with what is wrong with each of them, and with the donor."""
        errors: list[RefmergeError] = []
        found = {}
        for model in dict.fromkeys((*models, donor)):
            try:
                found[model] = self.open(model)
            except RefmergeError as e:
                errors.append(e)
        if errors:
            raise together(errors)
        return {model: found[model] for model in dict.fromkeys(models)}


def _prepare(
    resolved: Resolved,
    models: _Models,
    method: Method | None,
    dtype: str | None,
    seed: int | None,
    options: Mapping[str, Any],
) -> tuple[Resolved, Plan]:
    common: dict[str, Any] = {
        "seed": seed if seed is not None else resolved.seed or 0,
        "over": resolved.over,
        "dtype": dtype or resolved.work_dtype,
        "out_dtype": resolved.out_dtype,
        "read_dtype": resolved.read_dtype,
        **options,
    }
    if resolved.modules:
        return _prepare_assembled(resolved, models, method or resolved.method, common)
    of_parts = resolved.components or {}
    base = [] if resolved.base is None else [resolved.base]
    opened = models.open_all([*resolved.models, *base, *(m for m in of_parts.values() if m is not None)], resolved.donor)
    donor = models.open(resolved.donor)
    _refuse_for_pipelines(resolved, opened)
    if _tied(resolved, opened, common):
        whole = Slice(*pieces(resolved.models, resolved.base), resolved.rules, resolved.base_model)
        resolved = replace(resolved, modules=(Module("default", (whole,), whole=True),))
        return _prepare_assembled(resolved, models, method or resolved.method, common)
    notes = _check_vocabularies(resolved, opened)
    plan = prepare(
        [opened[m] for m in resolved.models],
        method or resolved.method,
        base=None if resolved.base is None else opened[resolved.base],
        stats=None if resolved.stats is None else [None if s is None else models.place(s) for s in resolved.stats],
        params=resolved.parameters_for,
        donor=donor,
        components=resolved.components and {n: None if m is None else opened[m] for n, m in of_parts.items()},
        **common,
    )
    _finish(resolved, plan, opened, None)
    resolved = replace(resolved, notes=(*resolved.notes, *notes, *plan.notes))
    if resolved.align is not None:
        if common.get("nonfinite") == POLICY:
            raise UsageError(f"align looks at whole models, and nonfinite = {POLICY!r} leaves out parts of some")
        plan.before = Aligner(resolved.align, resolved.models, resolved.base, plan)
    return resolved, plan


def _prepare_assembled(
    resolved: Resolved, models: _Models, method: str | Method, common: dict[str, Any]
) -> tuple[Resolved, Plan]:
    """A recipe whose result is put together from parts of models."""
    read_dtype, backend = common.pop("read_dtype"), open_backend(common.get("backend") or "numpy")
    named = dict.fromkeys(p.model for m in resolved.modules for s in m.slices for p in s.everything)
    checkpoints = models.open_all(named, resolved.donor)
    donor = models.open(resolved.donor)
    _refuse_for_pipelines(resolved, checkpoints)
    sources = {model: DiskSource(c, backend, read_dtype) for model, c in checkpoints.items()}
    native = resolved.semantics == "refmerge"
    alignment = None
    if resolved.tokenizer is not None:
        alignment = align(
            resolved.tokenizer, checkpoints, resolved.base_model, models.open, native, resolved.vocabulary,
            resolved.layers,
        )  # fmt: skip
        notes = alignment.notes
    else:
        notes = _check_vocabularies(resolved, checkpoints)

    def source_of(model: str, name: str, s: Slice) -> ByteSource:
        if alignment is None:
            return sources[model]
        return alignment.source_of(model, name, [p.model for p in s.everything], s.base_model, sources)

    tied = {} if alignment is not None else _tied(resolved, checkpoints, common)
    segments = assemble(resolved, checkpoints, source_of, tied)
    if len(segments) > 1 and common["over"] == "model":
        raise UsageError("over: model takes all tensors together: give every slice the same number of models")
    plans = []
    for segment in segments:
        stitched, base = segment.sources()
        plans.append(prepare(stitched, method, base=base, donor=donor, params=segment.parameters_for, **common))
    plan = plans[0]
    plan.rest = [p.work for p in plans[1:]]
    plan.specs = dict(sorted(chain.from_iterable(p.specs.items() for p in plans)))
    plan.copied = dict(chain.from_iterable(p.copied.items() for p in plans))
    plan.checkpoints = (*checkpoints.values(), *([] if donor in checkpoints.values() else [donor]))
    plan.config, more = layer_config(resolved, checkpoints, donor)
    for model, names in tied.items():
        for head, twin in names.items():
            more.append(f"{model} stores no {head}: it is tied to {twin}, which is merged in its place")
    if tied and (donor.config or {}).get("tie_word_embeddings"):
        plan.config = {**(plan.config or donor.config or {}), "tie_word_embeddings": False}
        more.append("config.json: tie_word_embeddings is false, as the head is no longer the embedding")
    more += _finish(resolved, plan, checkpoints, alignment)
    rows = None if alignment is None else alignment.told()
    return replace(resolved, notes=(*resolved.notes, *notes, *more), rows_from=rows), plan


def _refuse_for_pipelines(resolved: Resolved, checkpoints: Mapping[str, Checkpoint]) -> None:
    """UsageError for what a recipe says of one network and its vocabulary, where the models are pipelines of several."""
    pipeline = next((m for m, c in checkpoints.items() if c.components), None)
    said = [key for key in ("align", "chat_template", "tokenizer") if getattr(resolved, key) is not None]
    said += ["slices, modules or layers"] if resolved.modules and resolved.tokenizer is None else []
    if pipeline is not None and said:
        raise UsageError(
            f"{pipeline} is a diffusers pipeline of several networks, and {' and '.join(said)} can be said of one alone: "
            f"merge it by the path of its folder, such as {pipeline}/text_encoder"
        )


def _tied(
    resolved: Resolved, checkpoints: Mapping[str, Checkpoint], common: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """The heads that stand for themselves in some models and are an embedding in others, as mergekit merges them."""
    if resolved.semantics != "mergekit" or common.get("missing", "error") != "error":
        return {}
    if any(c.components for c in checkpoints.values()):
        return {}
    return tied_heads(checkpoints)


def _check_vocabularies(resolved: Resolved, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    if resolved.rows_as_they_are:
        return []
    return check_alike(checkpoints, resolved.semantics == "refmerge", resolved.vocabulary, resolved.layers)


def _finish(
    resolved: Resolved, plan: Plan, checkpoints: Mapping[str, Checkpoint], alignment: Vocabularies | None
) -> list[str]:
    """The files beside the weights: those of the tokenizer, the chat template, and what config.json says of tokens; and
    notes of what is changed there."""
    donor, notes = plan.donor, list[str]()
    assert donor is not None
    sidecars = donor.sidecars()
    files: dict[str, bytes] = {}
    from_tokenizer = donor
    if alignment is not None:
        from_tokenizer, vocabulary = alignment.donor, alignment.vocabulary
        others = [path for path in sidecars if path.name not in TOKENIZER_FILES]
        sidecars = sorted([*others, *vocabulary.sidecars(from_tokenizer.sidecars())])
        files = vocabulary.files(from_tokenizer.directory)
        plan.config = alignment.config(plan.config or donor.config)
        given = read_vocabulary(donor)
        if given is not None and plan.config is not None:
            plan.config, more = renumbered(plan.config, given.ids, vocabulary.ids)
            notes += [f"config.json: {change}" for change in more]
        generation = None if donor.directory is None else read_json_file(donor.directory / "generation_config.json")
        if given is not None and generation is not None:
            changed, more = renumbered(generation, given.ids, vocabulary.ids)
            if changed != generation:
                files["generation_config.json"] = json_bytes(changed)
                notes += [f"generation_config.json: {change}" for change in more]
    if resolved.chat_template is not None:
        text = template_for(resolved.chat_template, [donor, *checkpoints.values()])
        if text is not None:
            files["chat_template.jinja"] = text.encode()
            sidecars = [path for path in sidecars if path.name != "chat_template.json"]
            settings = read_tokenizer_config(files, from_tokenizer.directory)
            if settings is not None and settings.pop("chat_template", None) is not None:
                files["tokenizer_config.json"] = json_bytes(settings)
    plan.sidecars, plan.files = sidecars, files
    return notes


def run_recipe(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    intermediates: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Run a recipe into `out` and return the open Checkpoint, as `refmerge merge RECIPE OUT` does. intermediates: a folder
    in which the results of merges before the last one are kept."""
    mixture = prepare_moe(recipe, **options)
    if mixture is not None:
        if intermediates is not None:
            raise UsageError("a mixture of experts has no merges before it whose results could be kept")
        return mixture.run(Path(out), max_shard_size=max_shard_size, overwrite=overwrite, resume=resume)
    _, plan = prepare_recipe(recipe, out=out, overwrite=overwrite, **options)
    return plan.run(
        Path(out), max_shard_size=max_shard_size, overwrite=overwrite, resume=resume,
        intermediates=None if intermediates is None else Path(intermediates),
    )  # fmt: skip
