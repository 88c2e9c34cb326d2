"""Steps of the LoRA half of DC-Merge's code, whose tensors are all matrices of a known rank."""

from refmerge.numeric import like, mean


def changes(models, base):
    """Task vectors; without a base the models themselves are."""
    return list(models) if base is None else [theta_t - base for theta_t in models]


def kept_rank(Delta, rank_per_task):
    """How many triplets of each task are kept: rank_per_task, and as many as fit where their code fails."""
    return min(rank_per_task, max(1, min(Delta[0].shape) // len(Delta)))


def merged(base, Delta, change=None):
    """The base, if there is one, and the change, by default the mean of the task vectors."""
    change = mean(Delta) if change is None else like(change, Delta[0])
    return change if base is None else base + change
