"""Steps that mergekit's nuslerp, multislerp and karcher share (mergekit 0.1.5).

In 16 bits every operation rounds, and much of the result is rounding: there the tensors themselves are asked about, one step
after another, as mergekit does. Else the inner products of the inputs tell all in one pass, up to the tensors' precision.
"""

import numpy as np

from refmerge.numeric import at_least_float32, at_precision, total


def in_sixteen_bits(x):
    """Whether these arrays are rounded to 16 bits after each operation."""
    return str(x.dtype).endswith("float16")


def at(value, xs):
    """Host numbers, rounded to the precision of tensors."""
    return at_precision(np.asarray(value), xs[0])


def norms(group, *xs):
    """|x| of each, their squares not rounded to 16 bits."""
    wide = [at_least_float32(x) for x in xs]
    return np.sqrt(dots(group, *zip(wide, wide)))


def dots(group, *pairs):
    return np.atleast_1d(group.dot(*pairs))


def length(c, G):
    """|sum_n c_n x_n| of vectors whose inner products are G."""
    square = total(c_i * c_j * g for c_i, row in zip(c, G) for c_j, g in zip(c, row))
    return np.sqrt(np.maximum(square, 0.0))
