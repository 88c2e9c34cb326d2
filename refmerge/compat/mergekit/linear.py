from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, total


@method("mergekit:linear", paper="mergekit 0.1.5 linear.py", widens=True)
def linear(models, *, weight: PerModel[float], normalize: bool = True):
    """Weighted sum, divided by the sum of the weights as it rounds in the tensors' precision; 0 divides without a guard."""
    # 1. add
    mixed = total(w * x for w, x in zip(weight, models))
    # 2. normalise
    if not normalize:
        return mixed
    one = array_namespace(mixed).ones_like(mixed[:1])
    return mixed / total(w * one for w in weight)
