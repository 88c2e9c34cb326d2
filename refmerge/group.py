"""What a method may ask about all that it merges: `group.sum`, `max`, `count`, `kth_largest` and `top`.

A method runs on a block. Where the block is all that `group` ranges over, a question is answered at once. Otherwise the
first question without an answer records this block's part of it and ends the block (`Pause`); when all blocks have passed,
the answer is made and the method is run again with it. Questions are therefore answered in passes, and nothing larger than
a block is held. Parts are combined so that their order does not matter: exact sums, maxima, counts, histograms.

Before a pass whose question is not known yet, the engine runs the method on small samples of the group. A selection takes
from them a bracket that its answer very likely lies in, so that one pass over the blocks counts what is above and holds
what is inside. The answer is exact: if the bracket misses, or too much lies in it, histograms of the bits take over.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import is_numpy_array

from refmerge.errors import UsageError
from refmerge.numeric import STRETCH, array_namespace, exact_sum, expansion, host, leaf_sums
from refmerge.selection import Selection, count_equal, flat, kth_largest, top_mask

__all__ = ["Group", "Log", "Pause", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies: the how-many-th of its group, its tensor, its first element, and the tensor's size."""

    ordinal: int
    tensor: str
    start: int
    stop: int
    size: int


class Pause(BaseException):
    """Ends the run of a method on a block at a question that is not answered yet."""


class Log:
    """The questions of one group, with the answers so far and the one that a pass is collecting."""

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.answered: list[_Question] = []
        self.pending: _Question | None = None
        self.sampling = False
        self._lock = threading.Lock()

    def open(self, make: Callable[[], _Question], what: tuple[Any, ...]) -> _Question:
        with self._lock:
            if self.pending is None:
                self.pending = make()
            _check_same(self.pending.what, what)
            return self.pending

    def add(self, question: _Question, place: Place, part: Any) -> None:
        with self._lock:
            question.merge(place, part)
            question.contributions += 1

    def end_of_samples(self) -> None:
        """Let the pending question make what it can of the samples; none of them counts as a block."""
        self.sampling = False
        if self.pending is not None:
            self.pending.end_of_samples()
            self.pending.contributions = 0

    def end_of_pass(self) -> None:
        """Make the pending question's answer if every block contributed and no further pass is needed."""
        question = self.pending
        if question is None:
            return
        if question.contributions < self.blocks:  # others were still busy with a question about their tensor
            question.reset()
        elif question.end_of_pass():
            self.answered.append(question)
            self.pending = None
        question.contributions = 0


def _check_same(asked: tuple[Any, ...], what: tuple[Any, ...]) -> None:
    """All blocks ask the same. UsageError where parameters that differ between tensors ask the group for another k."""
    if asked == what:
        return
    if asked[:2] == what[:2]:
        ks = f"{list(asked[2])} and {list(what[2])}"
        raise UsageError(f"tensors of one group ask it for different k ({ks}): parameters that differ between tensors need "
                         "over='tensor' (in a recipe, over: tensor)")  # fmt: skip
    raise TypeError(f"blocks asked different questions: {asked} and {what}")


