"""The authors' own code, in a checkout of theirs: `python adapter.py CHECKOUT` answers `refmerge conform official`.

A repository is known by a file of it. Of that file only imports, functions and classes are run, and of the imports those
that can be: what it does beside, when it is run or to evaluate models, is none of a merge.
"""

import __future__

import ast
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from _modules import module, restored  # noqa: E402
from _serve import Replayed, Unsupported, serve  # noqa: E402

del sys.path[0]  # where folders have the names of tools


def defined(path, **given):
    """The functions and classes of a file, with what is given in place of what it imports from its own repository."""
    text = path.read_text(encoding="utf-8")
    names = {"__name__": path.stem} | given
    late = __future__.annotations.compiler_flag if "from __future__ import annotations" in text else 0
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            try:
                exec(compile(ast.Module([node], []), str(path), "exec", late, True), names)
            except (ImportError, NameError):  # NameError: a decorator of what could not be imported
                continue
    names.update(given)
    return SimpleNamespace(**names)


def rebound(function, **given):
    """The same function, which sees what is given in place of its file's names."""
    return FunctionType(function.__code__, function.__globals__ | given, function.__name__, function.__defaults__)


def taus(models, base):
    return [{name: model[name] - x for name, x in base.items()} for model in models]


def vectors(models, base):
    """Task vectors as CLIP's repositories have them: objects with a `vector`, without integers."""
    floats = {name: x for name, x in base.items() if x.is_floating_point()}
    return [SimpleNamespace(vector=tau) for tau in taus(models, floats)]


def added(base, change, scale=1.0):
    return {name: x + scale * change[name] if name in change else x for name, x in base.items()}


def as_loaded(base, merged):
    """What load_state_dict puts into a model: in the precision that the model has."""
    return {name: merged[name].to(x.dtype) for name, x in base.items()}


def settings(models, **more):
    return SimpleNamespace(DATASETS=[f"task{i}" for i in range(len(models))], num_tasks=len(models), device="cpu", **more)


def on_cpu():
    """What the authors send to a GPU stays where it is."""
    return patch.object(torch.Tensor, "cuda", lambda x, *_, **__: x)


def loaded():
    """torch.load of a module, in place of its path, gives the module."""
    return patch.object(torch, "load", lambda x, *_, **__: x)


# -------------------------------------------------------------------------------------------- what each repository answers


def ties_merging(root):
    theirs = defined(root / "src/utils/merge_utils.py", logger=logging.getLogger())

    def ties(
        models, base, stats, reset_type="topk", reset_thresh=20, resolve_method="mass", merge_func="dis-mean", lam=1.0
    ):  # fmt: skip
        flat, *rest = [theirs.state_dict_to_vector(x) for x in (base, *models)]
        checks = torch.vstack([x - flat for x in rest])
        merged = theirs.merge_methods(
            reset_type, checks, reset_thresh=reset_thresh, resolve_method=resolve_method, merge_func=merge_func
        )
        return as_loaded(base, theirs.vector_to_state_dict(flat + lam * merged, base))

    return {"official:ties": ties}


def merging(root):
    """MergeLM's and MergeLLM's function of a method's name, models, base and parameters."""
    folder = root / "model_merging_methods"
    shared = vars(defined(root / "utils/utils.py"))
    names = {name: shared[name] for name in ("get_param_names_to_merge", "get_modules_to_merge")}
    names["TaskVector"] = defined(folder / "task_vector.py", **names).TaskVector
    names["mask_model_weights"] = defined(folder / "mask_weights_utils.py", **names).mask_model_weights
    methods = defined(folder / "merging_methods.py", **names).MergingMethod

    def merge(name, models, base, **params):
        merged = module(models[0] if base is None else base)
        modules = [module(m) for m in models]
        return methods(name).merging_models(merged, modules, exclude_param_names_regex=[], **params)

    return merge


def named(merge, method):
    """The method of that name, which has its parameters' names as they are."""
    return lambda models, base, stats, **params: merge(method, models, base, **params)


