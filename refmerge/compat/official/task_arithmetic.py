from typing import Literal

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import total


@method("official:task_arithmetic", paper="mlfoundations/task_vectors@826a64c src/task_vectors.py:TaskVector")
def task_arithmetic(
    models, base, *, op: Literal["add", "negate", "analogy"] = "add", scaling_coef: float = 1.0
):  # fmt: skip
    """Sum of the task vectors, its negative, or C + (B - A) of three models A, B, C; one coefficient for the whole."""
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. combine
    if op == "analogy":
        if len(tau) != 3:
            raise UsageError(f"official:task_arithmetic: op='analogy' takes three models A, B, C, {len(tau)} given")
        combined = tau[2] + (tau[1] - tau[0])
    else:
        combined = total(tau) if op == "add" else -total(tau)
    # 3. apply
    return base + scaling_coef * combined