class Group:
    """The answers for one block. All answers are Python floats and ints, the same for every block size and backend.

    A question about one array is answered by one value, about several by a tuple; so is one with a sequence of k.

    size: number of elements of the floating-point tensors in the group.
    tensor: the same questions about this block's tensor alone, when the group is larger.
    """

    def __init__(self, log: Log, place: Place, tensor: Group | None = None) -> None:
        self._log, self._place, self._asked = log, place, 0
        self._tensor = tensor

    @property
    def size(self) -> int:
        return self._log.size

    @property
    def tensor(self) -> Group:
        return self._tensor or self

    def _ask(self, kind: type[_Question], xs: Sequence[Any], k: tuple[int, ...] = (), alone: bool = True) -> Any:
        log, place = self._log, self._place
        what = (kind.__name__, len(xs), k)

        def make() -> _Question:
            return kind(len(xs), k, log.size)

        if log.blocks == 1 and log.sampling:  # a stretch of a tensor that is one block knows nothing of the whole
            raise Pause
        if log.blocks == 1:  # the block is the whole group
            question = make()
            answer = question.at_once(xs, place)
            return answer[0] if alone and len(xs) == 1 else answer
        i, self._asked = self._asked, self._asked + 1
        if i < len(log.answered):
            _check_same(log.answered[i].what, what)
            answer = log.answered[i].answer(place, xs)
            return answer[0] if alone and len(xs) == 1 else answer
        question = log.open(make, what)
        if log.sampling:
            question.sample(place, xs)
        else:
            log.add(question, place, question.part(place, xs))
        raise Pause

    def sum(self, *xs: Any) -> Any:
        """Sum of each array over the group: the correctly rounded sum of leaves of 1024, each a float64 tree."""
        return self._ask(_Sum, xs)

    def max(self, *xs: Any) -> Any:
        """Largest element of each array over the group; NaN if one is NaN, -inf for an empty group."""
        return self._ask(_Max, xs)

    def count(self, *masks: Any) -> Any:
        """How many elements of each boolean array are true."""
        return self._ask(_Count, masks)

    def kth_largest(self, *xs: Any, k: int | Sequence[int]) -> Any:
        """The k-th largest element (k from 1) of each array over the group, exactly; NaN counts as the largest."""
        ks = self._ks(xs, k)
        if not all(1 <= k <= self.size for k in ks):
            raise UsageError(f"kth_largest: k = {ks} of {self.size} elements")
        return self._ask(_KthLargest, xs, ks, isinstance(k, int))

    def top(self, *xs: Any, k: int | Sequence[int]) -> Any:
        """A 0/1 mask of the k largest elements of each array: exactly k ones in the group, ties to the lower index
        (tensors by sorted name, then C order), NaN as the largest."""
        ks = tuple(min(max(k, 0), self.size) for k in self._ks(xs, k))
        return self._ask(_Top, xs, ks, isinstance(k, int))

    @staticmethod
    def _ks(xs: Sequence[Any], k: int | Sequence[int]) -> tuple[int, ...]:
        ks = (k,) * len(xs) if isinstance(k, int) else tuple(k)
        if len(ks) != len(xs):
            raise UsageError(f"{len(xs)} arrays, {len(ks)} values of k")
        return ks


class _Question:
    """One question about `n` arrays: parts are taken of blocks, merged in any order, and answered at the end."""

    def __init__(self, n: int, k: tuple[int, ...], size: int) -> None:
        self.n, self.k, self.size = n, k, size
        self.what = (type(self).__name__, n, k)
        self.contributions = 0
        self.reset()

    wants_samples = False

    def reset(self) -> None: ...

    def sample(self, place: Place, xs: Sequence[Any]) -> None:
        """Look at a small part of the group that will come again in a block."""

    def end_of_samples(self) -> None: ...

    def part(self, place: Place, xs: Sequence[Any]) -> Any:
        raise NotImplementedError

    def merge(self, place: Place, part: Any) -> None:
        raise NotImplementedError

    def end_of_pass(self) -> bool:
        """True when the answer is there; False asks for one more pass."""
        return True

    def answer(self, place: Place, xs: Sequence[Any]) -> tuple[Any, ...]:
        raise NotImplementedError

    def at_once(self, xs: Sequence[Any], place: Place) -> tuple[Any, ...]:
        while True:
            self.merge(place, self.part(place, xs))
            if self.end_of_pass():
                return self.answer(place, xs)


