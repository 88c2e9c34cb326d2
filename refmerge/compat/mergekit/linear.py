from refmerge.compat.mergekit._sphere import in_sixteen_bits
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, at_precision, in_float32, in_float64, total


@method("mergekit:linear", paper="mergekit 0.1.5 linear.py")
def linear(models, *, weight: PerModel[float], normalize: bool = True):
    """Weighted sum, divided by the sum of the weights as it rounds in the tensors' precision; 0 divides without a guard."""
    # 1. add
    mixed = fused(weight, models) if in_sixteen_bits(models[0]) else total(w * x for w, x in zip(weight, models))
    # 2. normalise
    if not normalize:
        return mixed
    one = array_namespace(mixed).ones_like(mixed[:1])
    return mixed / total(w * one for w in weight)


def fused(weight, models):
    """The sum in float32, where each product is added before it is rounded: float64 has all digits of the product."""
    first = in_float32(models[0])
    mixed = array_namespace(first).zeros_like(first)
    for w, x in zip(weight, models):
        mixed = in_float32(in_float64(mixed) + at_precision(w, mixed) * in_float64(x))
    return mixed
