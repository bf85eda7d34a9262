"""The singular values of an update: which rank it really uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from ...backend import to_host
from ...shown import shown
from .compress import noise_level
from .factors import LowRank, core_of

__all__ = ["Spectrum", "spectrum"]


@shown
@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of an update, and what they say about the rank that it uses.

    Attributes
    ----------
    singular_values : numpy.ndarray of float64
        Largest first; those that are rounding are 0.
    r : int
        The rank that its factors allow.
    """

    singular_values: numpy.ndarray
    r: int

    @property
    def norm(self) -> float:
        """||D||_F."""
        return float(numpy.sqrt((self.singular_values ** 2).sum()))

    @property
    def rank(self) -> int:
        """The numerical rank: the number of singular values above rounding."""
        return int(numpy.count_nonzero(self.singular_values))

    @property
    def effective_rank(self) -> float:
        """exp(-sum p_j log p_j) with p_j = sigma_j / sum sigma: r if all are equal, 1 if one rules, 0 for a zero update.

        Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
        """
        kept = self.singular_values[self.singular_values > 0]
        p = kept / kept.sum()
        return math.exp(-float((p * numpy.log(p)).sum())) if len(kept) else 0.0

    @property
    def stable_rank(self) -> float:
        """||D||_F^2 / sigma_1^2; 0 for a zero update."""
        return float(((self.singular_values / self.singular_values[0]) ** 2).sum()) if self.rank else 0.0

    @property
    def energy(self) -> numpy.ndarray:
        """The part of ||D||_F^2 in the first j values, j = 1, 2, ...; ones for a zero update."""
        total = numpy.cumsum(self.singular_values ** 2)
        return total / total[-1] if self.rank else numpy.ones_like(total)

    def rank_at(self, energy: float) -> int:
        """The fewest values that hold this part of ||D||_F^2."""
        return int(numpy.argmax(self.energy >= min(energy, self.energy[-1]))) + 1

    def __str__(self) -> str:
        lines = [f"{'j':>4}  {'sigma_j':>11}  {'energy to j':>11}"]
        lines += [f"{j:>4}  {sigma:>11.4g}  {energy:>11.6f}" for j, sigma, energy
                  in zip(range(1, len(self.energy) + 1), self.singular_values, self.energy)]
        return "\n".join([*lines, f"norm {self.norm:.4g}, rank {self.rank} of {self.r}, effective {self.effective_rank:.2f}, "
                                  f"stable {self.stable_rank:.2f}, {self.rank_at(0.99)} hold 99 % of the energy"])


def spectrum(update: LowRank) -> Spectrum:
    """The singular values of D and the ranks that follow from them. O((out + in) r^2); r numbers go to the host.

    Examples
    --------
    >>> import numpy
    >>> print(spectrum(LowRank(A=numpy.diag([2.0, 0.0, 2.0]), B=numpy.eye(3))))
       j      sigma_j  energy to j
       1            2     0.500000
       2            2     1.000000
       3            0     1.000000
    norm 2.828, rank 2 of 3, effective 2.00, stable 2.00, 2 hold 99 % of the energy
    """
    core, size, _, _ = core_of(update, vectors=False)
    sigma = to_host(update.device.exact.linalg.svd(core, compute_uv=False))
    return Spectrum(numpy.where(sigma > noise_level(update.shape, float(size)), sigma, 0.0), update.r)
