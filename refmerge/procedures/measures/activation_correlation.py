"""Correlations of the units of two networks: whether units that are to be averaged do the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from refmerge.procedure import procedure
from refmerge.procedures.measures.cka import features

__all__ = ["Correlation", "activation_correlation"]


@dataclass(frozen=True)
class Correlation:
    """matrix: of the units of one (rows) with those of the other. aligned: the mean of its diagonal, of units with the same
    number; None where there are not as many. matched: its mean over the best one-to-one matching. best: the mean of its
    rows' maxima. match: the unit of the other that each unit is matched to, -1 for none. constant: how many units of
    either do not vary."""

    matrix: np.ndarray
    aligned: float | None
    matched: float
    best: float
    match: np.ndarray
    constant: tuple[int, int]


@procedure("activation_correlation", paper="arXiv:1511.07543")
def activation_correlation(X: Any, Y: Any) -> Correlation:
    """Pearson correlations of the units of two networks on the same samples, and how well units correspond.

    X, Y: activations, samples by units, of as many samples.
    """
    X, Y = features(X, Y, "activation_correlation")
    # 1. standardise
    (A, constant), (B, other) = standardised(X), standardised(Y)
    # 2. correlate
    C = np.clip(A.T @ B, -1.0, 1.0)
    # 3. match
    rows, columns = linear_sum_assignment(C, maximize=True) if np.isfinite(C).all() else (np.arange(0), np.arange(0))
    match = np.full(C.shape[0], -1)
    match[rows] = columns
    # 4. means
    aligned = float(np.mean(np.diag(C))) if C.shape[0] == C.shape[1] else None
    matched = float(np.mean(C[rows, columns])) if len(rows) else float("nan")
    return Correlation(C, aligned, matched, float(np.mean(C.max(axis=1))), match, (constant, other))


def standardised(X: np.ndarray) -> tuple[np.ndarray, int]:
    """Columns of mean 0 and length 1, and how many do not vary; those are zero."""
    constant = np.max(X, axis=0) == np.min(X, axis=0)
    X = np.where(constant, 0.0, X - np.mean(X, axis=0))
    length = np.sqrt(np.sum(X**2, axis=0))
    return X / np.where(constant, 1.0, length), int(np.count_nonzero(constant))
