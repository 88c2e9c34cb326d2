from itertools import pairwise

import numpy as np

from refmerge.compat.sd_mecha._steps import finite
from refmerge.method import method
from refmerge.numeric import array_namespace, at_precision, divided, host, like, total, tree_sum


@method(
    "sd_mecha:model_stock",
    paper="ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:model_stock",
    widens=True,
    models=(2, None),
    view="tensor",
)
def model_stock(models, base, *, cos_eps: float = 1e-6):
    """Model Stock for each row of the last axis, with the mean of the cosines of neighbours in the list. At the ratio's pole
    NaN becomes 0 and an infinity the largest number."""
    # 1. task vectors, in rows
    rows = [as_rows(x - base) for x in models]
    # 2. interpolation ratio
    t = stock_ratio(rows, cos_eps)
    # 3. interpolate
    merged = finite(t * divided(total(rows), len(models)))
    return base + array_namespace(base).reshape(merged, base.shape)


def stock_ratio(rows, cos_eps):
    """For each row N c / (1 + (N - 1) c), where c is the mean cosine of neighbours in the list."""

    def p(x):
        return at_precision(x, rows[0])

    unit = [directions(x, cos_eps) for x in rows]
    cosines = [p(host(tree_sum(x * y, axis=-1))) for x, y in pairwise(unit)]
    N, c = len(rows), p(sum(cosines) / len(cosines))
    return like(p(p(N * c) / p(1 + p((N - 1) * c))), rows[0])[..., None]


def as_rows(x):
    return array_namespace(x).reshape(x, (1,)) if x.ndim == 0 else x


def directions(x, eps):
    """Rows divided by their lengths, by eps where these are smaller."""
    return x / like(np.maximum(np.sqrt(host(tree_sum(x * x, axis=-1))), eps), x)[..., None]
