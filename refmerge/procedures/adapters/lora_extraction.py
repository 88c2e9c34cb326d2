import re
from collections.abc import Mapping

import numpy as np

from refmerge.adapters import Adapter, Factors, Fit, chosen_rank, finite, leading, listed, split
from refmerge.checkpoint import FLOATS, open_checkpoint, promote
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, rounded

STRETCH = 1 << 20  # entries that are compared at a time


@procedure("lora_extraction", paper="arcee-ai/mergekit@a6e4028 mergekit/scripts/extract_lora.py")
def lora_extraction(
    model,
    base,
    *,
    rank=None,
    energy=None,
    threshold=0.0,
    scale="both",
    only="",
    embeddings=(),
    fan_in_fan_out=False,
    rest="error",
    arithmetic="round_once",
    randomized=False,
    oversample=8,
    iterations=2,
    seed=0,
):
    """A LoRA adapter that comes as near as its rank allows to what fine-tuning changed: (Adapter, module -> Fit).

    model, base: a path, an open checkpoint, or a mapping name -> array.
    """
    model, base = (x if isinstance(x, Mapping) else open_checkpoint(x) for x in (model, base))
    check(scale, rest, arithmetic, randomized, rank)
    if odd := sorted({*model} ^ {*base}):
        raise InputError(f"lora_extraction: not in both model and base: {listed(odd)}")
    modules, fits, saved, others = {}, {}, {}, []
    for name in sorted(base):
        x, y = model[name], base[name]
        if tuple(x.shape) != tuple(y.shape):
            raise InputError(f"tensor {name!r} is {list(x.shape)} in the model and {list(y.shape)} in the base")
        module = name.removesuffix(".weight")
        is_float = {dtype_name(x, name), dtype_name(y, name)} <= FLOATS
        if not (is_float and module != name and x.ndim > 1 and re.search(only, module)):
            if not same(x, y):
                others.append(name)
            continue
        dtype = promote({dtype_name(x, name), dtype_name(y, name)})
        # 1. task vector
        tau = scores(x) - scores(y)
        tau = scores(rounded(tau, dtype)) if arithmetic == "native" else tau
        finite(tau, module)
        table = name in embeddings or module in embeddings
        turned = tau.T if table or (fan_in_fan_out and tau.ndim == 2) else tau
        D = turned.reshape(len(turned), -1)
        # 2. singular value decomposition
        if randomized:
            U, S, Vt = sketched(D, rank + oversample, iterations, [seed, *name.encode()])
        else:
            U, S, Vt = leading(D, None if threshold else rank)
        # 3. rank
        r = chosen_rank(S, rank, energy)
        r = min(r, int(np.sum(threshold < S))) if threshold else r
        # 4. factors
        B, A = split(U[:, :r], S[:r], Vt[:r], scale)
        B, A = B.reshape(*B.shape, *[1] * (turned.ndim - 2)), A.reshape(r, *turned.shape[1:])
        f = modules[module] = Factors(rounded(A, dtype), rounded(B, dtype), embedding=table)
        # 5. error
        error, size = float(np.linalg.norm(D - f.product())), float(np.linalg.norm(D))
        fits[module] = Fit(r, error, size)
    if others and rest == "error":
        raise InputError(
            f"lora_extraction: {listed(others)} changed and are no matrices that are extracted; rest='save' (--rest save) "
            "keeps them whole in the adapter, rest='skip' loses the change"
        )
    if rest == "save":
        saved = {name: as_stored(model[name], name) for name in others}
        if bad := [n for n in others if "." not in n or dtype_name(model[n], n) not in FLOATS]:
            raise InputError(f"lora_extraction: {listed(bad)} are no weights of a module and cannot be saved in an adapter")
    return Adapter(modules, {"fan_in_fan_out": fan_in_fan_out}, saved), fits


def check(scale, rest, arithmetic, randomized, rank):
    """UsageError for what cannot be meant."""
    for key, value, choices in (
        ("scale", scale, ("both", "A", "B")),
        ("rest", rest, ("error", "skip", "save")),
        ("arithmetic", arithmetic, ("round_once", "native")),
    ):
        if value not in choices:
            raise UsageError(f"lora_extraction: {key} = {value!r} is none of {', '.join(map(repr, choices))}")
    if randomized and rank is None:
        raise UsageError(
            "lora_extraction: randomized needs rank: the energy of singular values that are not computed is unknown"
        )


def same(x, y):
    """Whether both hold the same values, NaN being NaN, looked at in stretches: tables are large."""
    x, y = x.reshape(-1), y.reshape(-1)
    stretches = (slice(i, i + STRETCH) for i in range(0, x.shape[0], STRETCH))
    return all(np.array_equal(scores(x[at]), scores(y[at]), equal_nan=True) for at in stretches)


def as_stored(x, name):
    """An array of any library as NumPy's, in its own type."""
    return x if isinstance(x, np.ndarray) else np.asarray(rounded(scores(x), dtype_name(x, name)))


def sketched(D, columns, iterations, seed):
    """U, S, V^T of D seen through random directions: their images span nearly what the largest singular vectors span."""
    draw = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(D @ draw.standard_normal((D.shape[1], min(columns, *D.shape))))
    for _ in range(iterations):
        P, _ = np.linalg.qr(D.T @ Q)
        Q, _ = np.linalg.qr(D @ P)
    U, S, Vt = np.linalg.svd(Q.T @ D, full_matrices=False)
    return Q @ U, S, Vt
