"""A rectified flow whose velocity is known exactly: data from a mixture of Gaussians in one dimension.

With x_sigma = (1-sigma) x0 + sigma eps everything has a closed form, so what a sampler gets wrong here is the sampler's
own doing and no network's.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Mixture:
    """Data x0: component k with probability `weights[k]`, then N(means[k], stds[k]^2)."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _columns(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log weight, mean and variance of each component of x_sigma, float64 [K]."""
        weights, means, stds = torch.tensor((self.weights, self.means, self.stds), dtype=torch.float64)
        return weights.log(), (1 - sigma) * means, (1 - sigma) ** 2 * stds**2 + sigma**2

    def _log_joint(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        log_weights, means, variances = self._columns(sigma)
        return log_weights - 0.5 * ((x[:, None] - means) ** 2 / variances + (2 * math.pi * variances).log())

    def log_density(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """log p_sigma(x), float64 [n], for `x` float64 [n]."""
        return self._log_joint(x, sigma).logsumexp(1)

    def velocity(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[eps - x0 | x_sigma = x] = (x - E[x0 | x]) / sigma, float64 [n]; `sigma` above 0."""
        _, means, variances = self._columns(sigma)
        data_means, stds = torch.tensor((self.means, self.stds), dtype=torch.float64)
        shares = self._log_joint(x, sigma).softmax(1)  # P(component | x)
        x0_of_component = data_means + (1 - sigma) * stds**2 / variances * (x[:, None] - means)
        return (x - (shares * x0_of_component).sum(1)) / sigma

    def quantiles(self, count: int) -> torch.Tensor:
        """The data's quantiles (i + 1/2) / count, float64 [count]: its best stand-in by that many points."""
        width = 10 * max(self.stds)
        grid = np.linspace(min(self.means) - width, max(self.means) + width, 200_001)
        _, means, variances = self._columns(0.0)
        weights, points = torch.tensor(self.weights, dtype=torch.float64), torch.from_numpy(grid)
        below = (torch.special.ndtr((points[:, None] - means) / variances.sqrt()) * weights).sum(1)
        return torch.from_numpy(np.interp((np.arange(count) + 0.5) / count, below.numpy(), grid))


def normal_quantiles(count: int) -> torch.Tensor:
    """The standard normal's quantiles (i + 1/2) / count, float64 [count]."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def wasserstein(x: torch.Tensor, sorted_y: torch.Tensor) -> float:
    """Wasserstein-1 distance of two sets of equally many points: sorted, each goes to its partner."""
    return (x.sort().values - sorted_y).abs().mean().item()
