"""The measures of degradation, and the table of sensitivities."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lightning_ptq.calibration.candidates import Choice
from lightning_ptq.errors import SensitivityError

Measure = Literal["kl", "mse", "loss", "fisher"]
"""How degradation is measured. Between the outputs of the float and the quantized network: ``"kl"``, the
Kullback-Leibler divergence in nats, or ``"mse"``. ``"loss"``: the module's own loss. ``"fisher"``: an estimate of
``"kl"``."""

MEASURES: tuple[str, ...] = get_args(Measure)
"""All values of :data:`Measure`."""


@dataclass(frozen=True)
class SensitivityTable:
    """The rise of a measure when one layer goes from its base to a candidate, with all other layers at their base.

    Attributes:
        measure: The measure, one of :data:`MEASURES`.
        base: Base candidate of each layer.
        base_value: The measure with all layers at their base, mean over the samples.
        rises: Rise by layer and candidate, mean over the samples; 0 at the base.
        errors: Standard error of each rise over the calibration batches; NaN if there is only one batch.
        samples: Number of calibration samples.
        seconds: Duration of the measurement.
    """

    measure: Measure
    base: dict[str, str]
    base_value: float
    rises: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0

    @property
    def candidates(self) -> list[str]:
        """All candidates, in the order of the layers; a layer may have only some of them."""
        return list(dict.fromkeys(candidate for row in self.rises.values() for candidate in row))

    def predict(self, choice: Choice) -> float:
        """Return the measure at ``choice`` if rises add up: the base value plus the rise of each layer."""
        return self.base_value + sum(self.rises[name][candidate] for name, candidate in choice.items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Read a table that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            SensitivityError: If the file does not contain a sensitivity table.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise SensitivityError(
                f"{os.fspath(path)} is not a sensitivity table ({error}). Name a file that SensitivityTable.save wrote."
            ) from error
