"""Two ensembles of soft trees: which tree is which, turned over so that its splits and leaves lie alike, and averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import expit

from refmerge.api import merge
from refmerge.errors import UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.symmetry import invert

__all__ = ["Operation", "SoftTrees", "adjust", "operations", "outputs", "soft_trees"]

Array = np.ndarray
Kind = Literal["non_oblivious", "oblivious", "decision_list", "modified_decision_list"]
KINDS = ("non_oblivious", "oblivious", "decision_list", "modified_decision_list")
MOST = 1 << 16  # operations that are tried one by one


@dataclass(frozen=True)
class Operation:
    """A change of one tree that leaves its function as it is. Split n of the result is split splits[n] of the tree, times
    signs[n]; leaf l is leaf leaves[l]."""

    splits: tuple[int, ...]
    signs: tuple[int, ...]
    leaves: tuple[int, ...]


@dataclass(frozen=True)
class SoftTrees:
    """permutation: tree i of `aligned` is tree permutation[i] of the first ensemble, changed by operations[i]. aligned: the
    first ensemble, the same function. merged: with the second. objective: the sum of what the matching maximises, and
    before: for trees of the same number as they are."""

    permutation: Array
    operations: tuple[Operation, ...]
    aligned: dict[str, Any]
    merged: dict[str, Any]
    objective: float
    before: float


@procedure("soft_trees", paper="arXiv:2405.14596")
def soft_trees(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    tree: Kind,
    inputs: Any = None,
    flip: bool = True,
    order: bool = True,
    lambda_: float = 0.5,
) -> SoftTrees:
    """Match and merge two ensembles of soft trees, by the order of trees, subtree flips and the order of splits.

    a, b: ensembles, mappings with w (trees, splits, features), b (trees, splits) and pi (trees, leaves, classes); a is
    changed, to lie as b does. inputs: samples by features, for matching by what trees answer in place of what they weigh.
    """
    A, B = (checked(e, tree, which) for e, which in ((a, "first"), (b, "second")))
    if any(A[key].shape != B[key].shape for key in A):
        raise UsageError("soft_trees: the two ensembles differ in shape")
    # 1. weigh each split by the leaves below it
    theta_A, theta_B = parts(A), weighted(parts(B), tree)
    # 2. the best operation for each pair of trees
    S, best = best_operations(theta_A, theta_B, tree, flip, order)
    plain = flat(theta_A) @ flat(theta_B).T
    if inputs is not None:
        answers = [outputs(e, inputs, tree=tree).reshape(len(e["b"]), -1) for e in (A, B)]
        S = plain = answers[0] @ answers[1].T
    # 3. assign trees
    _, p = linear_sum_assignment(S, maximize=True)
    q = [best(m, p[m]) for m in range(len(p))]
    # 4. permute and adjust
    permutation = invert(p)
    chosen = tuple(q[m] for m in permutation)
    aligned = adjust(a, permutation, chosen)
    # 5. average
    merged = merge([aligned, dict(b)], "linear", weight=[lambda_, 1 - lambda_], normalize=False)
    return SoftTrees(permutation, chosen, aligned, merged, float(S[np.arange(len(p)), p].sum()), float(np.trace(plain)))


def adjust(a: Mapping[str, Any], permutation: Array, chosen: tuple[Operation, ...]) -> dict[str, Any]:
    """The ensemble with its trees in another order and changed by operations; its own dtype, its own function."""
    w, b, pi = (np.asarray(a[key])[permutation] for key in ("w", "b", "pi"))
    splits, signs, leaves = (np.array([getattr(u, key) for u in chosen]) for key in ("splits", "signs", "leaves"))
    sign = signs.astype(b.dtype)
    return {
        "w": sign[..., None].astype(w.dtype) * np.take_along_axis(w, splits[..., None], axis=1),
        "b": sign * np.take_along_axis(b, splits, axis=1),
        "pi": np.take_along_axis(pi, leaves[..., None], axis=1),
    }


# ----------------------------------------------------------------------------------------------------------- similarity


def split_weights(tree: str, splits: int) -> Array:
    """How many leaves each split has a say in."""
    n = np.arange(splits)
    if tree == "non_oblivious":
        return (splits + 1) / 2.0 ** np.floor(np.log2(n + 1))
    return np.full(splits, 2.0**splits) if tree == "oblivious" else splits + 1.0 - n


def parts(e: Mapping[str, Array]) -> dict[str, Array]:
    """Splits, with the threshold as one more feature, and leaves."""
    return {"split": np.concatenate([e["w"], e["b"][..., None]], axis=2), "pi": e["pi"]}


def weighted(theta: Mapping[str, Array], tree: str) -> dict[str, Array]:
    """Splits times their weights: in an inner product with trees as they are that is the root of them on either side."""
    return {"split": split_weights(tree, theta["split"].shape[1])[:, None] * theta["split"], "pi": theta["pi"]}


def flat(theta: Mapping[str, Array]) -> Array:
    trees = len(theta["pi"])
    return np.concatenate([theta["split"].reshape(trees, -1), theta["pi"].reshape(trees, -1)], axis=1)


def best_operations(A: Mapping[str, Array], B: Mapping[str, Array], tree: str, flip: bool, order: bool) -> tuple[Array, Any]:
    """The largest inner product of each tree of A, changed by an operation, with each of B; and a function of a pair of
    trees that gives the operation: the first of equal ones."""
    if tree == "non_oblivious" and flip:
        return best_flips(A, B)
    known = operations(tree, A["split"].shape[1], flip=flip, order=order)
    theta_B = flat(B)
    S, u = np.full((len(theta_B), len(theta_B)), -np.inf), np.zeros((len(theta_B), len(theta_B)), dtype=int)
    for i, one in enumerate(known):
        changed = {
            "split": np.array(one.signs)[:, None] * A["split"][:, list(one.splits)],
            "pi": A["pi"][:, list(one.leaves)],
        }
        here = flat(changed) @ theta_B.T
        u = np.where(here > S, i, u)
        S = np.maximum(here, S)
    return S, lambda m, n: known[u[m, n]]


def best_flips(A: Mapping[str, Array], B: Mapping[str, Array]) -> tuple[Array, Any]:
    """The same for perfect binary trees, from the leaves up: a pair of splits is best as it is, or turned."""
    splits = A["split"].shape[1]
    depth = (splits + 1).bit_length() - 1
    S = np.einsum("mic,njc->ijmn", A["pi"], B["pi"])
    turned = []
    for d in range(depth - 1, -1, -1):
        level = slice(2**d - 1, 2 ** (d + 1) - 1)
        own = np.einsum("mif,njf->ijmn", A["split"][:, level], B["split"][:, level])
        straight = own + S[0::2, 0::2] + S[1::2, 1::2]
        crossed = S[1::2, 0::2] + S[0::2, 1::2] - own
        turned.insert(0, crossed > straight)
        S = np.maximum(straight, crossed)

    def best(m: int, n: int) -> Operation:
        flipped = np.zeros(splits, dtype=bool)  # by the first tree's splits
        pairs = [(0, 0)]
        for d in range(depth):
            below = []
            for i, j in pairs:
                t = int(turned[d][i, j, m, n])
                flipped[2**d - 1 + i] = bool(t)
                below += [(2 * i + t, 2 * j), (2 * i + 1 - t, 2 * j + 1)]
            pairs = below
        return flipped_subtrees(flipped)

    return S[0, 0], best


# ----------------------------------------------------------------------------------------------------------- operations


def operations(tree: str, splits: int, *, flip: bool = True, order: bool = True) -> list[Operation]:
    """All that leave a tree's function as it is, the identity first; orders of splits before, and flips within them."""
    known(tree)
    own = tuple(range(splits))
    leaves = leaf_count(tree, splits)
    if tree == "oblivious":
        orders = list(permutations(own)) if order else [own]
        signs = list(product((1, -1), repeat=splits)) if flip else [(1,) * splits]
        enough(len(orders) * len(signs))
        return [Operation(o, s, reordered(o, s)) for o in orders for s in signs]
    if tree == "non_oblivious" and flip:
        enough(2.0**splits)
        return [flipped_subtrees(np.array(f, dtype=bool)) for f in product((False, True), repeat=splits)]
    found = [Operation(own, (1,) * splits, tuple(range(leaves)))]
    if tree == "decision_list" and flip:
        last = (*range(splits - 1), splits, splits - 1)
        found.append(Operation(own, (*(1,) * (splits - 1), -1), last))
    return found


