from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import total


@method("official:lines", paper="wang-kee/LiNeS@43a7bdd src/eval/eval.py:LiNeS_scaling")
def lines(models, base, name, *, alpha: float, beta: float, num_blocks: int = 12):
    """A tensor is of the first of the blocks 0, 1, ... whose number stands between dots anywhere in its name; from
    num_blocks on it is of none. Several models are added first."""
    if num_blocks < 2:
        raise UsageError(
            f"official:lines: num_blocks = {num_blocks}, with which the authors' code divides by 0 or has no blocks"
        )
    # 1. task vector
    tau = total(theta_n - base for theta_n in models)
    # 2. scale
    layer = next((i for i in range(num_blocks) if f".{i}." in name), None)
    scale = alpha if layer is None else alpha + beta * (layer / (num_blocks - 1))
    # 3. add
    return base + tau * scale
