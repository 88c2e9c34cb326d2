from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refmerge.adapters import apply_adapter, opened
from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores, total
from refmerge.procedure import procedure


@dataclass(frozen=True)
class Ensemble:
    """mean: probabilities, the last axis sums to 1. members: those of each adapter. spread: of each prediction the entropy
    of the mean less the mean entropy, in nats: 0 where all members agree."""

    mean: np.ndarray
    members: np.ndarray
    spread: np.ndarray


@procedure("ensemble_predict", paper="arXiv:2310.00035")
def ensemble_predict(base, adapters, forward, *, weights=None, average="probabilities"):
    """What an ensemble of adapters of one base predicts: an Ensemble.

    base: a path, an open checkpoint or a mapping. forward: a function of a model, name -> array, to logits of any shape with
    the classes along the last axis. One model is in memory at a time.
    """
    adapters = opened(adapters, "ensemble_predict")
    w = shares(weights, len(adapters))
    if average not in ("probabilities", "logits"):
        raise UsageError(f"ensemble_predict: average = {average!r} is none of 'probabilities', 'logits'")
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    # 1. members
    logits = [scores(forward(apply_adapter(base, adapter))) for adapter in adapters]
    if len({x.shape for x in logits}) > 1 or not logits[0].ndim:
        raise InputError(f"ensemble_predict: logits of shapes {', '.join(str(list(x.shape)) for x in logits)}")
    members = [softmax(x) for x in logits]
    # 2. mean
    averaged = members if average == "probabilities" else logits
    mean = total(w_m * x for w_m, x in zip(w, averaged))
    mean = mean if average == "probabilities" else softmax(mean)
    # 3. spread
    spread = entropy(mean) - total(w_m * entropy(p) for w_m, p in zip(w, members))
    return Ensemble(mean, np.stack(members), spread)


def shares(weights, count):
    """One for each adapter, which sum to 1."""
    w = [1.0] * count if weights is None else [float(x) for x in weights]
    if len(w) != count or min(w) < 0 or not sum(w):
        raise UsageError(f"ensemble_predict: {count} weights, none below zero and not all zero, in place of {w}")
    return [x / sum(w) for x in w]


def softmax(x):
    """exp(x) over its sum along the last axis."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def entropy(p):
    """-sum of p log p along the last axis, 0 log 0 being 0."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)