class _Sum(_Question):
    def reset(self) -> None:
        self._parts: list[list[float]] = [[] for _ in range(self.n)]
        # A stretch that borders of blocks cut: (array, tensor, stretch) -> its pieces by offset, until it is whole.
        self._cut: dict[tuple[int, str, int], dict[int, np.ndarray]] = {}

    def part(self, place: Place, xs: Sequence[Any]) -> Any:
        parts, cut = [], []
        for i, x in enumerate(xs):
            x = flat(x)
            stop = place.start + x.shape[0]
            first = min(-place.start % STRETCH, x.shape[0])
            last = x.shape[0] if stop >= place.size else max(first, x.shape[0] - stop % STRETCH)
            parts.append(expansion(host(leaf_sums(x[first:last])).tolist()))
            for a, b in ((0, first), (last, x.shape[0])):
                if a < b:
                    cut.append(((i, place.tensor, (place.start + a) // STRETCH), place.start + a, np.array(host(x[a:b]))))
        return parts, cut

    def merge(self, place: Place, part: Any) -> None:
        parts, cut = part
        for i, new in enumerate(parts):
            self._add(i, new)
        for key, offset, piece in cut:
            pieces = self._cut.setdefault(key, {})
            pieces[offset] = piece
            i, _, stretch = key
            if sum(p.size for p in pieces.values()) == min(STRETCH, place.size - stretch * STRETCH):
                whole = np.concatenate([pieces[at] for at in sorted(pieces)])
                self._add(i, expansion(leaf_sums(whole).tolist()))
                del self._cut[key]

    def _add(self, i: int, parts: list[float]) -> None:
        self._parts[i].extend(parts)
        if len(self._parts[i]) > 4096:
            self._parts[i] = expansion(self._parts[i])

    def end_of_pass(self) -> bool:
        self._answer = tuple(exact_sum(p) for p in self._parts)
        return True

    def answer(self, place: Place, xs: Sequence[Any]) -> tuple[float, ...]:
        return self._answer


class _Max(_Question):
    def reset(self) -> None:
        self._max = [-math.inf] * self.n

    def part(self, place: Place, xs: Sequence[Any]) -> Any:
        return [float(array_namespace(x).max(x)) if x.size else -math.inf for x in map(_with_size, xs)]

    def merge(self, place: Place, part: Any) -> None:
        # + 0.0: of two zeros, neither library nor order shall choose the sign
        self._max = [b + 0.0 if math.isnan(b) or b > a else a for a, b in zip(self._max, part)]

    def answer(self, place: Place, xs: Sequence[Any]) -> tuple[float, ...]:
        return tuple(self._max)


def _with_size(x: Any) -> Any:
    return x if isinstance(getattr(x, "size", None), int) else host(x)  # torch's size is a method


class _Count(_Question):
    def reset(self) -> None:
        self._count = [0] * self.n

    def part(self, place: Place, xs: Sequence[Any]) -> Any:
        return [int(np.count_nonzero(x) if is_numpy_array(x) else array_namespace(x).count_nonzero(x)) for x in xs]

    def merge(self, place: Place, part: Any) -> None:
        self._count = [a + b for a, b in zip(self._count, part)]

    def answer(self, place: Place, xs: Sequence[Any]) -> tuple[int, ...]:
        return tuple(self._count)


class _KthLargest(_Question):
    """Exact selection of the k-th largest; see Selection."""

    wants_samples = True

    def reset(self) -> None:
        self._states = [Selection(k, self.size) for k in self.k]

    def sample(self, place: Place, xs: Sequence[Any]) -> None:
        for s, x in zip(self._states, xs):
            s.sample(place, flat(x))

    def end_of_samples(self) -> None:
        for s in self._states:
            s.end_of_samples()

    def part(self, place: Place, xs: Sequence[Any]) -> Any:
        return [s.part(flat(x)) for s, x in zip(self._states, xs)]

    def merge(self, place: Place, part: Any) -> None:
        for s, p in zip(self._states, part):
            s.merge(place, p)

    def end_of_pass(self) -> bool:
        ended = [s.end_of_pass() for s in self._states]  # each of them, not only up to the first that has to go on
        return all(ended)

    def answer(self, place: Place, xs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(s.value for s in self._states)

    def at_once(self, xs: Sequence[Any], place: Place) -> tuple[Any, ...]:
        return tuple(kth_largest(host(flat(x)), k) for x, k in zip(xs, self.k))


class _Top(_KthLargest):
    """The k-th largest, and how many of the elements equal to it each block may keep."""

    def reset(self) -> None:
        self._states = [Selection(k, self.size, ties=True) for k in self.k]

    def answer(self, place: Place, xs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(top_mask(x, s.k, s.size, s.value, *s.ties_of(place)) for s, x in zip(self._states, xs))

    def at_once(self, xs: Sequence[Any], place: Place) -> tuple[Any, ...]:
        masks = []
        for x, k in zip(xs, self.k):
            kth, kept, tied = math.nan, 0, 0
            if 0 < k < self.size:
                values = host(flat(x))
                kth = kth_largest(values, k)
                tied = count_equal(values, kth)
                above = 0 if math.isnan(kth) else values.size - int(np.count_nonzero(values <= kth))
                kept = k - above
            masks.append(top_mask(x, k, self.size, kth, kept, tied))
        return tuple(masks)
