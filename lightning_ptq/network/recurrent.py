"""Recurrent layers and cells of torch: weights per row of a gate, and quantized inputs and hidden states.

Quantized layers run step by step in Python. In float they are torch's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq.network.fused import FusedLayer, See
from lightning_ptq.network.layers import QuantLayer, register_layer
from lightning_ptq.network.swapping import ReplaceableTensor

States = tuple[Tensor, ...]
"""Hidden state (samples, size), and the cell state of an LSTM."""

Step = Callable[[Tensor, Tensor, States], States]
"""Function of the products of the input, those of the hidden state, and the states, which returns the next states."""


def _lstm(of_input: Tensor, of_hidden: Tensor, states: States) -> States:
    entry, forget, cell, out = (of_input + of_hidden).chunk(4, -1)
    memory = forget.sigmoid() * states[1] + entry.sigmoid() * cell.tanh()
    return out.sigmoid() * memory.tanh(), memory


def _gru(of_input: Tensor, of_hidden: Tensor, states: States) -> States:
    (reset, update, new), (hidden_reset, hidden_update, hidden_new) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return ((states[0] - new) * (update + hidden_update).sigmoid() + new,)


def _tanh(of_input: Tensor, of_hidden: Tensor, states: States) -> States:
    return ((of_input + of_hidden).tanh(),)


def _relu(of_input: Tensor, of_hidden: Tensor, states: States) -> States:
    return ((of_input + of_hidden).relu(),)


_STEPS: dict[Any, Step] = {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu}
_CELL_STEPS: dict[Any, Step] = {
    torch.lstm_cell: _lstm, torch.gru_cell: _gru, torch.rnn_tanh_cell: _tanh, torch.rnn_relu_cell: _relu,
}  # fmt: skip


class _Recurrent(FusedLayer):
    """What layers and cells have in common."""

    bias: Any  # a flag

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of a call: every weight is used once per time step of a sample."""
        values = self.output_tensor(output)
        return float(self.weight_count * values.numel() / max(values.shape[-1], 1))

    def channel_dim(self, output: Tensor) -> int:
        """Return the last dimension."""
        return output.dim() - 1


