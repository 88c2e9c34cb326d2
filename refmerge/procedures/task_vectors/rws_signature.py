from fnmatch import fnmatchcase

import numpy as np

from refmerge.errors import InputError, UsageError
from refmerge.group import Group, Place, State
from refmerge.methods.task_vectors.rws import at_right_angles, encoded
from refmerge.numeric import host, total
from refmerge.procedure import procedure


@procedure("rws_signature", paper="arXiv:2302.12480")
def rws_signature(robust, clean, base, *, layers=("*",), levels=256):
    """The signature of one robust model by itself, small enough to keep, for `patch` to add to a clean model.

    robust, clean, base: mappings name -> NumPy array, or open checkpoints. Returns, for each floating-point tensor that one
    of the globs `layers` names, `<tensor>.codes`, unsigned integers of its shape below `levels`, and `<tensor>.scale`, the
    value of code 0 and the step from code to code.
    """
    if type(levels) is not int or not 2 <= levels <= 65536:
        raise UsageError(f"rws_signature: levels = {levels!r} is no whole number from 2 to 65536")
    signature = {}
    for name in sorted(name for name in clean if any(fnmatchcase(name, glob) for glob in layers)):
        theta_n, theta, theta_0 = three(name, robust=robust, clean=clean, base=base)
        if theta.dtype.kind == "f" and theta.size:
            # 1. signature
            group = Group(State(theta.size, 1), Place(0, name, 0, theta.size, theta.size))
            theta_n, theta_0, flat = (x.reshape(-1) for x in (theta_n, theta_0, theta))
            v = at_right_angles([theta_n - theta_0], flat - theta_0, group)
            # 2. codes
            ((code, *scale),) = encoded(v, levels, group)
            if not np.all(np.isfinite(scale)):
                raise InputError(f"rws_signature: tensor {name!r} has a signature that is not finite")
            signature[f"{name}.codes"] = code.reshape(theta.shape).astype(np.uint8 if levels <= 256 else np.uint16)
            signature[f"{name}.scale"] = np.asarray(scale, theta.dtype)
    if not signature:
        raise UsageError(f"rws_signature: none of layers = {list(layers)} names a floating-point tensor of the clean model")
    return signature


def three(name, **models):
    """One tensor of each model, of 16-bit floats in float32. InputError where one lacks it or has another shape."""
    for label, model in models.items():
        if name not in model:
            raise InputError(f"rws_signature: tensor {name!r} is in the clean model and not in the {label} one")
    arrays = [host(model[name]) for model in models.values()]
    if len({x.shape for x in arrays}) > 1:
        listed = ", ".join(f"{list(x.shape)} in the {label} model" for label, x in zip(models, arrays))
        raise InputError(f"rws_signature: tensor {name!r} has different shapes: {listed}")
    return arrays


def patch(model, *signatures, weight=1.0):
    """The model with signatures added to it, times `weight`, one number or one for each; the negative weights take them off
    again. Returns a mapping name -> array, each in the dtype that it had; what no signature has is the model's own array."""
    weights = [weight] * len(signatures) if isinstance(weight, int | float) else list(weight)
    if len(weights) != len(signatures):
        raise UsageError(f"patch: {len(weights)} weights for {len(signatures)} signatures")
    patched = {name: model[name] for name in model}
    for name in sorted({key.rpartition(".")[0] for signature in signatures for key in signature}):
        if name not in patched:
            raise InputError(f"patch: tensor {name!r} of a signature is not in the model: it was made for other layers")
        theta = host(patched[name])
        mine = [(w_n, s[f"{name}.codes"], s[f"{name}.scale"]) for w_n, s in zip(weights, signatures) if f"{name}.codes" in s]
        if any(code.shape != theta.shape for _, code, _ in mine):
            raise InputError(f"patch: tensor {name!r} has another shape in a signature than in the model")
        v = [w_n * (low + step * code.astype(theta.dtype)) for w_n, code, (low, step) in mine]
        patched[name] = np.asarray(theta + total(v), patched[name].dtype)
    return patched
