"""Routing of hyperparameters to the model and the optimizer.

Every number that one might want to vary is a hyperparameter: a traced keyword argument, so changing a value does not
recompile. One with the name of a field of the model replaces that field; all others are arguments of the optimizer
factory.
"""

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from fashion_jax import _checks
from fashion_jax.config import TrainConfig


def checked(config: TrainConfig, hyperparameters: Mapping[str, Any], *, axes: bool = False) -> dict[str, Any]:
    """Return the given hyperparameters as Python numbers; with `axes`, sequences as tuples."""
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {_checks.got(config)}")
    _find(config, hyperparameters)
    return {
        name: _checks.axis(name, value, _checks.number) if axes and np.ndim(value) else _checks.number(name, value)
        for name, value in hyperparameters.items()
    }


def complete(config: TrainConfig, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters with the defaults of those left out: the model's fields, and learning rate 0.003.

    >>> complete(TrainConfig(), {"b1": 0.8})
    {'dropout_rate': 0.0, 'learning_rate': 0.003, 'b1': 0.8}
    """
    fields, arguments = _find(config, hyperparameters)
    tutorial = {"learning_rate": 0.003} if "learning_rate" in arguments else {}
    completed = fields | tutorial | dict(hyperparameters)
    parameters = inspect.signature(config.optimizer).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [name for name in required if name not in completed]:
        raise TypeError(f"the optimizer needs {', '.join(missing)}: numbers here, the rest by functools.partial")
    return completed


def compose(
    config: TrainConfig, hyperparameters: Mapping[str, Any]
) -> tuple[nn.Module, optax.GradientTransformationExtraArgs]:
    """Build the model and the optimizer with their hyperparameters, which may be traced."""
    hyperparameters = complete(config, hyperparameters)
    arguments = {name: value for name, value in hyperparameters.items() if name not in _fields(config.model)}
    optimizer = config.optimizer(**arguments)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must return an optax.GradientTransformation, got {_checks.got(optimizer)}")
    # optax.adam raises a number of Python to a power of int32, which strict promotion refuses.
    update = jax.numpy_dtype_promotion("standard")(optimizer.update)
    taken = inspect.signature(optimizer.update).parameters

    def update_with(updates, state, params=None, **asked):
        variadic = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        return update(updates, state, params, **{name: asked[name] for name in asked if variadic or name in taken})

    return compose_model(config, hyperparameters), optax.GradientTransformationExtraArgs(optimizer.init, update_with)


def compose_model(config: TrainConfig, hyperparameters: Mapping[str, Any]) -> nn.Module:
    """Build the model with those hyperparameters that are fields of it."""
    fields = _fields(config.model)
    return config.model.clone(**{name: value for name, value in hyperparameters.items() if name in fields})


def _find(config: TrainConfig, names: Iterable[str]) -> tuple[dict[str, float], list[str]]:
    """Return the model's fields and the optimizer's arguments; raise TypeError for a name that is none of them."""
    fields, arguments = _fields(config.model), _arguments(config.optimizer)
    for name in names:
        if name not in fields and name not in arguments and "**" not in arguments:
            own = (*fields, *arguments, "epochs", "callbacks", "checkpoint", "progress")
            others = {"fit and sweep": (), type(config.model).__name__: _checks.fields(config.model)}
            raise TypeError(
                f"there is no hyperparameter {name!r}; the model has {', '.join(fields) or 'none'}; the optimizer has "
                f"{', '.join(arguments) or 'none'}{_checks.did_you_mean(name, own, _checks.OWNERS | others)}"
            )
    return fields, arguments


def _fields(model: nn.Module) -> dict[str, float]:
    """Return the model's fields that a program can take traced: numbers, but for sizes."""
    fields = {
        field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.type not in (int, "int")
    }
    return {name: value for name, value in fields.items() if _is_number(value)}


def _arguments(factory: Callable[..., Any]) -> list[str]:
    """Return the factory's arguments that may be numbers; `**` stands for any name."""
    parameters = inspect.signature(factory).parameters.values()
    named = [p.name for p in parameters if p.default in (p.empty, None) or _is_number(p.default)]
    variadic = {p.name: p.kind for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return [name for name in named if name not in variadic] + ["**"] * (
        inspect.Parameter.VAR_KEYWORD in variadic.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
