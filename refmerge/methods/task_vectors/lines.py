import math
from fnmatch import fnmatchcase

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import total


@method("lines", paper="arXiv:2410.17146", domain={"blocks": (1, math.inf)})
def lines(models, base, name, *, blocks: int, alpha: float | None = None, beta: float, layers: tuple = ("*",)):
    """LiNeS: scale a task vector, or a sum of them, by a line over depth, from alpha in the first block to alpha + beta in
    the last of `blocks`.

    What lies in no block, or is named by none of the globs `layers`, is scaled by alpha.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. scale
    alpha = 1 / len(models) if alpha is None else alpha
    scale = alpha + beta * depth(name, blocks, layers)
    # 3. add
    return base + scale * total(tau)


def depth(name, blocks, layers):
    """l / (L - 1) for a tensor of block l of L, the first number between dots in its name; 1 where there is one block."""
    numbers = [int(part) for part in name.split(".")[1:-1] if part.isdecimal()]
    if not numbers or not any(fnmatchcase(name, glob) for glob in layers):
        return 0.0
    if numbers[0] >= blocks:
        raise UsageError(
            f"lines: tensor {name!r} is of block {numbers[0]}, and {blocks} are counted from 0: blocks is too small, or the "
            "globs layers must leave this tensor out"
        )
    return numbers[0] / (blocks - 1) if blocks > 1 else 1.0
