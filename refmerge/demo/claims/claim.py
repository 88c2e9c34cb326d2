"""What a claim is: what a paper says, what is measured here, and when that counts as the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Check", "Claim", "Numbers"]

Numbers = dict[str, float]


@dataclass(frozen=True)
class Check:
    """better is above worse by more than margin, or also by just that if equal; both are keys of the numbers, or numbers."""

    better: str | float
    worse: str | float
    margin: float = 0.0
    equal: bool = False

    def holds(self, numbers: Mapping[str, float]) -> bool:
        better, worse = (numbers[x] if isinstance(x, str) else x for x in (self.better, self.worse))
        return better > worse + self.margin or (self.equal and better == worse + self.margin)

    @property
    def bound(self) -> str:
        """What it must be above."""
        sign = "-" if self.margin < 0 else "+"
        return f"{self.worse} {sign} {abs(self.margin):g}" if self.margin else str(self.worse)

    def __str__(self) -> str:
        return f"{self.better} {'>=' if self.equal else '>'} {self.bound}"


@dataclass(frozen=True)
class Claim:
    """system: the page of what the claim is about. says: what the paper says. tried: what was done here. measure: numbers of
    a seed, of which `shown` are printed. checks: what must hold. why: a guess, for where it does not. also: keys of numbers
    that are printed besides."""

    system: str
    says: str
    tried: str
    measure: Callable[[int], Numbers]
    checks: Sequence[Check]
    why: str = ""
    also: Sequence[str] = ()

    @property
    def shown(self) -> list[str]:
        """The keys that its checks compare, and others that are printed."""
        keys = [key for check in self.checks for key in (check.better, check.worse) if isinstance(key, str)]
        return list(dict.fromkeys([*keys, *self.also]))

    def holds(self, numbers: Mapping[str, float]) -> bool:
        return all(check.holds(numbers) for check in self.checks)