def reordered(order: tuple[int, ...], signs: tuple[int, ...]) -> tuple[int, ...]:
    """Where the leaves of an oblivious tree come from whose depth d is split order[d] of the tree, negated where signs[d] is
    -1. Leaves are numbered by the ways to them, left 0 and right 1, the root's the highest bit."""
    depth = len(order)
    found = []
    for leaf in range(2**depth):
        source = 0
        for d, (split, sign) in enumerate(zip(order, signs)):
            right = (leaf >> (depth - 1 - d) & 1) ^ (sign < 0)
            source |= right << (depth - 1 - split)
        found.append(source)
    return tuple(found)


def flipped_subtrees(flipped: Array) -> Operation:
    """A perfect binary tree whose splits (by level, from the left) are negated where flipped, and what lies below them on
    the left and right exchanged."""
    splits = len(flipped)
    source = [0] * (2 * splits + 1)  # of each place in the new tree, leaves after splits
    for place in range(splits):
        n = source[place]
        left, right = 2 * n + 1, 2 * n + 2
        source[2 * place + 1], source[2 * place + 2] = (right, left) if flipped[n] else (left, right)
    return Operation(
        tuple(source[:splits]),
        tuple(-1 if flipped[n] else 1 for n in source[:splits]),
        tuple(n - splits for n in source[splits:]),
    )


