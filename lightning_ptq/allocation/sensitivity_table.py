"""The table of sensitivities."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_ptq.calibration.candidates import Choice
from lightning_ptq.errors import SensitivityError


@dataclass(frozen=True)
class SensitivityTable:
    """The rise of a measure when one layer goes from its base to a candidate, all others at their base.

    Attributes:
        measure: What rises: ``"kl"`` (nats), ``"mse"``, ``"loss"`` (the module's own), ``"fisher"`` (estimated kl).
        base: Each layer's base candidate.
        base_value: The measure with all layers at their base, mean over the samples.
        rises: By layer and candidate, mean over the samples; 0 at the base.
        errors: Standard error of each rise over the calibration batches; NaN if there is only one batch.
        samples: Calibration samples.
        seconds: Time it took.
    """

    measure: str
    base: dict[str, str]
    base_value: float
    rises: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0

    @property
    def candidates(self) -> list[str]:
        """All candidates, in the order of the layers; not every layer need have them all."""
        return list(dict.fromkeys(candidate for row in self.rises.values() for candidate in row))

    def predict(self, choice: Choice) -> float:
        """The measure at ``choice`` if rises add up: the base value and the sum of the layers' rises."""
        return self.base_value + sum(self.rises[name][candidate] for name, candidate in choice.items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            SensitivityError: If the file holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise SensitivityError(f"{os.fspath(path)} holds no sensitivity table ({error}).") from error
