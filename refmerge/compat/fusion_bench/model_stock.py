import math
from itertools import combinations

import numpy as np

from refmerge.compat.fusion_bench._steps import float32_sum
from refmerge.method import method
from refmerge.numeric import divided, host, total


@method(
    "fusion_bench:model_stock",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/model_stock/model_stock.py",
    models=(2, None),
    view="tensor",
)
def model_stock(models, base, name, *, ignore_keys: tuple = ()):
    """Model Stock with the mean of the pairwise angles, found in float32 whatever the weights' precision; 1e-8 is added to
    both denominators. Tensors of ignore_keys are averaged."""
    N = len(models)
    average = divided(total(models), N)
    if name in ignore_keys:
        return average
    # 1. task vectors
    delta = [host(x - base).astype(np.float32) for x in models]
    # 2. angle between each two in degrees, averaged
    theta = [angle(x, y) for x, y in combinations(delta, 2)]
    cos = np.cos(np.deg2rad(sum(theta) / len(theta)))
    # 3. interpolation ratio
    r = float(N * cos / ((N - 1) * cos + 1 + 1e-8))
    # 4. interpolate
    return r * average + (1 - r) * base


def angle(x, y):
    xy, xx, yy = (float32_sum(a * b) for a, b in ((x, y), (x, x), (y, y)))
    c = np.clip(xy / np.float32(math.sqrt(xx * yy) + 1e-8), -1, 1)
    return np.rad2deg(np.float64(np.float32(math.acos(c))))
