"""The state of a calibrated module at one time, and how to restore it after any stage has changed the module."""

from __future__ import annotations

from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.network.record import RECORD
from lightning_ptq.runtime.patching import TensorSnapshot


class SavedState:
    """What later stages change of a calibrated module: the layers' bit widths and tensors, and all other tensors.

    Args:
        calibration: A calibrated module; its tensors are copied.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self._layers = {name: (layer.qconfig, layer.state()) for name, layer in calibration.layers.items()}
        self._others = TensorSnapshot(_tensors_outside_layers(calibration))

    def restore_layers(self) -> None:
        """Restore the layers only."""
        for name, (qconfig, state) in self._layers.items():
            if qconfig is not None:  # attach the quantizers of the former specs before loading their scales
                self.calibration.round_to_nearest(name, qconfig)
                self.calibration.layers[name].load_state(state)

    def restore(self) -> None:
        """Restore the module."""
        self.restore_layers()
        self._others.restore()


def _tensors_outside_layers(calibration: Calibration) -> dict[str, Tensor]:
    inside = {id(tensor) for layer in calibration.layers.values() for tensor in layer.tensors().values()}
    found = calibration.module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor) and id(value) not in inside and not name.endswith(RECORD)
    }
