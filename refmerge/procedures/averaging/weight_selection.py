from array_api_compat import device

from refmerge.checkpoint import Checkpoint
from refmerge.errors import UsageError
from refmerge.numeric import array_namespace
from refmerge.procedure import procedure


@procedure("weight_selection", paper="arXiv:2311.18823")
def weight_selection(large, small, *, select="uniform", leave=("head",)):
    """Initialise a small model with a subset of a larger model's weights, tensor by tensor of the same name.

    large: a checkpoint, open or a mapping name -> array. small: the same, or a mapping name -> shape; only its names and
    shapes are looked at. select: "uniform" or "consecutive" places of each axis. leave: parts of names; tensors with one of
    them in their name are not selected and are not in the result. Returns a mapping name -> array of large's library.
    """
    if select not in ("uniform", "consecutive"):
        raise UsageError(f"weight_selection: select = {select!r} is none of 'uniform', 'consecutive'")
    places = uniform if select == "uniform" else consecutive
    # 1. layers
    wanted = {name: m for name, m in shapes(small).items() if not any(part in name for part in leave)}
    given = shapes(large)
    for name, m in wanted.items():
        check(name, given.get(name), m)
    # 2. entries
    return {name: at_places(name, large[name], m, places) for name, m in wanted.items()}


def shapes(model):
    """name -> shape, without reading a weight."""
    tensors = model.tensors if isinstance(model, Checkpoint) else model
    return {name: tuple(getattr(x, "shape", x)) for name, x in tensors.items()}


def check(name, n, m):
    """UsageError unless a tensor of shape m can be selected from one of shape n."""
    if n is None:
        raise UsageError(f"weight_selection: the larger model has no tensor {name!r}; leave can name what is not selected")
    if len(n) != len(m) or any(a < b for a, b in zip(n, m)):
        raise UsageError(
            f"weight_selection: tensor {name!r} of shape {list(m)} cannot be selected from {list(n)}: no axis may grow; "
            "leave can name what is not selected"
        )


def at_places(name, x, m, places):
    """The entries of x at the places of each axis, a copy. UsageError where that would cut a tensor of integers."""
    xp, n = array_namespace(x), tuple(x.shape)
    if n == m:
        return xp.asarray(x, copy=True)
    if "float" not in str(x.dtype):
        raise UsageError(
            f"weight_selection: tensor {name!r} holds {x.dtype} and is {list(m)} in place of {list(n)}: places in a table "
            "are no weights to select; leave can name it"
        )
    for axis in range(len(n)):
        if n[axis] != m[axis]:
            chosen = xp.asarray(places(n[axis], m[axis]), dtype=xp.int64, device=device(x))
            x = xp.take(x, chosen, axis=axis)
    return x


def uniform(n, m):
    """m of n places, as far apart as can be: the multiples of n / m where that is whole, else k (n - 1) / (m - 1) to the
    nearest whole number, halves to the even one."""
    if m == 0 or n % m == 0:
        return [k * (n // m) for k in range(m)]
    return [nearest(k * (n - 1), m - 1) for k in range(m)]


def nearest(a, b):
    """a / b to the nearest whole number, halves to the even one."""
    whole, rest = divmod(a, b)
    return whole + (2 * rest > b or (2 * rest == b and whole % 2 == 1))


def consecutive(n, m):
    """The first m of n places."""
    return list(range(m))
