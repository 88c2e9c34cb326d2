"""Experts that scores share, as a copy for each score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refmerge.checkpoint import Checkpoint
from refmerge.errors import InputError
from refmerge.experts import SHARED, SLOTS, Output, Rule, dtype_of, find, known_again, opened
from refmerge.procedure import procedure


@procedure("msmoe_restore", paper="arXiv:2310.01334")
def msmoe_restore(
    stored: Any, out: str | Path | None = None, *, rule: Rule | str | None = None, max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Any:  # fmt: skip
    """What `msmoe` wrote with write="shared" as a model that other tools load: each of the router's scores has an expert of
    its own again, those of a group the same.

    stored: a path, an open checkpoint or a mapping. out: as in `msmoe`. Returns a mapping name -> array, or the open
    checkpoint.
    """
    stored = opened(stored)
    # 1. open, and see that it fits
    mixtures = find(stored, rule)
    if not any(m.shared for m in mixtures.values()):
        raise InputError("msmoe_restore: no router's scores share experts here: there is nothing to restore")
    specs, sources = laid_out(stored, mixtures)
    config = stored.config if isinstance(stored, Checkpoint) else None
    files = None if config is None else known_again(config, SHARED)
    # 2. copy
    with Output(stored, specs, out, files, max_shard_size=max_shard_size, overwrite=overwrite) as output:
        for name in specs:
            output.copy(name, sources.get(name))
    return output.result


def laid_out(stored: Mapping[str, Any], mixtures: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """name -> (dtype, shape) of all tensors, and of the experts' name -> what it is a copy of."""
    sources, gone = {}, set()
    for mixture in mixtures.values():
        gone |= {name for names in mixture.experts for name in names.values()} | {f"{mixture.router}.{SLOTS}"}
        for slot, expert in enumerate(mixture.slots):
            sources |= {mixture.name(slot, part): name for part, name in mixture.experts[expert].items()}
    tensors: Mapping[str, Any] = getattr(stored, "tensors", stored)
    names = {name: name for name in tensors if name not in gone} | sources
    return {n: (dtype_of(tensors[s], s), tuple(tensors[s].shape)) for n, s in names.items()}, sources
