from fnmatch import fnmatchcase

from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, total


@method("rws", paper="arXiv:2302.12480", models=(2, None), domain={"levels": (2, 65536)})
def rws(
    models, base, group, name, *, weight: PerModel[float] = 1.0, levels: int | None = None, layers: tuple = ("*",)
):  # fmt: skip
    """Robust Weight Signatures: add to a clean model, the first, what robust ones learned at right angles to it.

    The signature of a robust model is its task vector without the part along the clean model's; stored quantised, it has
    `levels` different values in a tensor. Tensors that none of the globs `layers` names stay the clean model's.
    """
    theta, *robust = models
    # 1. task vectors
    a = theta - base
    r = [theta_n - base for theta_n in robust]
    # 2. signatures
    v = at_right_angles(r, a, group)
    # 3. quantise
    if levels is not None:
        v = [low + step * code for code, low, step in encoded(v, levels, group)]
    # 4. patch
    chosen = any(fnmatchcase(name, glob) for glob in layers)
    return theta + total(w_n * v_n for w_n, v_n in zip(weight[1:], v)) if chosen else theta


def at_right_angles(r, a, group):
    """r_n - <a, r_n> / <a, a> a: all of r_n where a is 0, which is no direction."""
    aa, *ar = group.dot((a, a), *((a, r_n) for r_n in r))
    return [r_n - (ar_n / aa if aa else 0.0) * a for r_n, ar_n in zip(r, ar)]


def encoded(v, levels, group):
    """For each signature its codes 0 ... levels - 1, the value of code 0, its least entry, and the step from code to code;
    the greatest entry has the last code, and the others the nearest, of two the even one."""
    xp = array_namespace(*v)
    ends = group.max(*v, *(-v_n for v_n in v))
    found = []
    for v_n, high, low in zip(v, ends[: len(v)], (-x for x in ends[len(v) :])):
        span = xp.full_like(v_n, high - low if high != low else 1.0)
        found.append((xp.round((v_n - low) / span * (levels - 1.0)), low, (high - low) / (levels - 1)))
    return found
