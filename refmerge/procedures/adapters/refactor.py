import numpy as np

from refmerge.adapters import Fit, chosen_rank, dtype_of, factorised, factors_of, only_products, opened, split
from refmerge.procedure import procedure


@procedure("refactor", paper="Eckart and Young, The approximation of one matrix by another of lower rank, 1936")
def refactor(adapter, *, rank=None, energy=None, scale="both"):
    """The adapter of another rank that changes the weights most nearly alike, with scaling 1: (Adapter, module -> Fit)."""
    (adapter,) = opened([adapter], "refactor")
    only_products([adapter], "refactor")
    made, fits = {}, {}
    for module, f in adapter.modules.items():
        # 1. singular value decomposition
        B, A = f.matrices()
        U, S, Vt = factorised(f.scaling * B, A, module)
        # 2. rank
        r = chosen_rank(S, rank, energy)
        # 3. factors
        new = made[module] = factors_of(*split(U[:, :r], S[:r], Vt[:r], scale), f, dtype_of(f))
        # 4. error
        B_r, A_r = new.matrices()
        error = float(np.linalg.norm(factorised(np.hstack([f.scaling * B, -B_r]), np.vstack([A, A_r]), module)[1]))
        size = float(np.linalg.norm(S))
        fits[module] = Fit(r, error, size)
    return adapter.with_modules(made), fits