class _Layer(_Recurrent):
    """Recurrent layers. Each of the stacked layers and directions has inputs and weights of its own.

    Attributes:
        float_mode: What the float class calls its mode.
    """

    added_names = (*(name for name in QuantLayer.added_names if name != "mode"), "float_mode")
    input_names = ("input_l0", "hidden_l0")
    weight_names = ("weight_ih_l0", "weight_hh_l0")
    bias_names = ()
    functions = tuple(_STEPS)
    mode: Any = ReplaceableTensor("mode")  # the float class's forward sees its own

    batch_first: bool
    dropout: float
    training: bool
    num_layers: int
    bidirectional: bool
    proj_size: int
    float_mode: str
    _flat_weights_names: list[str]

    def _init_swapped(self) -> None:
        self.__dict__["float_mode"] = self.__dict__["mode"]
        suffixes = [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]
        inputs = [f"input_l{layer}" for layer in range(self.num_layers)]
        inputs += [f"hidden_{suffix}" for suffix in suffixes]
        inputs += [f"projected_{suffix}" for suffix in suffixes if self.proj_size]
        self.__dict__["input_names"] = tuple(inputs)
        self.__dict__["bias_names"] = tuple(name for name in self._flat_weights_names if name.startswith("bias"))
        super()._init_swapped()

    @classmethod
    def weight_names_of(cls, module: Any) -> tuple[str, ...]:
        """Return the names of the weights of a float layer."""
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))

    @classmethod
    def _added(cls) -> set[str]:
        return super()._added() - {"flatten_parameters"}

    def flatten_parameters(self) -> None:
        """Do nothing: the weights that torch lays out for its own functions are replaced."""

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        """Return the ends of the names of the tensors of one of the stacked layers, for each direction."""
        return (f"l{layer}", f"l{layer}_reverse") if self.bidirectional else (f"l{layer}",)

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs and the hidden states of all steps, by name; in the layout of the input where it has one.

        The layer runs in float to find them.
        """
        seen = self.inputs_seen(args, kwargs)
        given = next(iter((*args, *kwargs.values())))
        return {
            name: _like(torch.cat(found[::-1] if name.endswith("_reverse") else found), given, self.batch_first)
            for name, found in seen.items()
        }

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any]) -> Any:
        if torch.compiler.is_dynamo_compiling() and not _is_exporting():  # which takes no recurrent layers of torch
            return torch.compiler.disable(super()._call)(args, kwargs, tensors)
        return super()._call(args, kwargs, tensors)

    def _with_functions(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any], compute: Callable[..., Any]
    ) -> Any:
        # The function gets the tensors from `compute`: torch would keep those that it finds on the module.
        return super()._with_functions(args, kwargs, {"mode": self.float_mode}, compute)

    def compute(self, func: Any, tensors: Mapping[str, Any], see: See | None, *args: Any, **kwargs: Any) -> Any:
        """Compute one of torch's functions of recurrent layers."""
        weights = {name: tensors.get(name, getattr(self, name)) for name in self._flat_weights_names}
        packed = not isinstance(args[3], bool)
        if see is None:
            place = 3 if packed else 2
            return func(*args[:place], list(weights.values()), *args[place + 1 :], **kwargs)
        x, sizes, hx = args[:3] if packed else (args[0], None, args[1])
        turned = not packed and self.batch_first
        if sizes is None:
            x = x.transpose(0, 1) if turned else x
            sizes, length = [x.shape[1]] * x.shape[0], x.shape[0]
            x = x.flatten(0, 1)
        else:
            sizes = sizes.tolist()
        first = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        x, last = self._unrolled(x, sizes, first, _STEPS[func], weights, see)
        if not packed:
            x = x.unflatten(0, (length, -1))
            x = x.transpose(0, 1) if turned else x
        return x, *last

    def _unrolled(
        self, x: Tensor, sizes: Sequence[int], first: States, step: Step, weights: Mapping[str, Tensor], see: See
    ) -> tuple[Tensor, States]:
        """Run all steps of all stacked layers.

        Args:
            x: Inputs of all steps, one after the other (rows, width).
            sizes: Number of samples in each step, not increasing.
            first: States (layers * directions, samples, size) before the first step.
            step: What a step computes.
            weights: Weights and biases by name.
            see: Called with each input before it is multiplied.

        Returns:
            The outputs of all steps, and the states after the last.
        """
        last: list[States] = []
        for layer in range(self.num_layers):
            x = see(f"input_l{layer}", x)
            outputs = []
            for suffix in self._suffixes(layer):
                states = tuple(state[len(last)] for state in first)
                output, states = _one_direction(x, sizes, states, step, suffix, weights, see)
                outputs.append(output)
                last.append(states)
            x = torch.cat(outputs, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        return x, tuple(map(torch.stack, zip(*last, strict=True)))


def _one_direction(
    x: Tensor,
    sizes: Sequence[int],
    states: States,
    step: Step,
    suffix: str,
    weights: Mapping[str, Tensor],
    see: See,
) -> tuple[Tensor, States]:
    """Run the steps of one layer in one direction; see :meth:`_Layer._unrolled`."""
    products = F.linear(x, weights[f"weight_ih_{suffix}"], weights.get(f"bias_ih_{suffix}")).split(list(sizes))
    backwards, projection = suffix.endswith("_reverse"), weights.get(f"weight_hr_{suffix}")
    outputs = list(products)
    for at in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        active = tuple(state[: sizes[at]] for state in states)  # samples that are shorter come last
        hidden = see(f"hidden_{suffix}", active[0])
        of_hidden = F.linear(hidden, weights[f"weight_hh_{suffix}"], weights.get(f"bias_hh_{suffix}"))
        new = step(products[at], of_hidden, active)
        if projection is not None:
            new = (F.linear(see(f"projected_{suffix}", new[0]), projection), *new[1:])
        outputs[at] = new[0]
        rest = (old[sizes[at] :] for old in states)
        states = tuple(torch.cat([n, old]) if len(old) else n for n, old in zip(new, rest, strict=True))
    return torch.cat(outputs), states


def _is_exporting() -> bool:
    """Return True while torch.export traces."""
    asks = getattr(torch.compiler, "is_exporting", None)
    return asks is not None and bool(asks())


def _like(rows: Tensor, given: Any, batch_first: bool) -> Any:
    """Return the rows of all steps (steps * samples, width) with the leading dimensions of the layer's input."""
    if not isinstance(given, Tensor) or math.prod(given.shape[:-1]) != len(rows):
        return rows
    if given.dim() == 3 and batch_first:
        return rows.unflatten(0, (given.shape[1], given.shape[0])).transpose(0, 1)
    return rows.unflatten(0, given.shape[:-1])


@register_layer(nn.LSTM)
class QuantLSTM(_Layer, nn.LSTM):
    """Fake-quantized :class:`torch.nn.LSTM`."""


@register_layer(nn.GRU)
class QuantGRU(_Layer, nn.GRU):
    """Fake-quantized :class:`torch.nn.GRU`."""


@register_layer(nn.RNN)
class QuantRNN(_Layer, nn.RNN):
    """Fake-quantized :class:`torch.nn.RNN`."""


class _Cell(_Recurrent):
    """Recurrent cells: one step."""

    input_names = ("input", "hidden")
    weight_names = ("weight_ih", "weight_hh")
    bias_names = ("bias_ih", "bias_hh")
    functions = tuple(_CELL_STEPS)

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the input and the hidden state of a call with these arguments; without one, it is 0."""
        return {name: found[0] for name, found in self.inputs_seen(args, kwargs).items()}

    def compute(self, func: Any, tensors: Mapping[str, Any], see: See | None, *args: Any, **kwargs: Any) -> Any:
        """Compute one of torch's functions of recurrent cells."""
        if see is None:
            return func(*args, **kwargs)
        x, hx, weight_ih, weight_hh, bias_ih, bias_hh = args
        first = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        of_input = F.linear(see("input", x), weight_ih, bias_ih)
        of_hidden = F.linear(see("hidden", first[0]), weight_hh, bias_hh)
        states = _CELL_STEPS[func](of_input, of_hidden, first)
        return states[0] if isinstance(hx, Tensor) else states


@register_layer(nn.LSTMCell)
class QuantLSTMCell(_Cell, nn.LSTMCell):
    """Fake-quantized :class:`torch.nn.LSTMCell`."""


@register_layer(nn.GRUCell)
class QuantGRUCell(_Cell, nn.GRUCell):
    """Fake-quantized :class:`torch.nn.GRUCell`."""


@register_layer(nn.RNNCell)
class QuantRNNCell(_Cell, nn.RNNCell):
    """Fake-quantized :class:`torch.nn.RNNCell`."""
