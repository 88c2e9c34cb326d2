# Longer than others: three operators, four starts, one conjugate gradient for all of them, and the direct solution.
import math
from typing import Literal

import numpy as np

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.data_driven.regmean import check_sizes, definite, matrices, oriented, restored, shrunk
from refmerge.numeric import mean, total

LARGEST = 4096  # unknowns up to which a system that couples all entries of a weight is solved directly


@method(
    "mats",
    paper="arXiv:2312.04339",
    view="tensor",
    work="float64",
    stats={"gram": "whole", "gradient_gram": "whole", "fisher": "element"},
    needs="models",
    domain={
        "iterations": (0, math.inf), "off_diagonal": (0.0, 1.0), "tolerance": (0.0, math.inf),
    },
)  # fmt: skip
def mats(
    models,
    stats,
    name,
    base=None,
    *,
    objective: Literal["kfac", "gram", "fisher"] = "kfac",
    iterations: int = 100,
    start: Literal["average", "base", "task_arithmetic", "zero"] = "average",
    lambda_: float = 0.3,
    off_diagonal: float = 1.0,
    tolerance: float = 1e-5,
    solver: Literal["cg", "direct"] = "cg",
    layout: Literal["out_in", "in_out"] = "out_in",
):
    """Matching models in their task parameter subspaces: (sum_n C_n) x = sum_n C_n x_n, by conjugate gradients.

    C_n says which directions matter to model n. Stopped early, the result stays near the start where nothing matters.
    """
    W = [oriented(theta_n, layout) for theta_n in models]
    # 1. operators
    C = operators(objective, stats, name, models, layout, off_diagonal)
    if not C:
        # 2. no statistics: average
        return mean(models)
    # 3. right-hand side
    B = total(C_n(W_n) for C_n, W_n in zip(C, W))
    if solver == "direct":
        # 4. solve directly
        merged = direct(C, B, name)
    else:
        # 5. start
        X = started(start, W, None if base is None else oriented(base, layout), lambda_)
        # 6. conjugate gradients
        merged = conjugate_gradients(lambda X: total(C_n(X) for C_n in C), B, X, iterations, tolerance)
    return restored(merged, models[0], layout)


class Diagonal:
    """X -> F X, entry by entry."""

    def __init__(self, F):
        self.F = F

    def __repr__(self):
        return "X -> F X"

    def __call__(self, X):
        return self.F * X


class Gram:
    """X -> X G, G of the inputs."""

    def __init__(self, G):
        self.G = G

    def __repr__(self):
        return "X -> X G"

    def __call__(self, X):
        return X @ self.G


class KFAC:
    """X -> H X G, G of the inputs and H of the gradients of the outputs."""

    def __init__(self, G, H):
        self.G, self.H = G, H

    def __repr__(self):
        return "X -> H X G"

    def __call__(self, X):
        return self.H @ X @ self.G


def operators(objective, stats, name, models, layout, off_diagonal):
    """One operator a model on weights (out, in); nothing where no model has statistics for one."""
    if objective == "fisher":
        F = [s["fisher"] for s in stats if "fisher" in s]
        if F and len(F) < len(stats):
            lacking = next(n for n, s in enumerate(stats) if "fisher" not in s)
            raise UsageError(f"tensor {name!r}: stats of model {lacking} lack its 'fisher', others have it")
        return [Diagonal(oriented(F_n, layout)) for F_n in F]
    out, inputs = oriented(models[0], layout).shape
    G = [shrunk(G_n, off_diagonal) for G_n in matrices(stats, "gram", name, models)]
    check_sizes(G, inputs, name, "gram")
    if objective == "gram":
        return [Gram(G_n) for G_n in G]
    H = [shrunk(H_n, off_diagonal) for H_n in matrices(stats, "gradient_gram", name, models)]
    check_sizes(H, out, name, "gradient_gram")
    return [KFAC(G_n, H_n) for G_n, H_n in zip(G, H)]


def started(start, W, W_0, lambda_):
    """The point from which the iteration starts. UsageError where it needs a base that is not there."""
    if start == "average":
        return mean(W)
    if start == "zero":
        return np.zeros_like(W[0])
    if W_0 is None:
        raise UsageError(f"mats: start = {start!r} needs a base model: give base=")
    return W_0 if start == "base" else W_0 + lambda_ * total(W_n - W_0 for W_n in W)


def conjugate_gradients(A, B, X, iterations, tolerance):
    """Solve A(X) = B from X, until the residual is below tolerance |B|: one step length for all entries of a matrix."""
    if not np.any(B):
        return B
    enough = tolerance * np.linalg.norm(B)
    R = B - A(X) if np.any(X) else B
    P, before = R, None
    for _ in range(iterations):
        rho = np.vdot(R, R)
        if rho == 0 or np.sqrt(rho) < enough:
            break
        P = R if before is None else R + (rho / before) * P
        Q = A(P)
        step = rho / np.vdot(P, Q)
        X, R, before = X + step * P, R - step * Q, rho
    return X


def direct(C, B, name):
    """The solution itself. UsageError where there is more than one, or the system is too large to be written down."""
    if isinstance(C[0], Diagonal):
        F = total(C_n.F for C_n in C)
        if np.any(F == 0):
            at = [int(i) for i in np.argwhere(F == 0)[0]]
            raise UsageError(
                f"tensor {name!r}: its Fisher information is 0 in all models at {at}; solver='cg' keeps the start"
            )
        return B / F
    if isinstance(C[0], Gram):
        return np.linalg.solve(definite(total(C_n.G for C_n in C), name, "solver='cg'"), B.T).T
    if B.size > LARGEST:
        raise UsageError(f"tensor {name!r}: solver='direct' is for up to {LARGEST} entries, and it has {B.size}: use 'cg'")
    S = definite(total(np.kron(C_n.H, C_n.G) for C_n in C), name, "solver='cg'")
    return np.linalg.solve(S, B.reshape(-1)).reshape(B.shape)
