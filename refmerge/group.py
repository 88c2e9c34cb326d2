"""What a method may ask about all that it merges: `group.sum`, `dot`, `gram`, `max`, `count`, `kth_largest` and `top`.

A method runs on a block. Where the block is all that `group` ranges over, a question is answered at once. Otherwise the
first question without an answer makes this block's part of it and ends the block (`Pause`); when all blocks have passed,
the answer is made and the method is run again with it. Questions are therefore answered in passes, and nothing larger than
a block is held. Parts are combined so that their order does not matter: exact sums, maxima, counts, histograms.

Two sides meet here. A block knows only a `State`, small and self-contained: the answers so far, and what this pass wants
of it; so blocks can be computed anywhere. A `Log` keeps a group's questions where the parts come together.

Before a pass whose question is not known yet, the engine runs the method on small samples of the group. A selection takes
from them a bracket that its answer very likely lies in, so that one pass over the blocks counts what is above and holds
what is inside. The answer is exact: if the bracket misses, or too much lies in it, histograms of the bits take over.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from array_api_compat import is_numpy_array

from refmerge.errors import UsageError
from refmerge.fused import Lazy
from refmerge.numeric import STRETCH, array_namespace, exact_sum, expansion, host, hosts, in_float64, keys_of, leaf_sums
from refmerge.selection import Selection, count_equal, first_want, flat, kth_largest, top_mask

__all__ = ["Asked", "Group", "Log", "Pause", "Place", "State", "Sum"]

PIECE = 16 * STRETCH  # elements of a whole tensor that are added at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies: the how-many-th of its group, its tensor, its first element, and the tensor's size."""

    ordinal: int
    tensor: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A question: its kind, of how many arrays, and the k of a selection."""

    kind: str
    n: int
    k: tuple[int, ...] = ()

    def check_same(self, other: Asked) -> None:
        """All blocks ask the same. UsageError where parameters that differ between tensors ask the group for another k."""
        if self == other:
            return
        if (self.kind, self.n) == (other.kind, other.n):
            raise UsageError(
                f"tensors of one group ask it for different k ({list(other.k)} and {list(self.k)}): parameters that differ "
                "between tensors need over='tensor' (in a recipe, over: tensor)"
            )
        raise TypeError(f"blocks asked different questions: {other} and {self}")


@dataclass(frozen=True, slots=True)
class State:
    """What one block knows of its group: its size and number of blocks, the questions answered so far with what the block
    needs of each answer, and what the pending question wants of it (None: it is not known yet what will be asked)."""

    size: int
    blocks: int
    answers: tuple[tuple[Asked, Any], ...] = ()
    want: Any = None
    sampling: bool = False


class Pause(BaseException):
    """Ends the run of a method on a block at a question that is not answered yet.

    of_tensor: asked of the block's tensor rather than of the group. asked: None where a sample has nothing to say.
    """

    def __init__(self, of_tensor: bool, asked: Asked | None, part: Any = None) -> None:
        super().__init__(of_tensor, asked, part)
        self.of_tensor, self.asked, self.part = of_tensor, asked, part


def condense(places: Sequence[Place], pauses: Sequence[Pause | None], size: int) -> None:
    """Put together the parts of a run of blocks that all stopped at the same question, in place."""
    stopped = [p for p in pauses if p is not None]
    questions = {(p.of_tensor, p.asked) for p in stopped}
    asked = questions.pop()[1] if len(questions) == 1 else None
    if asked is not None:
        where = [place for place, p in zip(places, pauses) if p is not None]
        parts = _KINDS[asked.kind].condense(asked, where, [p.part for p in stopped], size)
        for p, part in zip(stopped, parts):
            p.part = part


class Log:
    """The questions of one group, with the answers so far and the one that a pass is collecting."""

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.answered: list[_Question] = []
        self.pending: _Question | None = None
        self.sampling = False

    def state(self, place: Place) -> State:
        """What the block at this place needs to know."""
        answers = tuple((q.asked, q.reply(place)) for q in self.answered)
        want = None if self.pending is None else self.pending.want
        return State(self.size, self.blocks, answers, want, self.sampling)

    def add(self, place: Place, asked: Asked, part: Any) -> None:
        """Take a block's part of the pending question, or a sample's."""
        if self.pending is None:
            self.pending = _KINDS[asked.kind](asked, self.size)
        asked.check_same(self.pending.asked)
        if self.sampling:
            self.pending.add_sample(part)
        else:
            self.pending.merge(place, part)
            self.pending.contributions += 1

    def end_of_samples(self) -> None:
        """Let the pending question make what it can of the samples."""
        self.sampling = False
        if self.pending is not None:
            self.pending.end_of_samples()

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


class Group:
    """The answers for one block. All answers are Python floats and ints, the same for every block size and backend.

    A question about one array is answered by one value, about several by a tuple; so is one with a sequence of k.

    size: number of elements of the floating-point tensors in the group.
    tensor: the same questions about this block's tensor alone, when the group is larger.
    """

    def __init__(self, state: State, place: Place, tensor: State | None = None, *, of_tensor: bool = False) -> None:
        self._state, self._place, self._of_tensor, self._asked = state, place, of_tensor, 0
        self._tensor = None if tensor is None else Group(tensor, place, of_tensor=True)

    @property
    def size(self) -> int:
        return self._state.size

    @property
    def tensor(self) -> Group:
        return self._tensor or self

    def _ask(self, asked: Asked, arrays: Callable[[], Sequence[Any]], alone: bool = True) -> Any:
        """`arrays` makes the arrays that are asked about; it is not called where the answer is a number that is known."""
        answers = self._answers(asked, arrays)
        return answers[0] if alone and asked.n == 1 else answers

    def _answers(self, asked: Asked, arrays: Callable[[], Sequence[Any]]) -> Any:
        state, place, kind = self._state, self._place, _KINDS[asked.kind]
        if state.blocks == 1 and state.sampling:  # a stretch of a tensor that is one block knows nothing of the whole
            raise Pause(self._of_tensor, None)
        if state.blocks == 1:  # the block is the whole group
            return kind.at_once(asked, place, arrays(), state.size)
        i, self._asked = self._asked, self._asked + 1
        if i < len(state.answers):
            before, reply = state.answers[i]
            asked.check_same(before)
            return kind.answer(asked, reply, arrays, state.size)
        if state.sampling:
            raise Pause(self._of_tensor, asked, kind.sample(arrays()) if kind.wants_samples else None)
        want = state.want if state.want is not None else kind.first_want(asked, state.size)
        raise Pause(self._of_tensor, asked, kind.part(want, place, arrays()))

    def sum(self, *xs: Any, of: Callable[[Any], Any] | None = None) -> Any:
        """Sum of each array over the group, or of what `of` makes of each entry (xp.abs, say): the correctly rounded sum of
        leaves of 1024, each a tree of fixed shape."""
        return self._ask(Asked("sum", len(xs)), lambda: xs if of is None else _made(of, [(x,) for x in xs]))

    def dot(self, *pairs: tuple[Any, Any]) -> Any:
        """Inner product of each two arrays over the group: the sum of their products."""
        return self._ask(Asked("sum", len(pairs)), lambda: _made(operator.mul, pairs))

    def gram(self, *xs: Any) -> tuple[tuple[float, ...], ...]:
        """The matrix of the inner products of each two of these arrays. Products are made in float64, where those of float32
        are exact: what is a small difference of long vectors can be told from the matrix."""
        pairs = list(combinations_with_replacement(range(len(xs)), 2))
        found = dict(zip(pairs, self._ask(Asked("gram", len(pairs)), lambda: xs, alone=False)))
        return tuple(tuple(found[min(i, j), max(i, j)] for j in range(len(xs))) for i in range(len(xs)))

    def max(self, *xs: Any) -> Any:
        """Largest element of each array over the group; NaN if one is NaN, -inf for an empty group."""
        return self._ask(Asked("max", len(xs)), lambda: xs)

    def count(self, *masks: Any) -> Any:
        """How many elements of each boolean array are true."""
        return self._ask(Asked("count", len(masks)), lambda: masks)

    def kth_largest(self, *xs: Any, k: int | Sequence[int]) -> Any:
        """The k-th largest element (k from 1) of each array over the group, exactly; NaN counts as the largest."""
        ks = self._ks(xs, k)
        if not all(1 <= k <= self.size for k in ks):
            raise UsageError(f"kth_largest: k = {ks} of {self.size} elements")
        return self._ask(Asked("kth_largest", len(xs), ks), lambda: xs, isinstance(k, int))

    def top(self, *xs: Any, k: int | Sequence[int]) -> Any:
        """A 0/1 mask of the k largest elements of each array: exactly k ones in the group, ties to the lower index
        (tensors by sorted name, then C order), NaN as the largest."""
        ks = tuple(min(max(k, 0), self.size) for k in self._ks(xs, k))
        return self._ask(Asked("top", len(xs), ks), lambda: xs, isinstance(k, int))

    @staticmethod
    def _ks(xs: Sequence[Any], k: int | Sequence[int]) -> tuple[int, ...]:
        ks = (k,) * len(xs) if isinstance(k, int) else tuple(k)
        if len(ks) != len(xs):
            raise UsageError(f"{len(xs)} arrays, {len(ks)} values of k")
        return ks


class _Question:
    """One kind of question. Its static methods are a block's side: a part of the answer, and the answer for the block. An
    instance is the other side: it merges the parts, in any order, and makes the answer."""

    wants_samples = False
    want: Any = ()

    def __init__(self, asked: Asked, size: int) -> None:
        self.asked, self.size = asked, size
        self.contributions = 0
        self.reset()

    @staticmethod
    def first_want(asked: Asked, size: int) -> Any:
        """What is wanted of a block that is the first to ask this."""
        return ()

    @staticmethod
    def sample(xs: Sequence[Any]) -> Any:
        """What a small part of the group, that will come again in a block, has to say."""
        return None

    @staticmethod
    def part(want: Any, place: Place, xs: Sequence[Any]) -> Any:
        raise NotImplementedError

    @classmethod
    def condense(cls, asked: Asked, places: Sequence[Place], parts: Sequence[Any], size: int) -> Sequence[Any]:
        """The parts of neighbouring blocks, as little as possible of them: what can be put together already is."""
        return parts

    @staticmethod
    def answer(asked: Asked, reply: Any, arrays: Callable[[], Sequence[Any]], size: int) -> tuple[Any, ...]:
        """The answer for a block: most are numbers, and need no array."""
        return reply

    @classmethod
    def at_once(cls, asked: Asked, place: Place, xs: Sequence[Any], size: int) -> tuple[Any, ...]:
        """The answer where the block is the whole group."""
        question = cls(asked, size)
        question.merge(place, cls.part(question.want, place, xs))
        question.end_of_pass()
        return cls.answer(asked, question.reply(place), lambda: xs, size)

    def reset(self) -> None:
        """Forget the parts of an unfinished pass."""

    def add_sample(self, part: Any) -> None: ...

    def end_of_samples(self) -> None: ...

    def merge(self, place: Place, part: Any) -> None:
        raise NotImplementedError

    def end_of_pass(self) -> bool:
        """True when the answer is there; False asks for one more pass."""
        return True

    def reply(self, place: Place) -> Any:
        """What the block at this place needs of the answer."""
        raise NotImplementedError


class Sum(_Question):
    """The correctly rounded sum of leaves."""

    def reset(self) -> None:
        self._parts: list[list[float]] = [[] for _ in range(self.asked.n)]
        # A stretch that borders of blocks cut: (tensor, stretch) -> its pieces of all arrays by offset, until it is whole.
        self._cut: dict[tuple[str, int], dict[int, list[np.ndarray]]] = {}

    @staticmethod
    def part(want: Any, place: Place, xs: Sequence[Any]) -> Any:
        xs = [x if type(x) is _Made else flat(x) for x in xs]
        size = place.stop - place.start
        first = min(-place.start % STRETCH, size)
        last = size if place.stop >= place.size else max(first, size - place.stop % STRETCH)
        if first == 0 and last == size:  # without a slice, which would have to be computed first
            whole: Sequence[Any] = xs
        else:
            xs = hosts(xs) if type(xs[0]) is Lazy else xs
            whole = [x[first:last] for x in xs]
        parts = [expansion(sums.tolist()) for sums in _sums(whole)]
        cut = [
            ((place.tensor, (place.start + a) // STRETCH), place.start + a, [np.array(host(x[a:b])) for x in xs])
            for a, b in ((0, first), (last, size))
            if a < b
        ]
        return parts, cut

    @classmethod
    def condense(cls, asked: Asked, places: Sequence[Place], parts: Sequence[Any], size: int) -> Sequence[Any]:
        all_ = cls(asked, size)
        for place, part in zip(places, parts):
            all_.merge(place, part)
        cut = [(key, at, arrays) for key, pieces in all_._cut.items() for at, arrays in pieces.items()]
        nothing: tuple[list[list[float]], list[Any]] = ([[] for _ in range(asked.n)], [])
        return [([expansion(p) for p in all_._parts], cut), *[nothing] * (len(parts) - 1)]

    def merge(self, place: Place, part: Any) -> None:
        parts, cut = part
        for i, new in enumerate(parts):
            self._add(i, new)
        for key, offset, arrays in cut:
            pieces = self._cut.setdefault(key, {})
            pieces[offset] = arrays
            if sum(p[0].size for p in pieces.values()) == min(STRETCH, place.size - key[1] * STRETCH):
                whole = [np.concatenate(x) for x in zip(*(pieces[at] for at in sorted(pieces)))]
                for i, sums in enumerate(leaf_sums(*whole)):
                    self._add(i, expansion(sums.tolist()))
                del self._cut[key]

    def _add(self, i: int, parts: list[float]) -> None:
        self._parts[i].extend(parts)
        if len(self._parts[i]) > 4096:
            self._parts[i] = expansion(self._parts[i])

    def end_of_pass(self) -> bool:
        self._answer = tuple(exact_sum(p) for p in self._parts)
        return True

    def reply(self, place: Place) -> tuple[float, ...]:
        return self._answer


@dataclass(frozen=True, slots=True)
class _Made:
    """f of the entries of NumPy's arrays, of which only the part that is asked for is computed."""

    f: Callable[..., np.ndarray]
    of: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        return self.of[0].size

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.f(*(x[part] for x in self.of))


