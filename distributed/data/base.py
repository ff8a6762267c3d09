"""What every data source gives: samples by their number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class DataSource(ABC):
    """Samples that are made or read when a micro-batch needs them."""

    @property
    def resident(self) -> list[Tensor]:
        """Tensors that are held for the whole run."""
        return []

    @abstractmethod
    def __len__(self) -> int:
        """How many samples an epoch has."""

    def prefetch(self, index: Tensor) -> None:  # noqa: B027 - most have nothing to begin
        """Begin to read samples that will soon be asked for, where that takes time.

        Args:
            index: their numbers (B,).
        """

    @abstractmethod
    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """A micro-batch.

        Args:
            index: numbers of samples (B,); what they give depends on nothing else but the epoch.
            epoch: for what is drawn anew in each; 0 for held-out samples.

        Raises:
            InputError: if what was to be read is damaged.
        """


@dataclass(frozen=True)
class Samples(DataSource):
    """Inputs (S, …) with their targets (S,) or (S, context)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def resident(self) -> list[Tensor]:
        """The tensors themselves."""
        return [self.inputs, self.targets]

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """The samples of an index tensor, the same in every epoch."""
        return Samples(self.inputs[index], self.targets[index])
