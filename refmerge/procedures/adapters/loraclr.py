from collections.abc import Mapping

import numpy as np

from refmerge.adapters import listed, only_products, opened, same_modules
from refmerge.adaptive import Adam
from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, rounded


@procedure("loraclr", paper="arXiv:2412.09622")
def loraclr(
    base,
    adapters,
    inputs,
    *,
    alpha=1.0,
    iterations=50,
    learning_rate=1e-4,
    weight_decay=1e-4,
    margin=0.5,
    lambda_con=1.0,
    lambda_mse=0.1,
    lambda_reg=0.001,
):
    """One weight a layer that answers each concept's inputs as that concept's adapter does: a mapping `<module>.weight` ->
    array, for all modules of the adapters.

    base: a path, an open checkpoint or a mapping. inputs: for each adapter a mapping module -> its inputs there, N x in, or
    a pair of these and recorded outputs, N x out, less the bias.
    """
    adapters = opened(adapters, "loraclr")
    only_products(adapters, "loraclr")
    check(adapters, inputs, iterations)
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    merged = {}
    for module in same_modules(adapters, "loraclr"):
        name = f"{module}.weight"
        if name not in base:
            raise InputError(f"loraclr: the base has no {name!r}")
        W = scores(base[name])
        if W.ndim != 2:
            raise InputError(f"loraclr: tensor {name!r} is {list(W.shape)}; only matrices are fitted")
        # 1. targets
        X, V = recorded(W, adapters, inputs, module, alpha)

        # 2. objective
        def objective(D, W=W, X=X, V=V):
            return loss(X @ (W + D).T, V, D, X, margin, lambda_con, lambda_mse, lambda_reg)

        # 3. steps
        optimiser, x, state = Adam(learning_rate, weight_decay=weight_decay), {"D": np.zeros_like(W)}, {}
        lowest, best = np.inf, None
        for _ in range(iterations):
            value, gradient = objective(x["D"])
            if value < lowest:
                lowest, best = value, x["D"]
            x, state = optimiser.step(x, {"D": gradient}, state)
        if best is None:
            raise InputError(f"loraclr: module {module!r}: the loss is infinite or NaN from the start")
        merged[name] = rounded(W + best, dtype_name(base[name], name))
    return merged


def check(adapters, inputs, iterations):
    """UsageError for what cannot be meant."""
    if len(inputs) != len(adapters):
        raise UsageError(f"loraclr: inputs of {len(inputs)} concepts for {len(adapters)} adapters")
    if type(iterations) is not int or iterations < 1:
        raise UsageError(f"loraclr: iterations = {iterations!r} is no positive whole number")


def recorded(W, adapters, inputs, module, alpha):
    """X and V, concepts x N x in and out: inputs, and W + alpha B A's answers where no outputs came with them."""
    X, V = [], []
    for n, (adapter, given) in enumerate(zip(adapters, inputs)):
        if module not in given:
            raise InputError(f"loraclr: no inputs of module {module!r} for concept {n}")
        pair = given[module] if isinstance(given[module], tuple | list) else (given[module], None)
        change = adapter.delta(module)
        if change.shape != W.shape:
            raise InputError(
                f"loraclr: module {module!r} of adapter {n} is {list(change.shape)}, the base's {list(W.shape)}"
            )
        x = scores(pair[0])
        if x.ndim != 2 or x.shape[1] != W.shape[1]:
            raise InputError(f"loraclr: inputs of module {module!r}, concept {n}: {list(x.shape)}, not N x {W.shape[1]}")
        X.append(x)
        V.append(x @ (W + alpha * change).T if pair[1] is None else scores(pair[1]))
    if len({x.shape for x in X}) > 1 or any(v.shape != (*x.shape[:1], len(W)) for x, v in zip(X, V)):
        some = listed(list(x.shape) for x in X)
        raise InputError(f"loraclr: module {module!r}: concepts need equally many inputs, and an output for each: {some}")
    return np.stack(X), np.stack(V)


def loss(K, V, D, X, margin, lambda_con, lambda_mse, lambda_reg):
    """The objective and its gradient in D."""
    C = len(K)
    k, t = K.reshape(C, -1), V.reshape(C, -1)
    squares = np.sum(k * k, 1)[:, None] + np.sum(t * t, 1)[None] - 2 * k @ t.T
    d = np.sqrt(np.maximum(squares, 1e-12))
    others = np.where(np.eye(C, dtype=bool), np.inf, d)
    nearest = np.argmin(others, axis=1)
    hinge = np.maximum(margin - np.min(others, axis=1), 0.0)
    value = lambda_con * np.mean(np.diag(d) ** 2 + hinge**2) + lambda_mse * np.mean((K - V) ** 2)
    value += lambda_reg * np.linalg.norm(D)
    # The gradient in the answers: towards the own targets, away from the nearest others, where these are too near.
    pull = 2 * (k - t) * (np.diag(squares) >= 1e-12)[:, None]
    at = np.arange(C), nearest
    push = np.where(squares[at] >= 1e-12, -2 * hinge / d[at], 0.0)[:, None] * (k - t[nearest])
    g = lambda_con / C * (pull + push) + lambda_mse * 2 / K.size * (k - t)
    gradient = np.einsum("cno,cni->oi", g.reshape(K.shape), X)
    norm = np.linalg.norm(D)
    return value, gradient + (lambda_reg / norm * D if norm else 0.0)
