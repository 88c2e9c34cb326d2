from itertools import combinations

import numpy as np

from refmerge.method import method
from refmerge.methods.task_vectors.model_stock import inner
from refmerge.numeric import like, mean


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
    # 2. mean cosine
    pairs = list(combinations(range(len(delta)), 2))
    norms = [np.sqrt(xx) for xx in inner([(d, d) for d in delta], group, filter_wise)]
    dots = inner([(delta[i], delta[j]) for i, j in pairs], group, filter_wise)
    cosines = [np.clip(d / np.maximum(norms[i] * norms[j], 1e-6), -1, 1) for d, (i, j) in zip(dots, pairs)]
    c = sum(cosines) / len(cosines)
    # 3. interpolation ratio, 0 near its pole
    pole = 1 + (len(models) - 1) * c
    t = np.where(np.abs(pole) < 1e-6, 0.0, len(models) * c / np.where(np.abs(pole) < 1e-6, 1.0, pole))
    # 4. interpolate
    t = like(t, base)[..., None] if filter_wise else float(t)
    return t * mean(models) + (1 - t) * base
