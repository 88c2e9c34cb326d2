"""Steps that stores of fine-tunes share."""

from refmerge.block import report_nonfinite
from refmerge.checkpoint import same_or_inside
from refmerge.errors import InputError, UsageError
from refmerge.sources import NotFinite, Scratch


def refuse(plan, base, out):
    """InputError where models and base have not the same tensors, UsageError for an output that lies in an input."""
    for s in plan.work.models:
        if odd := sorted(s.names() ^ {*base}):
            raise InputError(f"tensor {odd[0]!r} is not in both {s.label} and the base: they must have the same tensors")
    for c in plan.checkpoints:
        if same_or_inside(out, c.path):
            raise UsageError(f"output {str(out)!r} lies in an input, {str(c.path)!r}: inputs are never written to")


def read(plan, tensor):
    """A whole tensor of each model and of the base, flat, in the dtype that it is computed in."""
    found, strict = [], plan.work.nonfinite == "error"
    for source in [*plan.work.models, plan.work.base]:
        try:
            found.append(source.load(tensor.name, 0, tensor.size, tensor.work, 0, Scratch(), finite=strict))
        except NotFinite:
            report_nonfinite(source, tensor)
    return found[:-1], found[-1]
