"""Blocks whose operations are noted down and computed in one pass: graph.py the arrays, program.py the C, compiler.py."""

from refmerge.fused import support
from refmerge.fused.graph import Lazy, compute, leaf, mask, run, store, stretch_sums
from refmerge.fused.program import LANES, LEAF, NARROW, STRETCH

__all__ = [
    "LANES",
    "LEAF",
    "NARROW",
    "STRETCH",
    "Lazy",
    "compute",
    "leaf",
    "mask",
    "run",
    "store",
    "stretch_sums",
    "support",
]
