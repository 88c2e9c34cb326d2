from refmerge.compat.sd_mecha._steps import over_count
from refmerge.method import method
from refmerge.numeric import array_namespace, divided, total


@method(
    "sd_mecha:dare_linear",
    paper="ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:dropout",
    widens=True,
    stats={"mask": "draw"},
    domain={"probability": (0.0, 1.0)},
)
def dare_linear(models, base, rng, *, probability: float = 0.9, rescale: float = 1.0, alpha: float = 0.5):
    """Drop with a probability, average the models that kept an entry, divide by (1 - probability) to the power `rescale`.
    Masks that overlap as little or as much as is asked for, their `overlap`, can be recorded."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop and average
    masks = [rng.keep(1 - probability, model=n) for n in range(len(delta))]
    merged = mean_of_kept(delta, masks)
    # 3. rescale
    c = 1.0 if probability == 1 else (1 - probability) ** rescale
    return base + alpha * divided(merged, c)


def mean_of_kept(delta, masks):
    """What is dropped leaves no trace, not even of an infinity."""
    xp, count = array_namespace(*delta), total(masks)
    kept = total(xp.where(m > 0, d, xp.zeros_like(d)) for m, d in zip(masks, delta))
    return over_count(kept, count)
