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

    # 2. mean cosine of neighbours
    def p(x):
        return at_precision(x, base)

    unit = [directions(x, cos_eps) for x in rows]
    cosines = [p(host(tree_sum(x * y, axis=-1))) for x, y in pairwise(unit)]
    N, c = len(models), p(sum(cosines) / len(cosines))
    # 3. interpolation ratio
    t = like(p(p(N * c) / p(1 + p((N - 1) * c))), base)[..., None]
    # 4. interpolate
    merged = finite(t * divided(total(rows), N))
    return base + array_namespace(base).reshape(merged, base.shape)


def as_rows(x):
    return array_namespace(x).reshape(x, (1,)) if x.ndim == 0 else x


def directions(x, eps):
    """Rows divided by their lengths, by eps where these are smaller."""
    return x / like(np.maximum(np.sqrt(host(tree_sum(x * x, axis=-1))), eps), x)[..., None]
