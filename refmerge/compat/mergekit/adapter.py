"""mergekit, tensor by tensor and in memory: `python adapter.py` in its Python answers `refmerge conform`."""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from _serve import Replayed, Unsupported, serve  # noqa: E402

del sys.path[0]  # where folders have the names of tools

METHODS = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher",
    "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp",
    "task_arithmetic", "ties",
)  # fmt: skip
WITHOUT_BASE = ("karcher", "linear", "passthrough")


def entry(method):
    def run(models, base, stats, **params):
        from mergekit.merge_methods.api import merge_tensors

        params = {name.rstrip("_"): value for name, value in params.items()}
        based = base is not None and method not in WITHOUT_BASE
        merged = {}
        for name in models[0]:
            inputs = [base[name], *(m[name] for m in models)] if based else [m[name] for m in models]
            if not inputs[0].is_floating_point():
                raise Unsupported("integers are not merged")
            drawn = [s[key] for s in stats or () for key in (f"{name}.mask",) if key in s]
            with Replayed(drawn):
                merged[name] = merge_tensors(inputs, method, parameters=params, base_index=0 if based else None)
        return merged

    return run


if __name__ == "__main__":
    serve("mergekit", version("mergekit"), {f"mergekit:{method}": entry(method) for method in METHODS})
