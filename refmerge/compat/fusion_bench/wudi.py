from refmerge.compat.official.wudi import gradient
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.wudi import adam
from refmerge.numeric import divided, like, scores, total


@method(
    "fusion_bench:wudi",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/wudi/wudi.py:wudi_merging",
    view=lambda ndim: "tensor" if ndim == 2 else "flat",
    domain={"iter_num": (0, 1_000_000)},
)
def wudi(models, base, name, *, iter_num: int = 300, exclude_keys: tuple = ()):
    """The authors' loop on every matrix that exclude_keys does not name; all other tensors get the mean of the
    models. The configuration has an iter_num of 400."""
    # 1. task vectors
    tau = [x - base for x in models]
    if base.ndim != 2 or name in exclude_keys:
        # 2. the mean of what is no matrix
        return base + divided(total(tau), len(tau))
    # 3. descend from the sum
    vectors = [finite(scores(x), name) for x in tau]
    merged = adam(total(vectors), lambda x: gradient(x, vectors), iter_num, 1e-5)
    # 4. add
    return base + like(merged, base)
