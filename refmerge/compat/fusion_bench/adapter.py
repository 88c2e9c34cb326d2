"""FusionBench's algorithms on modules made of a model's tensors: answers `refmerge conform` in its Python."""

import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from _modules import EMBEDDINGS, module, restored  # noqa: E402
from _serve import Unsupported, serve  # noqa: E402

del sys.path[0]  # where folders have the names of tools


def pool(models, base, embeddings=EMBEDDINGS, trained=False, **special):
    """The models, the base and the special ones; trained: what FusionBench's algorithms for trainable parameters see."""
    from fusion_bench import BaseModelPool

    special |= {} if base is None else {"_pretrained_": base}
    named = special | {f"model_{i}": m for i, m in enumerate(models)}
    return BaseModelPool({name: module(m, embeddings).requires_grad_(trained) for name, m in named.items()})


def run(algorithm, models, base, **options):
    merged = algorithm.run(pool(models, base, **options))
    return dict((merged if isinstance(merged, dict) else merged.state_dict()).items())


def recorded(stats, models, linear, embeddings):
    """The recorded masks in the order in which an algorithm draws them: model by model, of all parameters or of linear
    layers' weights."""
    drawn = []
    for draw, model in zip(stats, models):
        root = module(model, embeddings)
        layers = (f"{path}.weight" for path, part in root.named_modules() if isinstance(part, torch.nn.Linear))
        drawn += [draw[name] for name in (layers if linear else dict(root.named_parameters()))]
    return drawn


class Uniform:
    """torch.rand_like that is above every number from 0 to 1 where a recorded mask keeps, and below where it drops."""

    def __init__(self, masks):
        self._masks, self._random = masks, torch.rand_like

    def __enter__(self):
        def rand_like(x, **_):
            if self._masks is None:
                return torch.full_like(x, 0.5)  # nothing, or everything, is dropped whatever is drawn
            return torch.where(self._masks.pop(0).reshape(x.shape).bool(), 2.0, -1.0).to(x.dtype)

        torch.rand_like = rand_like

    def __exit__(self, *_):
        torch.rand_like = self._random


# ------------------------------------------------------------------------------------------- averages and task vectors


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


def model_stock(models, base, stats, ignore_keys=()):
    from fusion_bench.method.model_stock import ModelStock

    return run(ModelStock(ignore_keys=list(ignore_keys)), models, base)


def dare(
    models, base, stats, sparsity_ratio=0.5, only_on_linear_weights=False, rescale=True, scaling_factor=None, threshold=None,
    merge_func="sum", remove_keys=(), embeddings=EMBEDDINGS,
):  # fmt: skip
    from fusion_bench.method.dare import DareSimpleAverage, DareTaskArithmetic, DareTiesMerging

    if stats is None and 0 < sparsity_ratio < 1:
        raise Unsupported("a random draw that was not recorded")
    masks = None if stats is None else recorded(stats, models, only_on_linear_weights, embeddings)
    dropped = {"sparsity_ratio": sparsity_ratio, "only_on_linear_weights": only_on_linear_weights, "rescale": rescale}
    scale = 1 / len(models) if scaling_factor is None else scaling_factor
    if threshold is not None:
        given = {"scaling_factor": scale, "threshold": threshold, "merge_func": merge_func}
        algorithm = DareTiesMerging(remove_keys=list(remove_keys), **given, **dropped)
    elif scaling_factor is not None:
        algorithm = DareTaskArithmetic(scaling_factor=scaling_factor, **dropped)
    else:
        algorithm = DareSimpleAverage(**dropped)
    with Uniform(masks):
        return run(algorithm, models, base, embeddings=embeddings, trained=True)


# -------------------------------------------------------------------------------------------------- a model for each task


def emr(models, base, stats, task=0):
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.utils.state_dict_arithmetic import state_dict_sub

    unified, masks, rescalers = emr_merge([state_dict_sub(model, base) for model in models])
    return {name: x + unified[name] * masks[name][task] * rescalers[task] for name, x in base.items()}


def tall_masks(models, base, stats, tall_mask_lambda, task=0):
    """What TallMaskTaskArithmeticAlgorithm computes, of its own functions: it mixes parameters and tensors, which 0.2.33's
    arithmetic refuses."""
    from fusion_bench.method.tall_mask.task_arithmetic import generate_task_masks
    from fusion_bench.utils import state_dict_arithmetic as sums

    tau = [sums.state_dict_sub(model, base) for model in models]
    multi_task = sums.state_dict_sum(tau)
    masks = generate_task_masks(multi_task, tau[task], base, tall_mask_lambda=tall_mask_lambda)
    return sums.state_dict_add(base, sums.state_dict_hadamard_product(masks, multi_task))


def bitdelta(models, base, stats):
    from fusion_bench.method.bitdelta.bitdelta_utils.diff import compress_diff, load_diff, save_diff

    return restored(compress_diff, save_diff, load_diff, *models, base)


# ------------------------------------------------------------------------------------------------------------- statistics


