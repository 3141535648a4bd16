"""Layers whose weight is computed from other tensors: by a parametrization of torch, or by a hook before each forward.

Weight norm, spectral norm, orthogonal weights and pruning are of these kinds. What such a layer computes with in eval
mode becomes a parameter like any other, which can be quantized, tuned and packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_CONTENTS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
_SUFFIXES = ("_g", "_v", "_orig", "_u", "_mask")
"""Ends of the names of the tensors from which hooks compute a weight."""


class Baked:
    """A layer whose computed tensors were made parameters, and how to make it again what it was.

    Attributes:
        names: Names of the computed tensors.
    """

    def __init__(self, module: nn.Module, twin: Any, names: Iterable[str]) -> None:
        self.module, self.names = module, tuple(names)
        self._twin = twin  # a module of the former class that holds the former tensors
        self._order = {name: list(vars(module)[name]) for name in _HOOKS}

    def __reduce__(self) -> Any:
        """Leave this out of copies and pickles: what it could restore is another module."""
        return type(None), ()

    @torch.no_grad()
    def load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace tensors of the former layer in a state dict by those that it computes from them.

        Args:
            state_dict: Tensors by key; changed in place.
            prefix: Start of the keys of the layer's tensors.
        """
        hooks = vars(self._twin)["_load_state_dict_pre_hooks"]
        for key in self._removed("_load_state_dict_pre_hooks"):  # they rename what early versions of torch have saved
            hooks[key](state_dict, prefix, {}, False, [], [], [])
        known = _tensors(self.module)
        former = {f"{prefix}{key}": tensor for key, tensor in _tensors(self._twin).items() if key not in known}
        given = [key for key in former if key in state_dict]
        for key in given:
            former[key].copy_(state_dict.pop(key))
        if given:
            state_dict.update({f"{prefix}{name}": value for name, value in _computed(self._twin).items()})

    def restore(self) -> None:
        """Restore class, attributes, tensors and hooks; the user's own hooks and train mode stay as they are now."""
        module, twin = self.module, self._twin
        state, former = vars(module), vars(twin)
        present = next(tensor for tensor in (_own(module, name) for name in self.names) if tensor is not None)
        if any(tensor.device != present.device or tensor.dtype != present.dtype for tensor in twin.parameters()):
            twin.to(present)
        kept = {name: state[name] for name in (*_CONTENTS, *_HOOKS)}  # the same objects: handles of hooks refer to them
        buffers = {key: state["_buffers"].get(key, value) for key, value in former["_buffers"].items()}
        for name in _CONTENTS:
            _refill(kept[name], buffers if name == "_buffers" else former[name])
        for name in _HOOKS:
            hooks = {**{key: former[name][key] for key in self._removed(name)}, **kept[name]}
            order = [key for key in self._order[name] if key in hooks]
            _refill(kept[name], {key: hooks[key] for key in dict.fromkeys((*order, *hooks))})
        training = module.training
        for child in twin.parametrizations.modules() if parametrize.is_parametrized(twin) else ():
            child.training = training
        state.clear()
        state.update({**former, **kept, "training": training})
        object.__setattr__(module, "__class__", type(twin))

    def _removed(self, name: str) -> list[Any]:
        """Return the keys of the hooks that baking removes, among the hooks called ``name``."""
        hooks = _hooks_of(self._twin)
        own = {key: getattr(hook, "hook", hook) for key, hook in vars(self._twin)[name].items()}
        return [
            key
            for key, hook in own.items()
            if hook in hooks
            or getattr(hook, "fn", None) in hooks  # spectral norm, for state dicts of early versions
            or str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")
        ]

    def apply(self, values: dict[str, Tensor]) -> None:
        """Make ``values`` parameters, or buffers where they were computed from buffers."""
        module, twin = self.module, self._twin
        for name in _HOOKS:
            for key in self._removed(name):
                del vars(module)[name][key]
        for hook in _hooks_of(twin):
            for key in _sources(twin, _name_of(hook)):
                module._parameters.pop(key, None)
                module._buffers.pop(key, None)
            vars(module).pop(_name_of(hook), None)
        if parametrize.is_parametrized(module):
            del module._modules["parametrizations"]
            object.__setattr__(module, "__class__", parametrize.type_before_parametrizations(twin))
        for name, value in values.items():
            parameters = _parameters_behind(twin, name)
            if parameters:
                setattr(module, name, nn.Parameter(value, any(p.requires_grad for p in parameters)))
            else:
                module.register_buffer(name, value)


def bake(module: nn.Module) -> tuple[Baked | None, str]:
    """Make the computed tensors of a layer parameters, and take off what computes them.

    Args:
        module: A layer, with or without such tensors.

    Returns:
        What restores the layer, if anything was computed; and why it stays as it is, or an empty text.
    """
    if not (parametrize.is_parametrized(module) or _hooks_of(module)):
        return None, ""
    twin = _twin_of(module)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values, again = _computed(twin), _computed(twin)
    except Exception as error:  # parametrizations may be the user's own
        return None, f"its weight cannot be computed ({error})"
    if not all(torch.equal(value, again[name]) for name, value in values.items()):
        return None, "its weight is computed anew with other values each time"
    baked = Baked(module, twin, values)
    baked.apply(values)
    return baked, ""


def _twin_of(module: nn.Module) -> Any:
    """Return a module of the same class, tensors and attributes with containers of its own."""
    twin = object.__new__(type(module))
    for key, value in vars(module).items():
        vars(twin)[key] = value.copy() if isinstance(value, (dict, list)) else value
    return twin


def _refill(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    container.clear()
    container.update(content)


def _hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks that compute a tensor of the module from others before each forward, in their order."""
    hooks = vars(module)["_forward_pre_hooks"].values()
    return [hook for hook in hooks if (name := _name_of(hook)) and _sources(module, name)]


def _name_of(hook: Any) -> str:
    """Return the name of the tensor that a hook of torch's weight norm, spectral norm or pruning computes."""
    name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
    return name if isinstance(name, str) else ""


def _sources(module: nn.Module, name: str) -> list[str]:
    """Return the names of the tensors that a hook computes ``name`` from; none if it is a parameter of its own."""
    if module._parameters.get(name) is not None:
        return []
    return [key for key in (f"{name}{end}" for end in _SUFFIXES) if key in module._parameters or key in module._buffers]


def _parameters_behind(twin: Any, name: str) -> list[nn.Parameter]:
    """Return the parameters from which a tensor is computed."""
    if parametrize.is_parametrized(twin, name):
        return list(twin.parametrizations[name].parameters())
    return [twin._parameters[key] for key in _sources(twin, name) if key in twin._parameters]


def _computed(twin: Any) -> dict[str, Tensor]:
    """Return what the layer computes in eval mode, by name."""
    values: dict[str, Tensor] = {}
    with _in_eval_mode(twin):
        for hook in _hooks_of(twin):
            hook(twin, ())
            values[_name_of(hook)] = getattr(twin, _name_of(hook)).detach().clone()
        for name in twin.parametrizations if parametrize.is_parametrized(twin) else ():
            values[name] = twin.parametrizations[name]().detach().clone()
    return values


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside the ``with`` block; in train mode, spectral norm changes its estimate."""
    before = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in before:
            vars(child)["training"] = False
        yield
    finally:
        for child, training in before:
            vars(child)["training"] = training


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by key, those of parametrizations included."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def _own(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter
