"""LoRA adapters as checkpoints of their own: PEFT's layout read and written, and the change of the weights that they are.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. The factors of a module lie there under

    base_model.model.<module>.lora_A.weight       r x in (a convolution: r x in x height x width)
    base_model.model.<module>.lora_B.weight       out x r (a convolution: out x r x 1 x 1)
    base_model.model.<module>.lora_embedding_A    r x rows of the table, and lora_embedding_B: width x r

and the module's weight changes by scaling * B A, where scaling is alpha / r, or alpha / sqrt(r) where the configuration says
`use_rslora`. `r` and `lora_alpha` hold for all modules but those that `rank_pattern` and `alpha_pattern` name. Beside them
may lie

    base_model.model.<module>.lora_magnitude_vector   out: of DoRA, the length that each output's weights get in the end
    base_model.model.<module>.lora_B.bias             out: what scaling * it adds to the module's bias (`lora_bias`)
    base_model.model.<module>.base_layer.bias         the bias itself, where biases were trained (`bias`); and
                              .base_layer.weight      what B A is added to: PEFT saves it for embed_tokens and lm_head
    base_model.model.<module>.<tensor>                of a module that is replaced whole (`modules_to_save`)

`refmerge.adapted` applies them to a checkpoint where it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refmerge.changes import Changes
from refmerge.checkpoint import DTYPES, FLOATS, CheckpointWriter, name_of, open_checkpoint, promote, save
from refmerge.checkpoint.files import listed, shown
from refmerge.checkpoint.layout import contained, read_json
from refmerge.errors import InputError, UsageError
from refmerge.foreign import file_of, matched, matches, parts_of
from refmerge.numeric import scores
from refmerge.sources import dtype_name, rounded

__all__ = ["Adapter", "Factors", "adapter_from", "apply_adapter", "read_adapter", "write_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])\.weight|lora_embedding_(?P<row>[AB])"
    r"|(?P<bias>lora_B\.bias)|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
# What the configuration says about factors; the rest of it is carried along.
OWN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "modules_to_save")
# Where these are set, the weights change in a way that is not known here.
OTHER_CHANGES = (
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "use_qalora",
    "use_bdlora", "kasa_config", "arrow_config",
)  # fmt: skip
# These PEFT saves whole of itself: beside their factors, as base_layer, and where words were added.
VOCABULARY = ("embed_tokens", "lm_head")
FEW = 8  # one in so many singular values is few
SAFE = 1e-10  # of the largest square: far above 2^-52, and 1e-5 of the largest singular value
MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """What one module's weight changes by: scaling * B A.

    A: r x in, or r x in x height x width. B: out x r, or out x r x 1 x 1. alpha: None is the rank, and so scaling 1.
    embedding: of a table, which is stored with one row for each word, so that its change is (scaling * B A)^T.
    magnitude: of DoRA, out numbers: the weights W + scaling * B A of each output are then stretched to that length. bias:
    out numbers, scaling * which is added to the module's bias.
    """

    A: np.ndarray
    B: np.ndarray
    alpha: float | None = None
    rslora: bool = False
    embedding: bool = False
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.A.ndim < 2 or self.B.ndim < 2 or self.B.shape[1] != self.A.shape[0] or math.prod(self.B.shape[2:]) != 1:
            raise InputError(f"factors of shapes A {list(self.A.shape)} and B {list(self.B.shape)} have no product B A")
        for what, x in (("magnitudes", self.magnitude), ("bias", self.bias)):
            if x is not None and x.size != len(self.B):
                raise InputError(f"{what} of shape {list(x.shape)} for {len(self.B)} outputs")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        if self.alpha is None:
            return math.sqrt(self.rank) if self.rslora else 1.0
        if not self.rank:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.B.shape[0], math.prod(self.A.shape[1:])

    def stored_shape(self, turned: bool) -> tuple[int, ...]:
        """Of the weight that they change; turned: stored as in x out."""
        return self.shape[::-1] if turned else (len(self.B), *self.A.shape[1:])

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """B and A as matrices, in float64."""
        return scores(self.B).reshape(self.B.shape[0], self.rank), scores(self.A).reshape(self.rank, self.shape[1])

    def product(self) -> np.ndarray:
        """scaling * B A in float64, out x in."""
        B, A = self.matrices()
        return self.scaling * (B @ A)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. modules: name -> Factors. config: what else adapter_config.json says. saved: tensors of the model that
    it replaces whole (`modules_to_save`, and biases that were trained), by the model's names. layout: peft; of another one,
    whose modules are not called as the model's (refmerge.foreign), they are found where the adapter is applied."""

    modules: Mapping[str, Factors]
    config: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)
    layout: Literal["peft", "foreign"] = "peft"

    def tensors(self) -> dict[str, np.ndarray]:
        """PEFT's name -> array. Modules of rank 0, which change nothing and which PEFT does not have, are left out."""
        named = {}
        for module, f in self.modules.items():
            if f.rank:
                for part, x in (("A", f.A), ("B", f.B)):
                    named[PREFIX + module + (f".lora_embedding_{part}" if f.embedding else f".lora_{part}.weight")] = x
                if f.magnitude is not None:
                    shape = (-1,) if f.A.ndim == 2 else (1, -1, *[1] * (f.A.ndim - 2))
                    named[f"{PREFIX}{module}.lora_magnitude_vector"] = f.magnitude.reshape(shape)
                if f.bias is not None:
                    named[f"{PREFIX}{module}.lora_B.bias"] = f.bias
        for name, x in self.saved.items():
            module, _, kind = name.rpartition(".")
            named[PREFIX + (f"{module}.base_layer.{kind}" if module in self.modules else name)] = x
        return dict(sorted(named.items()))

    def digest(self) -> str:
        """Of all that decides how it changes a model."""
        total = hashlib.sha256(json.dumps([self.layout, bool(self.config.get("fan_in_fan_out"))]).encode())

        def add(said: list[Any], *arrays: np.ndarray | None) -> None:
            kinds = [None if x is None else [str(x.dtype), x.shape] for x in arrays]
            total.update(json.dumps([*said, kinds]).encode())
            for x in arrays:
                if x is not None:
                    total.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

        for module, f in sorted(self.modules.items()):
            add([module, f.alpha, f.rslora, f.embedding], f.A, f.B, f.magnitude, f.bias)
        for name, x in sorted(self.saved.items()):
            add([name], x)
        return total.hexdigest()

    def with_modules(self, modules: Mapping[str, Factors]) -> Adapter:
        """The adapter with these in place of its own; which modules are its targets follows from them."""
        return replace(self, modules=modules, config={k: v for k, v in self.config.items() if k != "target_modules"})

    def delta(self, module: str) -> np.ndarray:
        """The change scaling * B A of a module's weight as the model stores it, in float64; a convolution's in its own
        shape."""
        f = self.modules[module]
        change = f.product()
        return change.T if self.turned(module) else change.reshape(-1, *f.A.shape[1:])

    def turned(self, module: str) -> bool:
        """Whether the model stores the module's weight as in x out: a table's, and under `fan_in_fan_out` a matrix's."""
        f = self.modules[module]
        return f.embedding or (f.A.ndim == 2 and bool(self.config.get("fan_in_fan_out")))

    def configuration(self) -> dict[str, Any]:
        """adapter_config.json. The commonest rank and alpha stand for all modules, and patterns for the others."""
        factors = {module: f for module, f in self.modules.items() if f.rank}
        rslora = {f.rslora for f in factors.values()}
        if len(rslora) > 1:
            some = listed(m for m, f in factors.items() if f.rslora)
            raise UsageError(f"use_rslora holds for a whole adapter, and here only for {some}; give all modules one of both")
        ranks = {module: f.rank for module, f in factors.items()}
        alphas = {module: _whole(f.rank if f.alpha is None else f.alpha) for module, f in factors.items()}
        r, alpha = (max(Counter(x.values()).items(), key=lambda n: (n[1], n[0]), default=(1,))[0] for x in (ranks, alphas))
        default: dict[str, Any] = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None}
        default |= {"fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0}
        default["target_modules"] = sorted(factors)
        saved = {name.rpartition(".")[0] for name in self.saved}
        whole = {m for m in saved - set(factors) if f"{m}.weight" in self.saved or f"{m}.bias" not in self.saved}
        biases = {name.removesuffix(".bias") for name in self.saved if name.endswith(".bias")} - whole
        own: dict[str, Any] = {"r": r, "lora_alpha": alpha, "use_rslora": rslora == {True}}
        own |= {"modules_to_save": sorted(whole) or None}
        own |= {"bias": "none" if not biases else "lora_only" if biases <= set(factors) else "all"}
        own |= {"use_dora": any(f.magnitude is not None for f in factors.values())}
        own |= {"lora_bias": any(f.bias is not None for f in factors.values())}
        own |= {"rank_pattern": _pattern(ranks, r), "alpha_pattern": _pattern(alphas, alpha)}
        return dict(sorted({**default, **self.config, **own}.items()))


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in PEFT's folder, or in a safetensors file of kohya's or diffusers' layout, in memory. InputError says
    what is wrong with it, and lists tensors that do not belong."""
    folder = Path(path)
    if folder.suffix == ".safetensors" and not (folder.name == WEIGHTS and (folder.parent / CONFIG).exists()):
        return _foreign(folder)
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    if not folder.exists():
        raise InputError(f"{shown(folder)}: no such file or directory, of an adapter")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise InputError(f"{shown(folder)}: no PEFT adapter: it has no {name}")
    config = read_json(contained(folder / CONFIG, folder))
    return adapter_from(open_checkpoint(contained(folder / WEIGHTS, folder)), config, str(folder))


def _foreign(path: Path) -> Adapter:
    with open_checkpoint(path) as file:
        modules = {}
        for module, (x, alpha) in parts_of(file, file.metadata, str(path)).items():
            try:
                modules[module] = Factors(x["A"], x["B"], alpha)
            except InputError as error:
                raise InputError(f"{path}: module {module!r}: {error}") from None
    return Adapter(modules, layout="foreign")


def adapter_from(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], label: str = "adapter") -> Adapter:
    """The adapter that PEFT's tensors and adapter_config.json make. InputError as for `read_adapter`."""
    _understood(config, label)
    whole = (*(config.get("modules_to_save") or ()), *VOCABULARY)
    biases = config.get("bias", "none") != "none"
    parts: dict[str, dict[str, np.ndarray]] = {}
    tables, saved, odd = set(), {}, []
    for name in sorted(tensors):
        bare = name.removeprefix(PREFIX)
        found = PARTS.fullmatch(bare) if bare != name else None
        if found:
            part = found["part"] or found["row"] or ("bias" if found["bias"] else "magnitude")
            parts.setdefault(found["module"], {})[part] = tensors[name]
            tables |= {found["module"]} if found["row"] else set()
        elif bare != name and (
            ".base_layer." in bare or (biases and bare.endswith(".bias")) or _ends_with(bare.rpartition(".")[0], whole)
        ):
            saved[bare.replace(".base_layer.", ".")] = tensors[name]
        else:
            odd.append(name)
    if odd:
        raise InputError(f"{label}: {listed(odd)} belong to no LoRA factors; nothing but lora_A, lora_B, lora_embedding_A, "
                         "lora_embedding_B, lora_magnitude_vector, biases and modules_to_save is understood")  # fmt: skip
    halves = {module: sorted({"A", "B"} - {*x}) for module, x in parts.items()}
    if lone := [f"{module} (no {' and no '.join(lacking)})" for module, lacking in halves.items() if lacking]:
        raise InputError(f"{label}: factors without their other half: {listed(lone)}")
    modules, wrong = {}, []
    for module, x in parts.items():
        r = _matched(config.get("rank_pattern"), module, config["r"], label)
        alpha = _matched(config.get("alpha_pattern"), module, config["lora_alpha"], label)
        try:
            more = {key: x[key].reshape(-1) for key in ("magnitude", "bias") if key in x}
            f = Factors(x["A"], x["B"], alpha, bool(config.get("use_rslora")), module in tables, **more)
        except InputError as error:
            raise InputError(f"{label}: module {module!r}: {error}") from None
        modules[module] = f
        if f.rank != r:
            wrong.append(f"{module} ({f.rank}, said to be {r})")
    if config.get("use_dora") and (plain := [m for m, f in modules.items() if f.magnitude is None]):
        raise InputError(f"{label}: use_dora is set, and {listed(plain)} have no lora_magnitude_vector")
    if wrong:
        raise InputError(f"{label}: ranks are not those of {CONFIG}: {listed(wrong)}")
    return Adapter(modules, {k: v for k, v in config.items() if k not in OWN}, saved)


def write_adapter(adapter: Adapter, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter as PEFT's folder, or one of another layout as a .safetensors file of that, which appears whole or not
    at all. Returns its path."""
    tensors = adapter.tensors() if adapter.layout == "peft" else file_of(adapter)
    if not tensors:
        raise UsageError("an adapter that changes nothing is not written: all its ranks are 0")
    if adapter.layout != "peft":
        if Path(out).suffix != ".safetensors":
            raise UsageError(f"{out}: an adapter in kohya's or diffusers' layout is a file that ends in .safetensors")
        save(tensors, out, overwrite=overwrite)
        return Path(out)
    if Path(out).suffix == ".safetensors":
        raise UsageError(f"{out}: an adapter in PEFT's layout is a folder, and not a .safetensors file")
    text = json.dumps(adapter.configuration(), indent=2, ensure_ascii=False) + "\n"
    plan = {name: (name_of(x.dtype), x.shape) for name, x in tensors.items()}
    options = {"overwrite": overwrite, "extra_files": {CONFIG: text.encode()}, "weights": WEIGHTS}
    with CheckpointWriter(out, plan, max_shard_size="1000TB", **options) as writer:  # type: ignore[arg-type]
        for name, (dtype, _) in plan.items():
            raw = np.asarray(tensors[name], dtype=DTYPES[dtype], order="C").reshape(-1).view(np.uint8)
            writer.write(name, 0, raw)
    return Path(out)


def apply_adapter(base: Mapping[str, np.ndarray], adapter: Adapter, *, weight: float = 1.0) -> dict[str, np.ndarray]:
    """theta_0 + weight * scaling * B A in float64, rounded once to the base's dtype: all of the model, in memory. InputError
    lists modules that the base does not have or has in another shape."""
    model = {name: base[name] for name in base}
    adapter = matched(adapter, model, "the adapter")
    changes = Changes({n: (dtype_name(x, n), tuple(x.shape)) for n, x in model.items()}, [("the adapter", adapter, weight)])
    for name in changes.changed:
        x = model[name]
        flat = scores(x).reshape(-1)
        whole = changes.stretch(name, 0, flat.size, partial(_part, flat))
        model[name] = rounded(whole.reshape(x.shape), dtype_name(x, name))
    return model


def _part(flat: np.ndarray, start: int, stop: int) -> np.ndarray:
    return flat[start:stop].copy()


# ------------------------------------------------------------------------------------------- what procedures ask for


def opened(adapters: Iterable[Any], method: str) -> list[Adapter]:
    """Adapters, read where a path is given. UsageError for anything else, and for none."""
    found = [read_adapter(a) if isinstance(a, str | Path) else a for a in adapters]
    if not found or not all(isinstance(a, Adapter) for a in found):
        raise UsageError(f"{method}: adapters are paths of PEFT's folders, or what read_adapter gives, and at least one")
    return found


def same_modules(adapters: Sequence[Adapter], method: str, otherwise: str = "") -> list[str]:
    """The modules of all adapters. InputError lists those that some adapters do not have, and ends with `otherwise`."""
    union = {module for a in adapters for module in a.modules}
    lacking = [f"adapter {n}: {listed(rest)}" for n, a in enumerate(adapters) if (rest := sorted(union - set(a.modules)))]
    if lacking:
        raise InputError(f"{method}: modules are missing in {'; '.join(lacking)}{otherwise}")
    return sorted(union)


def only_products(adapters: Sequence[Adapter], method: str) -> None:
    """UsageError where an adapter changes a module by more than B A, which procedures on factors would lose."""
    more = {"a magnitude (DoRA)": "magnitude", "a bias (lora_bias)": "bias"}
    for what, key in more.items():
        if some := [m for a in adapters for m, f in a.modules.items() if getattr(f, key) is not None]:
            raise UsageError(f"{method}: {listed(some)} have {what} beside B A; apply these adapters, and merge the models")


def saved_alike(adapters: Sequence[Adapter], method: str) -> Mapping[str, np.ndarray]:
    """What all adapters add their factors to in place of the base's (`base_layer`). UsageError for other tensors that they
    replace whole, which have no factors to merge."""
    first = adapters[0].saved
    names = sorted({name for a in adapters for name in a.saved})
    alike = {n for n in names if all(n in a.saved and np.array_equal(a.saved[n], first[n]) for a in adapters)}
    alike = {n for n in alike if all(n.removesuffix(".weight") in a.modules for a in adapters)}
    if some := [name for name in names if name not in alike]:
        raise UsageError(
            f"{method}: {listed(some)} are no factors but whole tensors (modules_to_save); merge these as models"
        )
    return first


def dtype_of(*factors: Factors) -> str:
    """The float type that holds all their values. InputError for other types."""
    kinds = {dtype_name(x, "of a factor") for f in factors for x in (f.A, f.B)}
    if not kinds <= FLOATS:
        raise InputError(f"factors of type {listed(kinds - FLOATS)} cannot be merged: only floats can")
    return promote(kinds)


def factors_of(B: np.ndarray, A: np.ndarray, like: Factors, dtype: str, **changed: Any) -> Factors:
    """Matrices as factors of the same kind of module, rounded once; scaling is 1 unless `changed` says otherwise."""
    shaped = rounded(A.reshape(len(A), *like.A.shape[1:]), dtype), rounded(B.reshape(*B.shape, *like.B.shape[2:]), dtype)
    return Factors(*shaped, **{"embedding": like.embedding, **changed})


def finite(D: np.ndarray, module: str) -> np.ndarray:
    """D itself. InputError where it has no singular values."""
    if not np.all(np.isfinite(D)):
        raise InputError(f"module {module!r}: a change that is infinite or NaN has no singular values")
    return D


def factorised(B: np.ndarray, A: np.ndarray, module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, V^T of B A in float64 without making the product: B = Q L, A^T = P R, and L R^T is small."""
    Q, L = np.linalg.qr(finite(B, module))
    P, R = np.linalg.qr(finite(A, module).T)
    U, S, Vt = np.linalg.svd(L @ R.T, full_matrices=False)
    return Q @ U, S, Vt @ P.T


def leading(D: np.ndarray, rank: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, V^T of a matrix in float64: at least the `rank` largest singular values, None for all of them.

    Few of many come from the eigenvectors of the smaller Gram matrix, in a fraction of the time. Squares lose what lies
    below the root of the rounding error, so that the decomposition itself is made where the smallest one comes near to that.
    """
    from scipy.linalg import eigh

    m = min(D.shape)
    if rank is not None and rank <= m // FEW:
        X = D if len(D) == m else D.T
        squares, U = eigh(X @ X.T, subset_by_index=[m - rank, m - 1])
        if squares[0] > SAFE * squares[-1]:
            U = U[:, ::-1]
            W = U.T @ X
            S = np.linalg.norm(W, axis=1)
            Vt = W / S[:, None]
            return (U, S, Vt) if X is D else (Vt.T, S, U.T)
    return np.linalg.svd(D, full_matrices=False)


def split(U: np.ndarray, S: np.ndarray, Vt: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """B and A whose product is U diag(S) V^T, with S on one of them or its root on both."""
    if scale not in ("both", "A", "B"):
        raise UsageError(f"scale = {scale!r} is none of 'both', 'A', 'B'")
    left, right = {"both": (np.sqrt(S), np.sqrt(S)), "A": (1.0, S), "B": (S, 1.0)}[scale]
    return U * left, (Vt.T * right).T


def chosen_rank(S: np.ndarray, rank: int | None, energy: float | None) -> int:
    """`rank`, as far as there are so many, or the lowest one whose squares are `energy` of all."""
    if (rank is None) == (energy is None):
        raise UsageError("give one of rank and energy")
    if rank is not None:
        if type(rank) is not int or rank < 1:
            raise UsageError(f"rank = {rank!r} is no positive whole number")
        return min(rank, len(S))
    assert energy is not None
    if not 0 < energy <= 1:
        raise UsageError(f"energy = {energy!r} is outside (0, 1]")
    # What rounding makes of a zero is none of the energy.
    squares = np.where(len(S) * np.finfo(np.float64).eps * max(S, default=0.0) < S, S, 0.0) ** 2
    sums = np.cumsum(squares)
    return int(np.searchsorted(sums, energy * sums[-1])) + 1 if squares.any() else 0


@dataclass(frozen=True)
class Fit:
    """Of a module: the rank chosen, |R - B A| in the Frobenius norm with the factors as stored, and |R|."""

    rank: int
    error: float
    size: float

    @property
    def relative(self) -> float:
        """|R - B A| over |R|; 0 where nothing was to be approximated."""
        return self.error / self.size if self.size else 0.0


def _understood(config: Mapping[str, Any], label: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{label}: an adapter of type {kind!r}; only LORA is understood")
    for key in ("r", "lora_alpha"):
        if _no_number(config.get(key)):
            raise InputError(f"{label}: {CONFIG} has no number {key!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(patterns := config.get(key) or {}, Mapping) or any(map(_no_number, patterns.values())):
            raise InputError(f"{label}: {key} in {CONFIG} is no mapping of patterns to numbers")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list | tuple) or not all(isinstance(name, str) for name in whole):
        raise InputError(f"{label}: modules_to_save in {CONFIG} is no list of names")
    if on := [key for key in OTHER_CHANGES if config.get(key)]:
        raise InputError(f"{label}: {CONFIG} sets {listed(on)}: its weights do not change by B A alone")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED_BASES):
        raise InputError(
            f"{label}: init_lora_weights = {start!r} changed the base too; let PEFT convert it to plain LORA first"
        )


def _no_number(x: Any) -> bool:
    return not isinstance(x, int | float) or isinstance(x, bool) or not math.isfinite(x)


def _matched(patterns: Mapping[str, Any] | None, module: str, default: Any, label: str = "") -> Any:
    """The value of the first pattern that fits the module."""
    return next((value for pattern, value in (patterns or {}).items() if matches(pattern, module, label)), default)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Patterns by which every module gets its value: plain names, or, where these fit others too, anchored ones."""
    found = {module: v for module, v in values.items() if v != default}
    if all(_matched(found, module, default) == v for module, v in values.items()):
        return found
    return {f"^{re.escape(module)}": v for module, v in found.items()}


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == n or module.endswith(f".{n}") for n in names)


def _whole(x: float) -> float:
    return int(x) if float(x).is_integer() else float(x)