def _made(f: Callable[..., Any], of: Sequence[tuple[Any, ...]]) -> list[Any]:
    """f of the entries of each of these tuples of arrays; when it is needed, where all are NumPy's and none is broadcast."""
    if all(is_numpy_array(x) and x.shape == xs[0].shape for xs in of for x in xs):
        return [_Made(f, tuple(flat(x) for x in xs)) for xs in of]
    return [f(*xs) for xs in of]


def _sums(xs: Sequence[Any]) -> list[np.ndarray]:
    """`leaf_sums` of arrays; of NumPy's one after another, and piece by piece."""
    if not all(type(x) is _Made or is_numpy_array(x) for x in xs):
        return leaf_sums(*xs)
    return [np.concatenate([leaf_sums(x[a : a + PIECE])[0] for a in range(0, x.size or 1, PIECE)]) for x in xs]


class _Gram(Sum):
    """Sums of the products of each two arrays, which are made in float64, one after another."""

    @staticmethod
    def part(want: Any, place: Place, xs: Sequence[Any]) -> Any:
        flats = [flat(x) for x in xs]
        wide = [in_float64(x) for x in (hosts(flats) if type(flats[0]) is Lazy else flats)]
        made = [Sum.part(want, place, [xy]) for xy in _made(operator.mul, list(combinations_with_replacement(wide, 2)))]
        cut = [(c[0][0], c[0][1], [array for _, _, (array,) in c]) for c in zip(*(cut for _, cut in made))]
        return [sums for parts, _ in made for sums in parts], cut


