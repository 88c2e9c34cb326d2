"""CMA-ES: minimise a function of a vector that gives nothing but its value.

Hansen, *The CMA Evolution Strategy: A Tutorial*, arXiv:1604.00772, with positive weights. `ask` takes the standard normal
draws and `tell` the costs, so that a search is a function of both. States are never changed: `tell` gives the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["CMA"]


@dataclass(frozen=True)
class CMA:
    """mean, sigma, C: samples are mean + sigma N(0, C). c_path and s_path: the evolution paths. generation: how many were
    told."""

    mean: np.ndarray
    sigma: float
    C: np.ndarray
    c_path: np.ndarray
    s_path: np.ndarray
    population: int
    generation: int = 0

    @staticmethod
    def start(mean: np.ndarray, sigma: float, population: int | None = None) -> CMA:
        """The first state. population: 4 + floor(3 ln N) unless given."""
        n = len(mean)
        zero = np.zeros(n)
        return CMA(np.array(mean, float), sigma, np.eye(n), zero, zero, population or 4 + math.floor(3 * math.log(n)))

    def ask(self, draws: np.ndarray) -> np.ndarray:
        """The samples of a generation, from (population, N) standard normal draws."""
        B, D = self._axes()
        return self.mean + self.sigma * (draws * D) @ B.T

    def tell(self, samples: np.ndarray, costs: np.ndarray) -> CMA:
        """The state after a generation, of whose costs less is better; NaN is the worst."""
        n, mu = len(self.mean), self.population // 2
        # 1. weights of the better half
        w = math.log((self.population + 1) / 2) - np.log(np.arange(1, mu + 1))
        w = w / w.sum()
        mu_eff = 1 / float(np.sum(w * w))
        # 2. rates
        c_s = (mu_eff + 2) / (n + mu_eff + 5)
        d_s = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_s
        c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        c_mu = min(1 - c_1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff))
        expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        # 3. mean
        order = np.argsort(np.where(np.isnan(costs), np.inf, costs), kind="stable")[:mu]
        y = (samples[order] - self.mean) / self.sigma
        step = w @ y
        mean = self.mean + self.sigma * step
        # 4. paths
        B, D = self._axes()
        s_path = (1 - c_s) * self.s_path + math.sqrt(c_s * (2 - c_s) * mu_eff) * (B @ ((B.T @ step) / D))
        length = float(np.linalg.norm(s_path))
        steady = length / math.sqrt(1 - (1 - c_s) ** (2 * (self.generation + 1))) < (1.4 + 2 / (n + 1)) * expected
        c_path = (1 - c_c) * self.c_path + (math.sqrt(c_c * (2 - c_c) * mu_eff) * step if steady else 0.0)
        # 5. covariance
        kept = 1 - c_1 - c_mu + (0.0 if steady else c_1 * c_c * (2 - c_c))
        C = kept * self.C + c_1 * np.outer(c_path, c_path) + c_mu * (y.T * w) @ y
        # 6. step size
        sigma = self.sigma * math.exp(min(1.0, c_s / d_s * (length / expected - 1)))
        return replace(
            self, mean=mean, sigma=sigma, C=(C + C.T) / 2, c_path=c_path, s_path=s_path, generation=self.generation + 1
        )

    def _axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal axes of C and the deviations along them."""
        values, B = np.linalg.eigh(self.C)
        return B, np.sqrt(np.maximum(values, 1e-20 * max(float(values[-1]), 1e-300)))
