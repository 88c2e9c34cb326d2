from refmerge.method import PerModel, method
from refmerge.methods.averaging.passthrough import passthrough as ours


@method("mergekit:passthrough", paper="mergekit 0.1.5 passthrough.py", models=(1, 1))
def passthrough(models, *, scale: PerModel[float | None] = None):
    """As the method: one model as it is, or multiplied by a number."""
    # 1. scale
    return models[0] if scale[0] is None else ours.run(models, scale=scale[0])
