"""sd-mecha's functions on tensors: answers `refmerge conform` in its Python."""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from _serve import Unsupported, serve  # noqa: E402

del sys.path[0]  # where folders have the names of tools


def method(name):
    from sd_mecha.extensions.merge_methods import resolve

    return resolve(name).__wrapped__


def of_deltas(name, models, base, **params):
    return method(name)(*(m - base for m in models), **params)


def ties(function):
    def run(models, base, stats, alpha=1.0, **params):
        deltas = {name: of_deltas(function, [m[name] for m in models], base[name], **params) for name in base}
        return {name: base[name] + alpha * delta for name, delta in deltas.items()}

    return run


def model_stock(models, base, stats, **params):
    return {name: base[name] + of_deltas("model_stock", [m[name] for m in models], base[name], **params) for name in base}


def slerp(models, base, stats, alpha=0.5):
    a, b = models
    return {name: method("slerp")(a[name], b[name], torch.tensor(alpha, dtype=a[name].dtype)) for name in a}


def dare_linear(models, base, stats, **params):
    raise Unsupported("its dropout draws as nothing else does, and cannot be given a draw")


if __name__ == "__main__":
    entries = {"dare_linear": dare_linear, "model_stock": model_stock, "slerp": slerp}
    entries |= {"ties": ties("ties_sum"), "ties_sum_extended": ties("ties_sum_extended")}
    serve("sd-mecha", version("sd-mecha"), {f"sd_mecha:{name}": f for name, f in entries.items()})
