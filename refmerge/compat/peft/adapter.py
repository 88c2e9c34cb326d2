"""PEFT's functions on tensors, which merge LoRA factors or other differences: answers `refmerge conform` in its Python."""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from _serve import Replayed, serve  # noqa: E402

del sys.path[0]  # where folders have the names of tools

METHODS = ("dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties")


def entry(method):
    def run(models, base, stats, weights=1.0, **params):
        from peft.utils import merge_utils

        weights = torch.tensor(weights if isinstance(weights, list) else [weights] * len(models))
        merged = {}
        for name in models[0]:
            with Replayed([s[f"{name}.mask"] for s in stats or () if f"{name}.mask" in s]):
                merged[name] = getattr(merge_utils, method)([m[name] for m in models], weights, **params)
        return merged

    return run


if __name__ == "__main__":
    serve("peft", version("peft"), {f"peft:{method}": entry(method) for method in METHODS})
