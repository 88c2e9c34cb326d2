from refmerge.method import method
from refmerge.methods.task_vectors.expo import expo as ours


@method("official:expo", paper="chujiezheng/LLM-Extrapolation@04e04f5 code/extrapolate.py:main", models=(1, 1))
def expo(models, base, *, alpha: float):
    """ExPO, whose alpha has no default. Their code leaves buffers out, which a file does not tell from parameters."""
    # 1. extrapolate
    return ours(models, base, alpha=alpha)