def fisher(
    models, base, stats, normalize_fisher_weight=True, minimal_fisher_weight=1e-6, fisher_scaling_coefficients=None
):  # fmt: skip
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    c = fisher_scaling_coefficients
    return merging_with_fisher_weights(
        models_to_merge_param_dict={name: [m[name] for m in models] for name in models[0]},
        models_to_merge_fisher_weights_list=stats,
        fisher_scaling_coefficients=torch.ones(len(models)) / len(models) if c is None else torch.Tensor(c),
        normalize_fisher_weight=normalize_fisher_weight,
        minimal_fisher_weight=minimal_fisher_weight,
    )


def regmean(models, base, stats, reduce_non_diagonal_ratio=1.0, weight_transpose=True):
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    return merging_with_regmean_weights(
        models_to_merge_param_dict={name: [m[name] for m in models] for name in models[0]},
        models_to_merge_regmean_weights_list=stats or [{}] * len(models),
        reduce_non_diagonal_ratio=reduce_non_diagonal_ratio,
        weight_transpose=weight_transpose,
    )


# -------------------------------------------------------------------------------------------------------------- subspaces


def iso_c(models, base, stats, scaling_factor=1.0, exclude_keys=None):
    from fusion_bench.method.isotropic_merging import ISO_C_Merge

    return run(ISO_C_Merge(scaling_factor=scaling_factor, exclude_keys=exclude_keys), models, base)


def iso_cts(models, base, stats, scaling_factor=1.0, common_space_fraction=0.8, exclude_keys=None):
    from fusion_bench.method.isotropic_merging import ISO_CTS_Merge

    given = {"common_space_fraction": common_space_fraction, "exclude_keys": exclude_keys}
    return run(ISO_CTS_Merge(scaling_factor=scaling_factor, **given), models, base)


def tsvm(models, base, stats, alpha=1.0, exclude_keys=None):
    from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging

    return run(TaskSingularVectorMerging(alpha=alpha, exclude_keys=exclude_keys), models, base)


def singular_projection(models, base, stats, k=128, rank="low", full_matrices=False, embeddings=EMBEDDINGS):
    from fusion_bench.method.smile_upscaling.singular_projection_merging import SingularProjectionMergingAlgorithm
    from omegaconf import OmegaConf

    given = {"k": k, "rank": rank, "full_matrices": full_matrices, "device": "cpu", "model_path": None}
    return run(SingularProjectionMergingAlgorithm(OmegaConf.create(given)), models, base, embeddings=embeddings)


def svc(models, base, stats, alpha=0.1, implementation="accelerated"):
    from fusion_bench.method.singular_value_calibration import SingularValueCalibration

    merged, *tasks = models
    os.environ["FUSION_BENCH_SVC_IMPL"] = implementation
    return run(SingularValueCalibration(alpha=alpha), tasks, base, _merged_=merged)


def wudi(models, base, stats, iter_num=300, exclude_keys=()):
    from fusion_bench.method.wudi import WUDIMerging

    return run(WUDIMerging(iter_num=iter_num, exclude_keys=list(exclude_keys)), models, base)


def doge(models, base, stats, subspace=6, K=30, lamda=0.07, adam_lr=1e-4, steps_per_layer=400):
    from fusion_bench.method.doge_ta import DOGE_TA_Algorithm

    algorithm = DOGE_TA_Algorithm(subspace=subspace, K=K, lamda=lamda)
    if steps_per_layer == 0:
        algorithm.optimize_delta = partial(unoptimised, algorithm)
    elif adam_lr != 1e-4 or steps_per_layer != 400:
        raise Unsupported("400 steps of 1e-4 are fixed in it")
    if stats is not None:
        algorithm.compute_layer_lamdas = lambda _: stats
    return run(algorithm, models, base)


def unoptimised(algorithm, task_vectors):
    """In place of its optimisation: the delta that this starts from."""
    algorithm.delta = {name: torch.nn.Parameter(torch.zeros_like(x)) for name, x in task_vectors[0].items()}


def dop(models, base, stats, shuffle_order=False, embeddings=EMBEDDINGS, exclude_keys=(), **params):
    refuse_shuffle(shuffle_order)
    from fusion_bench.method.dop.dop_general import DOPMerging

    algorithm = DOPMerging(exclude_keys=list(exclude_keys), **params)
    return run(algorithm, models, base, embeddings=embeddings, trained=True)


def opcm(models, base, stats, alpha=0.5, shuffle_order=False, embeddings=EMBEDDINGS):
    refuse_shuffle(shuffle_order)
    from fusion_bench.method.opcm.opcm_general import OPCM

    return run(OPCM(alpha=alpha, shuffle_order=False), models, base, embeddings=embeddings)


def refuse_shuffle(shuffle_order):
    if shuffle_order:
        raise Unsupported("the order is drawn from a state that the whole program shares")


ENTRIES = (
    bitdelta, dare, doge, dop, emr, expo, fisher, iso_c, iso_cts, linear, magmax, model_stock, opcm, regmean,
    singular_projection, slerp, svc, tall_masks, task_arithmetic, ties, tsvm, wudi,
)  # fmt: skip

if __name__ == "__main__":
    serve("fusion-bench", version("fusion-bench"), {f"fusion_bench:{entry.__name__}": entry for entry in ENTRIES})