class _Max(_Question):
    def reset(self) -> None:
        self._max = [-math.inf] * self.asked.n

    @staticmethod
    def part(want: Any, place: Place, xs: Sequence[Any]) -> Any:
        return [float(array_namespace(x).max(x)) if x.size else -math.inf for x in map(_with_size, xs)]

    def merge(self, place: Place, part: Any) -> None:
        # + 0.0: of two zeros, neither library nor order shall choose the sign
        self._max = [b + 0.0 if math.isnan(b) or b > a else a for a, b in zip(self._max, part)]

    def reply(self, place: Place) -> tuple[float, ...]:
        return tuple(self._max)


def _with_size(x: Any) -> Any:
    return x if isinstance(getattr(x, "size", None), int) else host(x)  # torch's size is a method


class _Count(_Question):
    def reset(self) -> None:
        self._count = [0] * self.asked.n

    @staticmethod
    def part(want: Any, place: Place, xs: Sequence[Any]) -> Any:
        return [int(np.count_nonzero(x) if is_numpy_array(x) else array_namespace(x).count_nonzero(x)) for x in xs]

    def merge(self, place: Place, part: Any) -> None:
        self._count = [a + b for a, b in zip(self._count, part)]

    def reply(self, place: Place) -> tuple[int, ...]:
        return tuple(self._count)


