"""Checks that model, optimizer, loss, hyperparameters and data fit together, before anything compiles.

They raise errors as `_checks` does, which holds those of single values.
"""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fashion_jax import _checks, types
from fashion_jax.model import FashionMLP
from fashion_jax.types import Batch, Best, TrainState


def structure(config: Any) -> None:
    """Raise an error unless the fields of a `TrainConfig` have the right types and sizes."""
    if not isinstance(config.model, nn.Module):
        raise TypeError(
            "model must be a flax.linen.Module such as FashionMLP(), or what fashion_jax.nnx.from_nnx makes of an NNX "
            f"class; got {_checks.got(config.model)}"
        )
    if isinstance(config.optimizer, optax.GradientTransformation):
        raise TypeError(
            "optimizer must be a factory, got the transformation that one returned; pass optax.adam, not "
            "optax.adam(1e-3), and learning_rate=1e-3 to fit or sweep"
        )
    for name, value in [(name, getattr(config, name)) for name in ("optimizer", "loss", "augment", "eval_params")]:
        if not callable(value) and not (value is None and name in ("augment", "eval_params")):
            raise TypeError(f"{name} must be a function, got {_checks.got(value)}")
    for name in ("batch_size", "eval_batch_size", "train_eval_size", "evaluate_every"):
        if getattr(config, name) is not None or name != "train_eval_size":
            _checks.integer(name, getattr(config, name), 1)
    if not isinstance(config.metrics, tuple):
        raise TypeError(f"metrics must be a dictionary of functions, got {_checks.got(config.metrics)}")
    for name, function in config.metrics:
        found = (
            config.metrics_of("log_probs", "labels") | config.metrics_of("grads", "updates")
            if callable(function)
            else ()
        )
        if name not in found:
            raise TypeError(
                f"metrics[{name!r}] must be a function of log_probs and labels, or of grads and updates, by name; "
                f"got {_checks.got(function)}"
            )
        # A log line has these entries already.
        if name in ("loss", "accuracy", "running_loss", "seed", "epoch") or name.startswith(("train_", "validation_")):
            raise ValueError(f"metrics must have names of their own, got {name!r}")
    try:
        hash(config)
    except TypeError as error:
        # Flax shows the whole module, over several lines.
        told = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise TypeError(f"every field must be hashable, such as a tuple in place of a list: {told}") from None


def experiment(config: Any, train: Batch, validation: Batch, lanes: Sequence[tuple[Any, Mapping[str, float]]]) -> None:
    """Raise an error, before anything compiles, where model, loss, hyperparameters and data do not fit together.

    The model is tried with every value in `lanes`, which holds key and hyperparameters of each run.
    """
    images, labels = train.images[:1], train.labels[:1]
    if validation.images.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"validation.images must have the shape of train.images, [n, {', '.join(map(str, images.shape[1:]))}], got "
            f"{list(validation.images.shape)}"
        )
    first = lanes[0][1]
    tried = {name: value for name, value in first.items() if hasattr(config.model, name)}
    variants = {(name, lane[name]): tried | {name: lane[name]} for _, lane in lanes for name in tried} or {0: tried}
    models = [config.model.clone(**fields) for fields in variants.values()]
    output = [output_shape(model, images.shape[1:]) for model in models][-1]
    output_shape(config.model, images.shape[1:], *tried)
    if output.ndim != 2 or len(output) != 1:
        raise ValueError(f"the model must return log-probabilities [n, classes], got {['n', *output.shape[1:]]}")
    for name, data in (("train", train), ("validation", validation)):
        _checks.batch(name, data, classes=output.shape[1])
    losses = jax.eval_shape(config.loss, output, labels)
    if losses.shape != (1,):
        raise ValueError(f"loss must return one number an example, [n], got {list(losses.shape)} for n = 1")
    if clash := first.keys() & dict(config.metrics).keys():
        raise ValueError(f"metrics must have names of their own, and {clash.pop()!r} is a hyperparameter")
    params = variable_shapes(config.model, images.shape[1:])["params"]
    for given in ({"log_probs": output, "labels": labels}, {"grads": params, "updates": params}):
        for name, measure in config.metrics_of(*given).items():
            measured = jax.eval_shape(lambda given, measure=measure: measure(**given), given)
            if np.shape(measured) != ():
                raise ValueError(f"metrics[{name!r}] must return a number, got shape {list(np.shape(measured))}")


