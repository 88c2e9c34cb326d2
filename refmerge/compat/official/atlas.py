import numpy as np

from refmerge.method import PerModel, method
from refmerge.numeric import host, like


@method("official:atlas", paper="fredzzhang/atlas@557d7fb src/composition.py:WeightedImageEncoder", view="tensor")
def atlas(models, base, *, coef: PerModel[float] = 0.0):
    """What aTLAS merges once it knows its coefficients: task vectors, products and sums are rounded to float16, those of
    tensors without axes alone to float32."""
    # 1. task vectors
    tau = [half(theta_n - base) for theta_n in models]
    # 2. scale and add
    rounded = half if base.ndim else (lambda x: x)
    coef = [float(np.float32(c_n)) for c_n in coef]
    delta = rounded(coef[0] * tau[0])
    for c_n, tau_n in zip(coef[1:], tau[1:]):
        delta = rounded(delta + rounded(c_n * tau_n))
    return base + delta


def half(x):
    """x rounded to float16."""
    with np.errstate(over="ignore"):
        return like(host(x).astype(np.float16).astype(host(x).dtype), x)