def merge_lm(root):
    merge = merging(root)

    def dare(models, base, stats, weight_mask_rates=0.1, use_weight_rescale=False, **params):
        rates = weight_mask_rates if isinstance(weight_mask_rates, list) else [weight_mask_rates] * len(models)
        given = {"weight_mask_rates": rates, "use_weight_rescale": use_weight_rescale}
        with Replayed([draw[name] for draw, model in zip(stats or (), models) for name in model if name in draw]):
            return merge("mask_merging", models, base, **given, **params)

    def on_data(*_, **__):
        raise Unsupported("its statistics are gathered inside of it, by a trainer on data")

    return {
        "mergelm:fisher": on_data, "mergelm:linear": named(merge, "average_merging"), "mergelm:regmean": on_data,
        "mergelm:ties": named(merge, "ties_merging"), "mergelm:task_arithmetic": named(merge, "task_arithmetic"),
        "official:dare": dare,
    }  # fmt: skip


def merge_llm(root):
    merge = merging(root)

    def breadcrumbs(models, base, stats, param_density=0.9, param_value_mask_rate=0.09, **params):
        shares = {"param_density": param_density, "param_value_mask_rate": param_value_mask_rate}
        return merge("breadcrumbs_merging", models, base, **shares, **params)

    return {
        "mergellm:breadcrumbs": breadcrumbs, "mergellm:linear": named(merge, "average_merging"),
        "mergellm:model_stock": named(merge, "stock_merging"), "mergellm:slerp": named(merge, "slerp_merging"),
        "mergellm:task_arithmetic": named(merge, "task_arithmetic"), "mergellm:ties": named(merge, "ties_merging"),
        "official:widen": named(merge, "widen_merging"),
    }  # fmt: skip


def tall_masks(root):
    folder = root / "src/utils"
    utils = defined(folder / "utils.py")
    merging = defined(folder / "ties_utils.py", topk_values_mask=utils.topk_values_mask)
    names = {name: getattr(utils, name) for name in ("state_dict_to_vector", "vector_to_state_dict")}
    theirs = defined(folder / "tallmask_utils.py", log_wandb_mask_sparsity=lambda _: None, **names)

    def multitask(models, base, use_ties, k):
        """As in their create_task_vector: (the base, the models and the multi-task vector, flat)."""
        flat = [utils.state_dict_to_vector(x, []) for x in (base, *models)]
        checks = torch.vstack(flat[1:]) - flat[0]
        if use_ties:
            return flat[0], torch.vstack(flat[1:]), merging.ties_merging(checks, reset_thresh=20, merge_func="dis-sum")
        return flat[0], torch.vstack(flat[1:]), utils.topk_values_mask(checks, K=k, return_mask=False)[0].sum(dim=0)

    def masks(flat_base, flat_models, tv, tall_mask_lambda):
        return theirs.generate_task_masks(
            flat_models - flat_base, flat_models, flat_base, tv=tv, tall_mask_lambda=tall_mask_lambda
        ).reshape(flat_models.shape)

    def tall(models, base, stats, task=0, tall_mask_lambda=1.0, use_ties=False, k=100):
        flat_base, flat_models, tv = multitask(models, base, use_ties, k)
        mask = masks(flat_base, flat_models, tv, tall_mask_lambda)[task]
        return as_loaded(base, utils.vector_to_state_dict(flat_base + mask * tv, base, []))

    def consensus(
        models, base, stats, tall_mask_lambda_per_task=0.4, prun_thre_k=2, alpha=1.0, use_ties=False, k=100
    ):  # fmt: skip
        each = tall_mask_lambda_per_task
        each = each if isinstance(each, list) else [each] * len(models)
        flat_base, flat_models, tv = multitask(models, base, use_ties, k)
        made = {
            str(t): utils.vector_to_state_dict(masks(flat_base, flat_models, tv, lam)[t].to(tv.dtype), base, [])
            for t, lam in enumerate(each)
        }
        construct = rebound(theirs.construct_consensus_mask, load_tall_mask=lambda *_: made)
        merged = flat_base + alpha * (tv * construct(base, prun_thre_k, None))
        return as_loaded(base, utils.vector_to_state_dict(merged, base, []))

    return {"official:tall_masks": tall, "official:consensus": consensus}


