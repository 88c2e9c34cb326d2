import math
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, host, like, total


@method(
    "official:rws",
    paper="VITA-Group/Robust_Weight_Signatures@4c796da model_patching.py:decompose",
    models=(2, None),
)
def rws(
    models,
    base,
    group,
    name,
    *,
    weight: PerModel[float],
    key_list: tuple = ("*",),
    quantization: int | None = None,
    quantization_method: Literal["linear", "log", "tanh"] = "linear",
):
    """Weights act twice, one range of levels serves all signatures, and norms are the mean of the robust models'.

    The first model is the clean one, whose weight is not looked at. key_list is what select_layers gives, names or globs.
    """
    theta, *robust = models
    norm = ("bn" in name or "downsample" in name) and "num" not in name
    chosen = not norm and any(fnmatchcase(name, key) for key in key_list)
    # 1. weighted task vectors
    a = theta - base
    r = [w_n * (theta_n - base) for w_n, theta_n in zip(weight[1:], robust)]
    # 2. signatures; 0 / 0 where the clean model is the base
    aa, *ar = group.dot((a, a), *((a, r_n) for r_n in r))
    v = [r_n - (ar_n / aa if aa else math.nan) * a for r_n, ar_n in zip(r, ar)]
    # 3. quantise
    if quantization:
        v = quantised([v_n if chosen else 0 * a for v_n in v], quantization, quantization_method, group)
    # 4. patch, weighted once more
    if norm:
        return (1 / len(robust)) * total(robust)
    return theta + total(w_n * v_n for w_n, v_n in zip(weight[1:], v)) if chosen else theta


def quantised(v, levels, how, group):
    """Levels of the entries, of their tanh, or, half as many, of log2 of their magnitudes, over one range for all v_n."""
    xp = array_namespace(*v)
    if how == "linear":
        return linear_quant(v, levels, group)
    if how == "tanh":
        return [of(np.arctanh, x_n) for x_n in linear_quant([of(np.tanh, v_n) for v_n in v], levels, group)]
    magnitudes = linear_quant([of(np.log2, xp.abs(v_n)) for v_n in v], levels >> 1, group)
    return [xp.sign(v_n) * of(np.exp2, x_n) for v_n, x_n in zip(v, magnitudes)]


def of(function, x):
    return like(function(host(x)), x)


def linear_quant(x, n_nums, group):
    """The nearest of n_nums even steps from the least entry of all to the greatest; NaN where these are the same."""
    xp = array_namespace(*x)
    ends = group.max(*x, *(-x_n for x_n in x))
    low, high = -float(np.max(ends[len(x) :])), float(np.max(ends[: len(x)]))
    if n_nums < 2 or (n_nums == 2 and low != -high):
        raise UsageError(
            f"official:rws: {n_nums} levels of quantization, with which the authors' code fails or gives NaN: 3 or more are "
            "needed (log takes half of them)"
        )
    if n_nums == 2:
        return [high * xp.sign(x_n) for x_n in x]
    codes = [xp.round((x_n - low) / xp.full_like(x_n, high - low) * (n_nums - 1.0)) for x_n in x]
    return [low + (high - low) / (n_nums - 1) * code for code in codes]


def select_layers(model, keep_num, arch="vgg16"):
    """The authors' choice, as key_list takes it: of a mapping name -> array the first keep_num convolutions of their vgg16
    with their biases, or of their resnet50 the stem and then blocks, in the order of the numbers in the names."""
    if keep_num < 1 or arch not in ("vgg16", "resnet50"):
        raise UsageError(f"select_layers: keep_num = {keep_num} of {arch!r}; at least 1, of 'vgg16' or 'resnet50'")
    layers = []
    for key in sorted(model, key=by_number):
        if arch == "vgg16" and len(model[key].shape) == 4:
            layers.append([f"features.{key.split('.')[1]}.{part}" for part in ("weight", "bias")])
        elif arch == "resnet50" and "conv1" in key:
            prefix = key[:9] if "layer" in key else ""
            layers.append([f"{prefix}conv{i}.weight" for i in ((1, 2, 3) if prefix else (1,))])
    return [key for layer in layers[:keep_num] for key in layer]


def by_number(key):
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