class _KthLargest(_Question):
    """Exact selection of the k-th largest; see Selection."""

    wants_samples = True
    ties = False

    def reset(self) -> None:
        self._states = [Selection(k, self.size, self.ties) for k in self.asked.k]

    @property
    def want(self) -> Any:  # type: ignore[override]
        return [s.want for s in self._states]

    @classmethod
    def first_want(cls, asked: Asked, size: int) -> Any:  # type: ignore[override]
        return [first_want(k, size, cls.ties) for k in asked.k]

    @staticmethod
    def sample(xs: Sequence[Any]) -> Any:
        return [keys_of(x) for x in hosts([flat(x) for x in xs])]

    @staticmethod
    def part(want: Any, place: Place, xs: Sequence[Any]) -> Any:
        compiled = type(xs[0]) is Lazy
        return [w.part(x, compiled) for w, x in zip(want, hosts([flat(x) for x in xs]))]

    def add_sample(self, part: Any) -> None:
        for s, sample in zip(self._states, part):
            s.add_sample(sample)

    def end_of_samples(self) -> None:
        for s in self._states:
            s.end_of_samples()

    def merge(self, place: Place, part: Any) -> None:
        for s, p in zip(self._states, part):
            s.merge(place, p)

    def end_of_pass(self) -> bool:
        ended = [s.end_of_pass() for s in self._states]  # each of them, not only up to the first that has to go on
        return all(ended)

    def reply(self, place: Place) -> tuple[Any, ...]:
        return tuple(s.value for s in self._states)

    @classmethod
    def at_once(cls, asked: Asked, place: Place, xs: Sequence[Any], size: int) -> tuple[Any, ...]:
        return tuple(kth_largest(x, k) for x, k in zip(hosts([flat(x) for x in xs]), asked.k))


