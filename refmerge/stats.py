"""Statistics of models that methods rest on, accumulated in float64 from what passes through linear layers.

    s = Statistics()
    for batch in batches:                      # a mean over all rows of all batches, whatever their sizes
        mlp.forward(params, batch, s.taps())   # Gram matrices of the inputs of all linear layers
    s.save("math.stats.safetensors")           # read by `stats=` and by recipes

A row is what a layer reads at one place of one sample; `mask` says which places are no padding. Each statistic is a mean:

    <module>.gram            x x^T over rows x of the layer's inputs
    <module>.gradient_gram   g g^T over rows g of the gradient of the log-likelihood by the layer's outputs
    <tensor>.fisher          the square of a sample's gradient of the log-likelihood by the tensor, over samples; and over
                             classes with their probabilities, where these are given
    <module>.mean, .square   x and x x over rows, unit by unit
    <router>.routed          1 for an expert that a token is sent to and 0 for others, over tokens
    <router>.logit_gram      l l^T over tokens, l the router's scores of all experts before the softmax

Gradients come from whoever has them: a framework's, or a formula. Files of parts of the data are merged by `add`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores

__all__ = ["DEFINITIONS", "RoutingTaps", "Statistics", "Taps"]

DEFINITIONS = {
    "gram": "mean over rows of x x^T, x the inputs of the layer",
    "gradient_gram": "mean over rows of g g^T, g the gradient of the log-likelihood by the outputs of the layer",
    "fisher": "mean over samples of the squared gradient of the log-likelihood; over classes by their probability, if given",
    "mean": "mean over rows of x, the inputs of the layer",
    "square": "mean over rows of x x, entry by entry, x the inputs of the layer",
    "routed": "mean over tokens of 1 where the expert is chosen and 0 elsewhere",
    "logit_gram": "mean over tokens of l l^T, l the scores that the router gives to the experts, before the softmax",
}
KEY = "refmerge.statistics"


class Statistics(Mapping[str, np.ndarray]):
    """A mapping name -> mean, that grows. Sums and counts are float64; a mean is their quotient."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, float] = {}

    # What is known.

    def __getitem__(self, name: str) -> np.ndarray:
        if not self._counts[name]:
            raise UsageError(f"statistic {name!r}: no row was counted, so that there is no mean")
        return self._sums[name] / self._counts[name]

    def __iter__(self) -> Any:
        return iter(sorted(self._sums))

    def __len__(self) -> int:
        return len(self._sums)

    def count(self, name: str) -> float:
        """Of how many rows or samples a statistic is the mean."""
        return self._counts[name]

    # What is added.

    def gram(self, module: str, x: Any, mask: Any = None) -> None:
        """x: (..., inputs), a row for each place; mask: 1 where a place counts, 0 where it is padding."""
        self._add_gram(f"{module}.gram", x, mask)

    def gradient_gram(self, module: str, g: Any, mask: Any = None) -> None:
        """g: (..., outputs), the gradient of each sample's log-likelihood by the outputs of the layer at each place."""
        self._add_gram(f"{module}.gradient_gram", g, mask)

    def moments(self, module: str, x: Any, mask: Any = None) -> None:
        rows = as_rows(x, mask, module)
        self._add(f"{module}.mean", rows.sum(axis=0), len(rows))
        self._add(f"{module}.square", (rows * rows).sum(axis=0), len(rows))

    def routing(self, router: str, logits: Any, chosen: int, mask: Any = None, *, experts: Any = None) -> None:
        """Of a router of a mixture of experts: how often it chooses which expert, and how alike it scores them.

        logits: (..., experts), its scores for each token before the softmax. chosen: how many experts a token is sent to,
        those with the highest scores, of equal ones the first. experts: (..., chosen), which ones, where the model goes by
        something else. mask: as in `gram`.
        """
        rows = as_rows(logits, mask, f"{router}.logit_gram")
        if type(chosen) is not int or not 1 <= chosen <= rows.shape[1]:
            raise UsageError(f"routing of {router!r}: chosen = {chosen!r} of {rows.shape[1]} experts")
        if experts is None:
            places = np.argsort(-rows, axis=1, kind="stable")[:, :chosen]
        else:
            places = as_rows(experts, mask, f"{router}.routed").astype(np.int64)
            if places.shape != (len(rows), chosen) or np.any((places < 0) | (places >= rows.shape[1])):
                raise UsageError(f"routing of {router!r}: experts are {chosen} numbers below {rows.shape[1]} for each token")
        self._add(f"{router}.logit_gram", rows.T @ rows, len(rows))
        counts = np.bincount(places.reshape(-1), minlength=rows.shape[1]).astype(np.float64)
        self._add(f"{router}.routed", counts, len(rows))

    def fisher(self, module: str, x: Any, g: Any, probability: Any = None, *, bias: bool = True) -> None:
        """The diagonal for the weight (out, in) and the bias of a linear layer.

        x: (samples, inputs) or (samples, places, inputs). g: likewise with outputs; with `probability` (samples, classes) it
        has an axis for classes after the samples: the gradients of log p_c.
        """
        x, g = scores(x), scores(g)
        if probability is None:
            g, p = g[:, None], np.ones((len(g), 1))
        else:
            p = scores(probability)
        if x.ndim == 2:
            x, g = x[:, None], g[:, :, None]
        if x.ndim != 3 or g.ndim != 4 or p.shape != g.shape[:2] or (len(x), x.shape[1]) != (len(g), g.shape[2]):
            shapes = f"inputs {list(x.shape)}, gradients {list(g.shape)}, probabilities {list(p.shape)}"
            raise UsageError(f"fisher of {module!r}: {shapes} are not of the same samples and places")
        # A sample's gradient is the sum over its places of g x^T: the square is taken after that sum.
        weight = sum(np.einsum("c,coi->oi", p_n, (g_n.swapaxes(1, 2) @ x_n) ** 2) for p_n, g_n, x_n in zip(p, g, x))
        self._add(f"{module}.weight.fisher", np.asarray(weight), len(x))
        if bias:
            self._add(f"{module}.bias.fisher", np.einsum("nc,nco->o", p, g.sum(axis=2) ** 2), len(x))

    def fisher_of(self, gradients: Mapping[str, Any], probability: Any = None) -> None:
        """The diagonal for any tensors: name -> gradients of single samples, (samples, *shape); with `probability` (samples,
        classes) name -> (samples, classes, *shape)."""
        for name, g in gradients.items():
            g = scores(g)
            if probability is None:
                self._add(f"{name}.fisher", (g * g).sum(axis=0), len(g))
            else:
                self._add(f"{name}.fisher", np.einsum("nc,nc...->...", scores(probability), g * g), len(g))

    def add(self, other: Statistics) -> None:
        """What another has seen, too."""
        for name in other:
            self._add(name, other._sums[name], other._counts[name])

    def taps(self) -> Taps:
        """Taps of a network of refmerge.nets that put the inputs of its linear layers into Gram matrices."""
        return Taps(self)

    def routing_taps(self, routers: Mapping[str, int], mask: Any = None) -> RoutingTaps:
        """Taps of a network of refmerge.nets.moe that count where its routers send tokens. routers: name -> how many experts
        are chosen. mask: (samples, places), 1 where a place counts."""
        return RoutingTaps(self, routers, mask)

    def _add_gram(self, name: str, x: Any, mask: Any) -> None:
        rows = as_rows(x, mask, name)
        self._add(name, rows.T @ rows, len(rows))

    def _add(self, name: str, value: np.ndarray, count: float) -> None:
        if not np.all(np.isfinite(value)):
            raise InputError(f"statistic {name!r}: a batch has values that are not finite")
        there = self._sums.get(name)
        if there is not None and there.shape != value.shape:
            raise InputError(f"statistic {name!r} has shape {list(there.shape)}, a batch {list(value.shape)}")
        self._sums[name] = value if there is None else there + value
        self._counts[name] = self._counts.get(name, 0) + count

    # Files.

    def save(self, path: str | Path) -> None:
        """One safetensors file of float64 means, with definitions and counts in its metadata."""
        from safetensors.numpy import save_file

        about = {name: {"definition": DEFINITIONS[name.rpartition(".")[2]], "count": self._counts[name]} for name in self}
        save_file({name: self[name] for name in self}, str(path), {KEY: json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """What `save` has written. InputError where a file does not say of how much its means are."""
        from safetensors import safe_open

        found = cls()
        with safe_open(str(path), "numpy") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name not in about:
                    raise InputError(f"{path}: {name!r} has no count in the metadata: no statistics of refmerge")
                found._add(name, file.get_tensor(name).astype(np.float64) * about[name]["count"], about[name]["count"])
        return found


class Taps(dict[str, Any]):
    """Taps whose linear layers' inputs go into Gram matrices; what layers give is kept as in any taps."""

    def __init__(self, statistics: Statistics, mask: Any = None) -> None:
        super().__init__()
        self._statistics, self._mask = statistics, mask

    def read(self, weight: str, x: Any) -> None:
        self._statistics.gram(weight.rpartition(".")[0], x, self._mask)


class RoutingTaps(dict[str, Any]):
    """Taps that give what routers score to statistics, and keep nothing."""

    def __init__(self, statistics: Statistics, routers: Mapping[str, int], mask: Any = None) -> None:
        super().__init__()
        self._statistics, self._mask = statistics, None if mask is None else scores(mask).reshape(-1)
        self._chosen = {f"{router}.weight": (router, chosen) for router, chosen in routers.items()}

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._chosen:
            router, chosen = self._chosen[name]
            self._statistics.routing(router, value, chosen, self._mask)


def as_rows(x: Any, mask: Any, name: str) -> np.ndarray:
    """A float64 row for each place that counts."""
    x = scores(x)
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    counts = scores(mask)
    if counts.shape != x.shape[:-1] or not np.all((counts == 0) | (counts == 1)):
        raise UsageError(f"{name!r}: a mask of {list(x.shape[:-1])} places holds 0 and 1, not one of {list(counts.shape)}")
    return rows[counts.reshape(-1) == 1]
