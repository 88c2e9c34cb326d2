"""Steps that FusionBench's methods share."""

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import host, total


def refuse_removal(remove_keys, name):
    """UsageError: their code puts the merged transformer.shared.weight where it has removed something."""
    if remove_keys:
        raise UsageError(f"{name}: remove_keys is not supported; leave tensors that are tied to another out of the files")


def float32_sum(x):
    """The sum in float32, in the order in which torch adds on one thread of a CPU: four vectors of eight numbers at a time,
    and sixteen of these steps before they are added to the sums of earlier ones."""
    x = host(x).reshape(-1).astype(np.float32)
    lanes = 8 if x.size >= 8 else 1
    vectors = x[: x.size // lanes * lanes].reshape(-1, lanes)
    fours = vectors[: len(vectors) // 4 * 4].reshape(-1, 4, lanes)
    sums = _in_steps(fours)
    sums[0] = total([sums[0], *vectors[4 * len(fours) :]])
    return total([np.float32(0), *x[vectors.size :], *total(sums)])


def _in_steps(rows):
    step, levels = 1 << max(4, (len(rows) - 1).bit_length() // 4), []
    for _ in range(3):
        whole = len(rows) // step * step
        levels.append(np.add.reduce(rows[whole:], axis=0))
        rows = np.add.reduce(rows[:whole].reshape(-1, step, *rows.shape[1:]), axis=1)
    return total([*levels, np.add.reduce(rows, axis=0)])


def refuse_shuffle(shuffle_order, name):
    """UsageError: the tool draws the order from a state that the whole program shares."""
    if shuffle_order:
        raise UsageError(f"{name}: shuffle_order is not supported; give the models in the order that the tool drew")


def owned_by_leaf(name, names):
    """Whether the module that a tensor belongs to has no modules with tensors below it."""
    prefix = name.rpartition(".")[0]
    below = prefix + "." if prefix else ""
    return not any(n.startswith(below) and "." in n[len(below) :] for n in names)