class _Top(_KthLargest):
    """The k-th largest, and how many of the elements equal to it each block may keep."""

    ties = True

    def reply(self, place: Place) -> tuple[Any, ...]:
        return tuple((s.value, *s.ties_of(place)) for s in self._states)

    @staticmethod
    def answer(asked: Asked, reply: Any, arrays: Callable[[], Sequence[Any]], size: int) -> tuple[Any, ...]:
        return tuple(top_mask(x, k, size, *r) for x, k, r in zip(arrays(), asked.k, reply))

    @classmethod
    def at_once(cls, asked: Asked, place: Place, xs: Sequence[Any], size: int) -> tuple[Any, ...]:
        replies = []
        for values, k in zip(hosts([flat(x) for x in xs]), asked.k):
            kth, kept, tied = math.nan, 0, 0
            if 0 < k < size:
                kth = kth_largest(values, k)
                tied = count_equal(values, kth)
                above = 0 if math.isnan(kth) else values.size - int(np.count_nonzero(values <= kth))
                kept = k - above
            replies.append((kth, kept, tied))
        return cls.answer(asked, replies, lambda: xs, size)


_KINDS: dict[str, type[_Question]] = {
    "sum": Sum, "gram": _Gram, "max": _Max, "count": _Count, "kth_largest": _KthLargest, "top": _Top,
}  # fmt: skip