def of_clip(merge, models, base, scale, config):
    return added(base, merge(vectors(models, base), config), scale)


def iso_merging(root):
    theirs = defined(root / "src/utils/iso.py")

    def iso_c(models, base, stats, scaling_factor=1.0):
        return of_clip(theirs.iso_c, models, base, scaling_factor, settings(models))

    def iso_cts(models, base, stats, scaling_factor=1.0, common_space_fraction=0.8):
        config = settings(models, method=SimpleNamespace(common_space_fraction=common_space_fraction))
        return of_clip(theirs.iso_cts, models, base, scaling_factor, config)

    return {"official:iso_c": iso_c, "official:iso_cts": iso_cts}


def task_singular_vectors(root):
    theirs = defined(root / "src/utils/TSVM_utils.py")

    def tsvm(models, base, stats, alpha=1.0, variant="compute_and_sum_svd_mem_reduction"):
        merge = getattr(theirs, variant)
        if variant == "sum_svd_dict":
            config = settings(models)
            return added(base, merge(theirs.compute_svd_dict(vectors(models, base), config), config), alpha)
        return of_clip(merge, models, base, alpha, settings(models))

    return {"official:tsvm": tsvm}


def svc(root):
    theirs = defined(root / "merge_func.py")

    def align(models, base, stats, alpha=0.1, right_only=False, target=-1):
        merged, *tasks = vectors(models, base)
        args = SimpleNamespace(alpha=alpha, right_only=right_only, target=target)
        with on_cpu():
            return added(base, theirs.layer_wise_Align(merged, tasks, args).vector)

    return {"official:svc": align}


def pcb_merging(root):
    readme = defined(root / "pcb-merging.py")
    language = defined(root / "nlp_source_code/utils/merge_utils.py", logger=logging.getLogger())
    evolved = defined(root / "vision_source_code/pcb_ES.py")

    def merge(parts, models, base, lams):
        """Their last line, of the clamped task vectors and their scores: sums weighted by both."""
        flat, *rest = [language.state_dict_to_vector(x) for x in (base, *models)]
        clamped, scale = parts(torch.vstack([x - flat for x in rest]))
        each = lams if isinstance(lams, list) else [lams] * len(models)
        change = torch.sum(clamped * torch.tensor(each).unsqueeze(1) * scale, dim=0)
        return language.vector_to_state_dict(flat + change / torch.clamp(torch.sum(scale, dim=0), min=1e-12), base)

    def clamped(function, ratio):
        """The function, with a ratio in place of the one that it clamps magnitudes with from both sides."""
        clamp = function.__globals__["clamp"]

        def given(x, min_ratio, max_ratio):
            return clamp(x, ratio, ratio) if min_ratio == max_ratio else clamp(x, min_ratio, max_ratio)

        return rebound(function, clamp=given)

    def of_language(models, base, stats, att_ratio=0.1, lams=1.0, clamp=0.01):
        function = clamped(language.task_para_att_merge, clamp)
        return merge(lambda x: function(x, att_ratio)[1:], models, base, lams)

    def of_readme(models, base, stats, pcb_ratio=0.1, lams=1.0, clamp=0.0001):
        function = clamped(readme.PCB_merge, clamp)
        return merge(lambda x: function(x, pcb_ratio)[1:], models, base, lams)

    def of_evolved(models, base, stats, pcb_ratio=0.05, lams=1.2, clamp=0.01):
        function = clamped(evolved.PCB, clamp)
        return merge(lambda x: function(x, pcb_ratio), models, base, lams)

    def of_vision(*_, **__):
        raise Unsupported("a script without a function for it")

    return {
        "official:pcb": of_language, "official_readme:pcb": of_readme, "official_es:pcb": of_evolved,
        "official_vision:pcb": of_vision,
    }  # fmt: skip


