"""What is merged: the tensors, the method with its parameters, and where values come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from refmerge.checkpoint import itemsize
from refmerge.method import Method, Over
from refmerge.sources import Source

__all__ = ["Tensor", "Work", "stat_name"]


@dataclass(frozen=True)
class Tensor:
    """One floating-point tensor to merge: its work dtype, its bound parameters (they may differ between tensors), and the
    safetensors dtype of the result."""

    name: str
    shape: tuple[int, ...]
    work: str
    params: Mapping[str, Any]
    out: str = "F64"

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> tuple[int, int]:
        """(rows, row length) in view "rows": the last axis whole, more than two dimensions as shape[0] rows."""
        if len(self.shape) <= 1:
            return 1, self.size
        length = self.size // self.shape[0] if self.shape[0] else 0
        return self.shape[0], length


@dataclass
class Work:
    """A merge, ready to run. stats: per model the statistics file or mapping as a Source, or None. backend: where blocks of
    files are computed; None for arrays, which stay where they are. kernels: fast twins of methods for arrays on a device.
    progress: is told the bytes that have been read. working: is told which tensor, the largest of those that are merged as
    wholes, is being merged. fused: whether the operations on a block of a file are noted down first and computed in one pass
    (see refmerge.fused). figures: whether each tensor's figures are made on the way (see refmerge.figures)."""

    method: Method
    models: Sequence[Source]
    base: Source | None
    tensors: Sequence[Tensor]
    over: Over
    seed: int = 0
    stats: Sequence[Source] | None = None
    nonfinite: str = "error"
    progress: Callable[[int], None] | None = None
    working: Callable[[Tensor], None] | None = None
    backend: Any = None
    kernels: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    figures: bool = False
    recorded: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        draws = [key for key, kind in self.method.stats.items() if kind == "draw"]
        self.recorded = bool(self.stats) and any(
            stat_name(t.name, key) in s.names() for s in self.stats or () for t in self.tensors for key in draws
        )

    @property
    def read(self) -> list[Source]:
        """The sources that the method reads weights of: the models, and the base where it asks for one."""
        return [*self.models, *([self.base] if self.base is not None and self.method.takes_base else [])]

    def group_of(self, tensor: Tensor) -> str:
        """What names the group that the method sees this tensor with: one for all tensors of the same group."""
        if self.over == "model" or self.view(tensor) == "model":
            return ""
        return str(self.over(tensor.name)) if callable(self.over) else tensor.name

    def view(self, tensor: Tensor) -> str:
        """What of this tensor must stay whole."""
        return self.method.view_for(tensor.params, len(tensor.shape))

    def bytes_of(self, tensor: Tensor, count: int) -> int:
        """Bytes that reading `count` elements of a tensor takes, of all models and the base."""
        return sum(count * itemsize(s.dtype(tensor.name)) for s in self.read)


def stat_name(tensor: str, key: str) -> str:
    """The name under which a statistics file holds `key` of a tensor; the empty key is the tensor's own name, and one that
    ends in a slash stands in front of it."""
    return f"{key}{tensor}" if key.endswith("/") else f"{tensor}.{key}" if key else tensor