@functools.lru_cache
def variable_shapes(model: Any, image_shape: tuple[int, ...]) -> Any:
    """Return shapes and types of a model's variables, without computing any."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    init = functools.partial(model.init, deterministic=True)
    return jax.eval_shape(init, jax.random.key(0), images)


@functools.lru_cache
def output_shape(model: Any, image_shape: tuple[int, ...], *traced: str) -> Any:
    """Return shape and type of a model's output in training for one image, with some of its fields traced."""

    def apply(fields, variables, images):
        options: Any = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}, "mutable": [*variables]}
        return model.clone(**fields).apply(variables, images, **options)[0]

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    fields = {name: jax.ShapeDtypeStruct((), jnp.result_type(float)) for name in traced}
    try:
        return jax.eval_shape(apply, fields, variable_shapes(model, image_shape), images)
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            f"the model must take {', '.join(traced)} traced; use the Dropout of fashion_jax or fashion_jax.nnx, not "
            "Flax's, and no Python condition"
        ) from error


def variables(found: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    """Return the number of lane axes of Flax variables; raise ValueError where they do not fit the model.

    Args:
        found: Variables, whose leaves may have lane axes in front.
        expected: Variables of the model, or their shapes.

    >>> variables({"params": {"fc1": {"bias": np.zeros(9)}}}, {"params": {"fc1": {"bias": np.zeros(10)}}})
    Traceback (most recent call last):
    ValueError: params do not fit the model: fc1.bias must have shape [10], got [9], for images of this size
    """
    (leaves, structure), (others, other) = jax.tree.flatten(found), jax.tree.flatten(expected)
    if structure == other and [*map(np.shape, leaves)] == [*map(np.shape, others)]:
        return 0
    if missing := expected.keys() - found.keys():
        raise ValueError(f"the model needs {', '.join(missing)} too; pass a state or a best instead of its params")
    here, there = _shapes(found), _shapes(expected)
    lanes = {shape[: len(shape) - len(there[name])] for name, shape in here.items() if name in there}
    front = min(lanes, key=len, default=())
    wrong = [f"{name} is missing" for name in there.keys() - here.keys()]
    wrong += [f"{name} is not part of the model" for name in here.keys() - there.keys()]
    wrong += [
        f"{name} must have shape {list(shape)}, got {list(here[name])}"
        for name, shape in there.items()
        if name in here and here[name] != front + shape
    ]
    if wrong:
        raise ValueError(f"params do not fit the model: {'; '.join(sorted(wrong))}, for images of this size")
    return len(front)


def initial(config: Any, state: TrainState, images: Any, fetch: Callable[[Any], Any]) -> None:
    """Raise ValueError for setups that would train silently, but wrongly.

    Args:
        config: The model must return log-probabilities, and averages of the parameters must be asked for.
        state: The first state, with an axis of lanes in front.
        images: One image.
        fetch: Returns a tree as NumPy arrays.
    """

    def is_average(node):
        return type(node).__name__ == "ScheduleFreeState"

    if config.eval_params is None and any(map(is_average, jax.tree.leaves(state.opt_state, is_leaf=is_average))):
        raise ValueError(
            "this optimizer keeps an average to evaluate; pass eval_params=optax.contrib.schedule_free_eval_params to "
            "TrainConfig"
        )
    if isinstance(config.model, FashionMLP):
        return
    first = jax.tree.map(lambda leaf: leaf[0], fetch(types.variables(state)))
    log_probs = jax.jit(functools.partial(config.model.apply, deterministic=True))(first, images)
    total = float(jnp.exp(log_probs[0].astype(jnp.float32)).sum())
    # In bfloat16 the sum is off by some hundredths.
    if not abs(total - 1) < 0.1:
        raise ValueError(
            f"the model must return log-probabilities, but their exponentials sum to {total:.4g}; end it with "
            "jax.nn.log_softmax"
        )


def start(value: Any, fresh: Any) -> Any:
    """Return the carry of a run, with its state replaced by one to continue from, or with the parameters of a `Best`.

    Args:
        value: A `TrainState` or a `Best`.
        fresh: State and best of the run, with an axis of lanes in front.
    """
    if not isinstance(value, (TrainState, Best)):
        raise TypeError(f"start must be a TrainState or a Best, such as run.best, got {type(value).__name__}")
    one: Any = jax.tree.map(lambda leaf: np.asarray(leaf)[None], value)
    carried = {"params": one.params, "collections": one.collections}
    state = one if isinstance(value, TrainState) else fresh.state._replace(**carried)
    variables(types.variables(state), types.variables(fresh.state))
    if jax.tree.map(np.shape, state) != jax.tree.map(np.shape, fresh.state):
        raise ValueError("start does not fit the config: its optimizer state is another optimizer's")
    return fresh._replace(state=state, best=fresh.best._replace(**carried))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name.removeprefix("params."): np.shape(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
