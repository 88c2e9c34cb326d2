"""FusionBench's algorithms on modules made of a model's tensors: answers `refmerge conform` in its Python."""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from _serve import Unsupported, serve  # noqa: E402

del sys.path[0]  # where folders have the names of tools


def module(model):
    """A tree of modules that has these tensors in its state, under these names."""
    root = torch.nn.Module()
    for name, x in model.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        if x.is_floating_point():
            at.register_parameter(last, torch.nn.Parameter(x.clone(), requires_grad=False))
        else:
            at.register_buffer(last, x.clone())
    return root


def run(algorithm, models, base):
    from fusion_bench import BaseModelPool

    pool = {} if base is None else {"_pretrained_": module(base)}
    merged = algorithm.run(BaseModelPool({**pool, **{f"model_{i}": module(m) for i, m in enumerate(models)}}))
    return dict((merged if isinstance(merged, dict) else merged.state_dict()).items())


def linear(models, base, stats, weights=None, normalize=True):
    from fusion_bench.method import SimpleAverageAlgorithm, WeightedAverageAlgorithm

    if weights is None or (isinstance(weights, list) and all(w is None for w in weights)):
        return run(SimpleAverageAlgorithm(), models, None)
    weights = weights if isinstance(weights, list) else [weights] * len(models)
    return run(WeightedAverageAlgorithm(normalize=normalize, weights=weights), models, None)


def task_arithmetic(models, base, stats, scaling_factor=0.3):
    from fusion_bench.method import TaskArithmeticAlgorithm

    return run(TaskArithmeticAlgorithm(scaling_factor=scaling_factor), models, base)


def ties(models, base, stats, scaling_factor=0.3, threshold=20.0, merge_func="sum", remove_keys=()):
    from fusion_bench.method import TiesMergingAlgorithm

    given = {"scaling_factor": scaling_factor, "threshold": threshold, "merge_func": merge_func}
    return run(TiesMergingAlgorithm(remove_keys=list(remove_keys), **given), models, base)


def slerp(models, base, stats, t=0.5, **params):
    from fusion_bench.method import SlerpMergeAlgorithm

    return run(SlerpMergeAlgorithm(t=t, **params), models, None)


def magmax(models, base, stats, scaling_factor=0.5):
    from fusion_bench.method.magmax import MagMaxAlgorithm

    return run(MagMaxAlgorithm(scaling_factor=scaling_factor), models, base)


def expo(models, base, stats, extrapolation_factor=0.1):
    from fusion_bench.method.linear.expo import ExPOAlgorithm

    if len(models) != 1:
        raise Unsupported("one model")
    return run(ExPOAlgorithm(extrapolation_factor=extrapolation_factor), models, base)


if __name__ == "__main__":
    entries = {
        "expo": expo, "linear": linear, "magmax": magmax, "slerp": slerp, "task_arithmetic": task_arithmetic, "ties": ties,
    }  # fmt: skip
    serve("fusion-bench", version("fusion-bench"), {f"fusion_bench:{name}": f for name, f in entries.items()})