def breadcrumbs(root):
    theirs = defined(root / "src/task_vectors.py", safe_load_state_dict=lambda model: model.state_dict())

    def middle(models, base, stats, top_k_keep=0.15, top_k_remove=0.006, alpha=0.2, remove_first=True):
        make = partial(
            theirs.TaskVectorMiddleKeep, top_k_keep=top_k_keep, top_k_remove=top_k_remove, remove_first=remove_first
        )
        with loaded():
            merged = sum(make(module(base), module(model)) for model in models)
            return merged.apply_to(module(base), scaling_coef=alpha).state_dict()

    return {"official:breadcrumbs": middle}


def magmax(root):
    theirs = defined(root / "src/merging/task_vectors.py")

    def largest(models, base, stats, scaling_coef=1.0):
        with loaded():
            merged = theirs.merge_max_abs([theirs.TaskVector(module(base), module(model)) for model in models])
            return merged.apply_to(module(base), scaling_coef=scaling_coef).state_dict()

    return {"official:magmax": largest}


def task_vectors(root):
    theirs = defined(root / "src/task_vectors.py")

    def task_arithmetic(models, base, stats, op="add", scaling_coef=1.0):
        if op == "analogy" and len(models) != 3:
            raise Unsupported("an analogy is of three models")
        with loaded():
            tau = [theirs.TaskVector(module(base), module(model)) for model in models]
            if op == "analogy":
                a, b, c = tau
                merged = c + (b + -a)
            else:
                merged = sum(tau) if op == "add" else -sum(tau)
            return merged.apply_to(module(base), scaling_coef=scaling_coef).state_dict()

    return {"official:task_arithmetic": task_arithmetic}


def bitdelta(root):
    kernel = defined(root / "bitdelta/binary_gemm_kernel.py")
    theirs = defined(root / "bitdelta/diff.py", pack=kernel.pack, unpack=kernel.unpack)

    def compressed(models, base, stats):
        return restored(theirs.compress_diff, theirs.save_diff, theirs.load_diff, *models, base)

    return {"official:bitdelta": compressed}


def dc_merge(root):
    full = defined(root / "vision_fft_merge/src/utils/DC_utils.py")
    lora = defined(root / "vision_lora_merge/merging_functions.py")

    def of_full(models, base, stats, alpha=1.0, keep_topk=0.001):
        return of_clip(keeping(full, keep_topk), models, base, alpha, settings(models))

    def of_lora(merge, models, base, rank_per_task=16, **params):
        if rank_per_task != 16:
            raise Unsupported("a rank of 16 is fixed in it")
        deltas = taus(models, base) if base is not None else models
        merged = merge({name: [tau[name] for tau in deltas] for name in deltas[0]}, **params)
        return merged if base is None else added(base, merged)

    def of_adapters(models, base, stats, smoothing="avg", rho=5.0, keep_topk=0.001, rank_per_task=16):
        return of_lora(keeping(lora, keep_topk), models, base, rank_per_task, smoothing_strategy=smoothing, rho=rho)

    def iso_cts(models, base, stats, rank_per_task=16, common_space_fraction=0.8):
        return of_lora(lora.iso_cts, models, base, rank_per_task, k_frac=common_space_fraction)

    def tsvm(models, base, stats, rank_per_task=16):
        return of_lora(lora.TSVM, models, base, rank_per_task)

    def keeping(theirs, share):
        """Their function, with a share of entries to keep in place of its own."""
        keep = theirs.keep_topk_percent
        return rebound(theirs.dc_merge, keep_topk_percent=lambda tensors, _: keep(tensors, share))

    return {
        "official:dc_merge": of_full, "official_lora:dc_merge": of_adapters,
        "dcmerge:iso_cts": iso_cts, "dcmerge:tsvm": tsvm,
    }  # fmt: skip


def emr_merging(root):
    each = defined(root / "merge_vit/src/main_emr_merging.py")

    def emr(models, base, stats, task=0, **params):
        if params.pop("flat", False):
            raise Unsupported("the other script has no function for task vectors")
        unified, masks, rescalers = each.emr_merge(vectors(models, base))
        return added(base, {name: x * masks[name][task] * rescalers[task] for name, x in unified.items()})

    return {"official:emr": emr}


