from refmerge.compat.official._steps import with_majority
from refmerge.compat.official.ties import agreeing, reset
from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.ties import elect
from refmerge.numeric import total


@method(
    "official:adamerging",
    paper="EnnengYang/AdaMerging@cea1165 src/ties_merging_utils.py:ties_merging_split, main_layer_wise_adamergingpp.py",
    over="model",
    domain={"K": (0.0, 100.0)},
)
def adamerging(models, base, group, *, lambdas: PerModel[float] = 0.3, K: float = 20.0):
    """What AdaMerging++ merges once it knows its coefficients: task vectors trimmed to K percent that lost the entries of
    the sign not elected, each times its own lambda, added up and not averaged."""
    # 1. task vectors
    T = [theta_n - base for theta_n in models]
    # 2. trim, to one entry more than K percent and all ties with it
    T = reset(T, group, "topk", K / 100, "official:adamerging")
    # 3. elect sign
    gamma = with_majority(elect(T), group)
    # 4. what agrees
    T = agreeing(T, gamma)
    # 5. add
    return total([base, *(lambda_n * T_n for lambda_n, T_n in zip(lambdas, T))])
