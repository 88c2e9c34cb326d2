"""Steps that MergeLLM's methods share."""

from refmerge.compat.official._steps import at_least_kth_smallest


def without_smallest(tau, k, group):
    """0 below the k-th smallest magnitude of the tensor; all of it where k is 0, for which their code fails."""
    return at_least_kth_smallest(tau, [k] * len(tau), group, "mergellm") if k else tau
