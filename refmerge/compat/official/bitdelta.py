import numpy as np

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.task_vectors.bitdelta import mean_magnitude, signs
from refmerge.numeric import at_precision, host


@method("official:bitdelta", paper="FasterDecoding/BitDelta@ecbee1e bitdelta/diff.py:compress_diff", models=(1, 1))
def bitdelta(models, base, group, name):
    """The compressed model before its scales are trained, as load_diff reads it. Weights of layers with proj in their name,
    inside of a module with mlp or self_attn in its own, are compressed, those of other modules the fine-tune's. Biases and
    other parameters are the base's."""
    (theta,) = models
    module, _, parameter = name.rpartition(".")
    parent, _, child = module.rpartition(".")
    if parameter != "weight" or not module:
        return base
    if "proj" not in child or not ("mlp" in parent or "self_attn" in parent):
        return theta
    # 1. difference
    diff = theta - base
    # 2. coefficient
    coeff = at_precision(mean_magnitude(diff, group), base)
    # 3. signs, of which 0 has +, times the coefficient
    return base + signs(diff) * coeff


def pack(diff, n_bits=32):
    """The words of the authors' file, (columns / n_bits, rows): bit b of word (i, j) is set where the entry in row j and
    column n_bits i + b is not below 0. They are int32, and for 8, 16 or 64 bits uint8, int16 or int64."""
    columns = np.logical_not(host(diff) < 0).T
    if columns.shape[0] % n_bits:
        raise UsageError(f"pack: {columns.shape[0]} columns are no multiple of n_bits = {n_bits}")
    bits = columns.reshape(-1, n_bits, columns.shape[1])
    words = np.bitwise_or.reduce(bits.astype(np.uint64) << np.arange(n_bits, dtype=np.uint64)[:, None], axis=1)
    return words.astype({8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[n_bits]).view(
        {8: np.uint8, 16: np.int16, 32: np.int32, 64: np.int64}[n_bits]
    )
