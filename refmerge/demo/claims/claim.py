"""What a claim is: what a paper says, what is measured here, and when that counts as the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Check", "Claim", "Numbers"]

Numbers = dict[str, float]


@dataclass(frozen=True)
class Check:
    """better, a key of the numbers, is above worse, a key or a number, by more than margin."""

    better: str
    worse: str | float
    margin: float = 0.0

    def holds(self, numbers: Mapping[str, float]) -> bool:
        worse = numbers[self.worse] if isinstance(self.worse, str) else self.worse
        return numbers[self.better] > worse + self.margin

    def __str__(self) -> str:
        sign = "-" if self.margin < 0 else "+"
        return f"{self.better} > {self.worse}" + (f" {sign} {abs(self.margin):g}" if self.margin else "")


@dataclass(frozen=True)
class Claim:
    """system: registry name of what the claim is about. says: what the paper says. tried: what was done here. measure: numbers
    of a seed, of which `shown` are printed. checks: what must hold. why: a guess, for where it does not. needs: registry names
    besides."""

    system: str
    says: str
    tried: str
    measure: Callable[[int], Numbers]
    checks: Sequence[Check]
    why: str = ""
    needs: Sequence[str] = ()

    @property
    def shown(self) -> list[str]:
        """The keys that its checks compare."""
        keys = [key for check in self.checks for key in (check.better, check.worse) if isinstance(key, str)]
        return list(dict.fromkeys(keys))

    def holds(self, numbers: Mapping[str, float]) -> bool:
        return all(check.holds(numbers) for check in self.checks)
