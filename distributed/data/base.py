"""The interface of data sources: samples selected by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class DataSource(ABC):
    """Samples that are generated or read when a micro-batch needs them."""

    @property
    def resident(self) -> list[Tensor]:
        """Tensors that stay in memory for the entire run."""
        return []

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples in an epoch."""

    def fingerprint(self) -> str | None:
        """Return what changes when the data is exchanged; None for data that is made here, the same everywhere."""
        return None

    def prefetch(self, index: Tensor, epoch: int = 0) -> None:  # noqa: B027 - most sources have nothing to prefetch
        """Start reading samples that will be selected soon, for sources where reading is slow.

        Args:
            index: sample indices (B,).
            epoch: epoch number, as in `select`.
        """

    @abstractmethod
    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """Return a micro-batch.

        Args:
            index: sample indices (B,); a sample depends only on its index and the epoch.
            epoch: epoch number, for sources that draw new random values in each; 0 for held-out samples.

        Raises:
            InputError: if a file to read is damaged.
        """


@dataclass(frozen=True)
class Samples(DataSource):
    """Samples in memory: inputs (S, …) with targets (S,) or (S, context)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def resident(self) -> list[Tensor]:
        """Inputs and targets."""
        return [self.inputs, self.targets]

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """Return the samples at the given indices, the same in every epoch."""
        return Samples(self.inputs[index], self.targets[index])