def enough(count: float) -> None:
    if count > MOST:
        raise UsageError(
            f"soft_trees: {count:.3g} operations a tree are too many; flip=False or order=False leaves some out"
        )


# ------------------------------------------------------------------------------------------------------------- ensembles


def outputs(e: Mapping[str, Any], inputs: Any, *, tree: str) -> Array:
    """What each tree answers: trees by samples by classes. Their sum over the trees is the ensemble's output."""
    e = checked(e, tree, "")
    x = scores(inputs)
    if x.ndim != 2 or x.shape[1] != e["w"].shape[2]:
        raise UsageError(f"soft_trees: inputs are samples by {e['w'].shape[2]} features, not {list(x.shape)}")
    s = expit(np.einsum("mnf,xf->mxn", e["w"], x) + e["b"][:, None, :])  # the share that goes left
    return np.einsum("mxl,mlc->mxc", shares(s, tree), e["pi"])


def shares(s: Array, tree: str) -> Array:
    """How much of a sample gets to each leaf, from how much goes left at each split (the last axis)."""
    reached = np.ones((*s.shape[:-1], 1))
    if tree in ("non_oblivious", "oblivious"):
        depth = s.shape[-1] if tree == "oblivious" else (s.shape[-1] + 1).bit_length() - 1
        for d in range(depth):
            left = s[..., d : d + 1] if tree == "oblivious" else s[..., 2**d - 1 : 2 ** (d + 1) - 1]
            reached = np.stack([reached * left, reached * (1 - left)], axis=-1).reshape(*s.shape[:-1], -1)
        return reached
    found = []
    for n in range(s.shape[-1]):
        left = s[..., n : n + 1]
        found.append(reached * left)
        reached = reached * (1 - left)
    return np.concatenate([*found, reached] if tree == "decision_list" else found, axis=-1)


def leaf_count(tree: str, splits: int) -> int:
    return {"oblivious": 2**splits, "modified_decision_list": splits}.get(tree, splits + 1)


def known(tree: str) -> None:
    if tree not in KINDS:
        raise UsageError(f"soft_trees: tree = {tree!r} is none of {', '.join(map(repr, KINDS))}")


def checked(e: Mapping[str, Any], tree: str, which: str) -> dict[str, Array]:
    """The ensemble's arrays in float64. UsageError for what is no ensemble of such trees."""
    known(tree)
    which = f"the {which} ensemble" if which else "an ensemble"
    if not isinstance(e, Mapping) or set(e) != {"w", "b", "pi"}:
        raise UsageError(f"soft_trees: {which} is a mapping with w, b and pi")
    found = {key: scores(e[key]) for key in ("w", "b", "pi")}
    w, b, pi = (found[key].shape for key in ("w", "b", "pi"))
    if len(w) != 3 or b != w[:2] or len(pi) != 3 or pi[0] != w[0] or 0 in (*w[:2], *pi):
        raise UsageError(
            f"soft_trees: {which} has w {list(w)}, b {list(b)} and pi {list(pi)}; they are (trees, splits, features), "
            "(trees, splits) and (trees, leaves, classes)"
        )
    splits, leaves = w[1], pi[1]
    if leaves != leaf_count(tree, splits) or (tree == "non_oblivious" and splits & (splits + 1)):
        raise UsageError(f"soft_trees: {which} has {splits} splits and {leaves} leaves a tree, which is no {tree} tree")
    if not all(np.isfinite(x).all() for x in found.values()):
        raise UsageError(f"soft_trees: {which} has values that are not finite")
    return found
