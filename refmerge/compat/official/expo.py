from inspect import Parameter

from refmerge.method import same_as
from refmerge.methods.task_vectors.expo import expo as ours

expo = same_as(
    ours,
    "official:expo",
    source="chujiezheng/LLM-Extrapolation@04e04f5 code/extrapolate.py:main",
    alpha=("alpha", Parameter.empty),
)
