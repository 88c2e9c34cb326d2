from itertools import combinations

import numpy as np

from refmerge.compat.mergekit._sphere import in_sixteen_bits
from refmerge.method import method
from refmerge.methods.task_vectors.model_stock import inner_products
from refmerge.numeric import at_least_float32, at_precision, divided, like, total


@method(
    "mergekit:model_stock",
    paper="mergekit 0.1.5 model_stock.py",
    models=(2, None),
    view=lambda filter_wise: "tensor" if filter_wise else "flat",
)
def model_stock(models, base, group, *, filter_wise: bool = False):
    """Model Stock with the mean of the pairwise cosines, whose norms' product is at least 1e-6."""
    # 1. task vectors
    delta = [x - base for x in models]
    filter_wise = filter_wise and base.ndim > 0  # a number is its own only row
    # 2. mean cosine; tensors of the weights' precision hold these numbers
    def p(x):
        return at_precision(x, base)

    c = mean_cosine(delta, group, filter_wise, p)
    # 3. interpolation ratio, 0 near its pole
    pole = p(1 + p((len(models) - 1) * c))
    singular = np.abs(pole) < 1e-6
    t = p(np.where(singular, 0.0, p(len(models) * c) / np.where(singular, 1.0, pole)))
    # 4. interpolate
    s = p(1 - t)
    s, t = (like(x, base)[..., None] if filter_wise else float(x) for x in (s, t))
    average = divided(total(models), len(models))
    return t * average + s * base


def mean_cosine(delta, group, filter_wise, p):
    """Of each two task vectors, over the tensor or for each row; p rounds to the precision in which a tool keeps these.

    In 16 bits the products of a dot are rounded before they are added, and the squares of a norm are not."""
    pairs = list(combinations(range(len(delta)), 2))
    squares, dots = inner_products(list(map(at_least_float32, delta)), pairs, group, filter_wise)
    if in_sixteen_bits(delta[0]):
        _, dots = inner_products(delta, pairs, group, filter_wise)
    norms = [p(np.sqrt(xx)) for xx in squares]
    cosines = [np.clip(p(p(d) / np.maximum(p(norms[i] * norms[j]), 1e-6)), -1, 1) for d, (i, j) in zip(dots, pairs)]
    return p(sum(cosines) / len(cosines))