def wudi_merging(root):
    theirs = defined(root / "vit/wudi_main.py", TaskVector=SimpleNamespace)

    def wudi(models, base, stats, iter_num=300, lr=1e-5):
        if lr != 1e-5:
            raise Unsupported("a rate of 1e-5 is fixed in it")
        with on_cpu():
            merged = theirs.decompose_task_vectors(vectors(models, base), iter_num=iter_num).vector
        return added(base, merged)

    return {"official:wudi": wudi}


def lines(root):
    theirs = defined(root / "src/eval/eval.py")

    def scaled(models, base, stats, alpha, beta, num_blocks=12):
        each = [x.vector for x in vectors(models, base)]
        whole = SimpleNamespace(vector={name: sum(tau[name] for tau in each) for name in each[0]})
        return added(base, theirs.LiNeS_scaling(whole, alpha=alpha, beta=beta, num_blocks=num_blocks).vector)

    return {"official:lines": scaled}


def wise_ft(root):
    theirs = defined(root / "src/wise_ft.py")

    def between(models, base, stats, alpha=0.5):
        return theirs._merge(alpha, base, *models, None, None)

    def fisher(models, base, stats, alpha=0.5, fisher_floor=1e-8):
        return theirs._merge(alpha, base, *models, stats, fisher_floor)

    return {"official:wise_ft": between, "wise_ft:fisher": fisher}


# repository, a file of it, what that says, and what answers for it: the first that fits is meant, for files are copied
REPOSITORIES = (
    ("prateeky2806/ties-merging", "src/utils/merge_utils.py", "def merge_with_oracle_sign", ties_merging),
    ("yule-BUAA/MergeLM", "model_merging_methods/merging_methods.py", "def fisher_merging", merge_lm),
    ("yule-BUAA/MergeLLM", "model_merging_methods/merging_methods.py", "def widen_merging", merge_llm),
    ("danielm1405/iso-merging", "src/utils/iso.py", "def iso_cts", iso_merging),
    ("AntoAndGar/task_singular_vectors", "src/utils/TSVM_utils.py", "def sum_svd_dict", task_singular_vectors),
    ("wang-kee/LiNeS", "src/eval/eval.py", "def LiNeS_scaling", lines),
    ("mlfoundations/wise-ft", "src/wise_ft.py", "def _merge", wise_ft),
    ("nik-dim/tall_masks", "src/utils/tallmask_utils.py", "def construct_consensus_mask", tall_masks),
    ("lyymuwu/SVC", "merge_func.py", "def layer_wise_Align", svc),
    ("duguodong7/pcb-merging", "pcb-merging.py", "def PCB_merge", pcb_merging),
    ("rezazzr/breadcrumbs", "src/task_vectors.py", "class TaskVectorMiddleKeep", breadcrumbs),
    ("danielm1405/magmax", "src/merging/task_vectors.py", "def merge_max_abs", magmax),
    ("FasterDecoding/BitDelta", "bitdelta/diff.py", "def compress_diff", bitdelta),
    ("Tobeginwith/DC-Merge", "vision_fft_merge/src/utils/DC_utils.py", "def dc_merge", dc_merge),
    ("harveyhuang18/EMR_Merging", "merge_vit/src/main_emr_merging.py", "def emr_merge", emr_merging),
    ("nathanielyvo/WUDI-Merging", "vit/wudi_main.py", "def decompose_task_vectors", wudi_merging),
    ("mlfoundations/task_vectors", "src/task_vectors.py", "class TaskVector()", task_vectors),
)


def recognised(root):
    """(repository, what answers for it). SystemExit where none is."""
    for repository, file, word, answers in REPOSITORIES:
        path = root / file
        if path.is_file() and word in path.read_text(encoding="utf-8", errors="replace"):
            return repository, answers
    known = ", ".join(repository for repository, *_ in REPOSITORIES)
    sys.exit(f"{root} is a checkout of no repository that is known: {known}")


def commit(root):
    """The commit that is checked out, where git can tell."""
    try:
        said = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return said.stdout.strip() if (root / ".git").exists() else ""


if __name__ == "__main__":
    checkout = Path(sys.argv[1])
    found, answers = recognised(checkout)
    serve(found, commit(checkout), answers(checkout))
