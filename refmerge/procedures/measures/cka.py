"""Centred kernel alignment: how alike two layers describe the same samples, whatever their units are called."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.procedures.measures._common import one_of

__all__ = ["cca", "cka", "cka_of_features", "cka_of_grams", "gram"]


@procedure("cka", paper="arXiv:1905.00414")
def cka(
    X: Any, Y: Any, *, kernel: Literal["linear", "rbf"] = "linear", threshold: float = 1.0, debiased: bool = False
) -> float:
    """Centred kernel alignment of two representations of the same samples, a similarity in [0, 1].

    X, Y: features, samples by units, of as many samples. kernel: "rbf" is as wide as threshold times the median distance.
    """
    one_of("cka", "kernel", kernel, "linear", "rbf")
    X, Y = features(X, Y, "cka")
    if constant(X) or constant(Y):
        return math.nan
    # 1. Gram matrices
    if kernel == "linear" and len(X) > max(X.shape[1], Y.shape[1]):
        return cka_of_features(X, Y, debiased=debiased)  # the same number, of smaller matrices
    K, L = (gram(Z, kernel=kernel, threshold=threshold) for Z in (X, Y))
    # 2. centre, and compare
    return cka_of_grams(K, L, debiased=debiased)


def gram(X: Any, *, kernel: str = "linear", threshold: float = 1.0) -> np.ndarray:
    """K_ij = k(x_i, x_j): inner products, or exp(-|x_i - x_j|^2 / (2 threshold^2 median)) with the median of all squared
    distances, those of samples to themselves among them."""
    products = scores(X) @ scores(X).T
    if kernel == "linear":
        return products
    if not threshold > 0:
        raise UsageError(f"cka: threshold = {threshold!r} is not above 0")
    squares = np.diag(products)
    distances = -2 * products + squares[:, None] + squares[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(-distances / (2 * threshold**2 * np.median(distances)))


def centred(K: np.ndarray, debiased: bool) -> np.ndarray:
    """H K H with H = 1 - 1/N; debiased, the U-centred matrix, whose diagonal is zero and whose rows sum to zero."""
    n = len(K)
    if not debiased:
        means = np.mean(K, axis=0)
        means -= np.mean(means) / 2
        return K - means[:, None] - means[None, :]
    K = K - np.diag(np.diag(K))
    means = np.sum(K, axis=0) / (n - 2)
    means -= np.sum(means) / (2 * (n - 1))
    K = K - means[:, None] - means[None, :]
    return K - np.diag(np.diag(K))


def cka_of_grams(K: Any, L: Any, *, debiased: bool = False) -> float:
    """<Kc, Lc> / (|Kc| |Lc|) of the centred matrices."""
    K, L = scores(K), scores(L)
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape != L.shape:
        raise UsageError(f"cka: Gram matrices are square and of one size, not {list(K.shape)} and {list(L.shape)}")
    for G in (K, L):
        if not np.allclose(G, G.T, equal_nan=True):
            raise UsageError("cka: a Gram matrix is symmetric, and this one is not")
    enough(len(K), debiased)
    K, L = centred(K, debiased), centred(L, debiased)
    return ratio(np.vdot(K, L), np.vdot(K, K), np.vdot(L, L))


def cka_of_features(X: Any, Y: Any, *, debiased: bool = False) -> float:
    """The linear kernel's CKA from matrices of units by units: |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred columns."""
    X, Y = features(X, Y, "cka")
    enough(len(X), debiased)
    if constant(X) or constant(Y):
        return math.nan
    X, Y = X - np.mean(X, axis=0), Y - np.mean(Y, axis=0)

    def term(A: np.ndarray, B: np.ndarray) -> float:
        value = np.sum((A.T @ B) ** 2)
        if debiased:
            n, a, b = len(A), np.sum(A**2, axis=1), np.sum(B**2, axis=1)
            value += np.sum(a) * np.sum(b) / ((n - 1) * (n - 2)) - n / (n - 2) * np.dot(a, b)
        return float(value)

    return ratio(term(X, Y), term(X, X), term(Y, Y))


def cca(X: Any, Y: Any) -> float:
    """Mean squared canonical correlation, R^2, by the smaller number of units; the columns are not centred."""
    X, Y = features(X, Y, "cca")
    Q, R = np.linalg.qr(X)[0], np.linalg.qr(Y)[0]
    return float(np.sum((Q.T @ R) ** 2) / min(X.shape[1], Y.shape[1]))


def ratio(xy: float, xx: float, yy: float) -> float:
    """xy / sqrt(xx yy); NaN where a representation does not vary, or the debiased estimate of its size is not above 0."""
    if not (xx > 0 and yy > 0):
        return math.nan
    return float(xy / (math.sqrt(xx) * math.sqrt(yy)))


def constant(X: np.ndarray) -> bool:
    """Whether all samples are alike: rounding would make something of the difference from their mean."""
    return bool(np.all(X[:1] == X))


def features(X: Any, Y: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64. UsageError unless they are matrices with a row for each of the same samples."""
    X, Y = scores(X), scores(Y)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        shapes = f"{list(X.shape)} and {list(Y.shape)}"
        raise UsageError(f"{name}: features are samples by units, of as many samples: not {shapes}")
    if 0 in (*X.shape, *Y.shape):
        raise UsageError(f"{name}: there are no features in {list(X.shape)} and {list(Y.shape)}")
    return X, Y


def enough(samples: int, debiased: bool) -> None:
    if debiased and samples < 4:
        raise UsageError(f"cka: debiased wants 4 samples or more, and there are {samples}")
