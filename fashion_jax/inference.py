"""Class probabilities from a trained network, dropout off or on; three compiled programs serve any number of images."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Key, UInt8
from scipy.special import entr

from fashion_jax import _checks, _model_checks
from fashion_jax.config import TrainConfig
from fashion_jax.types import Trained, variables

# Images that a compiled program takes: the fewest that hold all, or chunks of the most.
SIZES = (1, 32, 1_024)
SAMPLES_AT_ONCE = 16

Images = UInt8[Array | np.ndarray, "n height width *channels"]


class MCPrediction(NamedTuple):
    """Predictions for n images, from many thinned networks.

    Attributes:
        probabilities: Mean over the samples.
        std: Standard deviation over the samples.
        entropy: Entropy of the mean probabilities, in nats: the total uncertainty.
        mutual_information: Mutual information of class and thinned network, in nats: the part of the entropy that comes
            from disagreement between the samples, at least 0.
    """

    probabilities: Float64[np.ndarray, "*lanes n classes"]
    std: Float64[np.ndarray, "*lanes n classes"]
    entropy: Float64[np.ndarray, "*lanes n"]
    mutual_information: Float64[np.ndarray, "*lanes n"]


def predict(
    params: Trained,
    images: Images,
    *,
    config: TrainConfig = TrainConfig(),
    **hyperparameters: float,
) -> Float[np.ndarray, "*lanes n classes"]:
    """Compute class probabilities, dropout off.

    Args:
        params: The state or the best of a run, or its parameters alone, if the model has no other variables. Lane axes
            in front, such as those of a `Sweep`, stay in front in the result.
        images: Raw pixels, 0 (background) to 255; n may be 0.
        config: The model.
        **hyperparameters: Fields of the model to replace, if any matter with dropout off.

    Raises:
        TypeError: The images are not uint8, or the model has no such field.
        ValueError: The parameters do not fit the model.

    >>> from fashion_jax.steps import init_state
    >>> predict(init_state(jax.random.key(0)).params, np.zeros((3, 28, 28), np.uint8)).shape
    (3, 10)
    """
    found, pixels, fields, lanes = _check(params, images, hyperparameters, config)
    if len(pixels) > SIZES[-1]:  # Sent once; a single call sends them faster by itself.
        found = jax.device_put(found)
    parts = [_log_probs(found, chunk, fields, model=config.model, lanes=lanes) for chunk in _chunks(pixels)]
    return np.exp(np.concatenate(parts, axis=-2)[..., : len(images), :])


def predict_mc(
    params: Trained,
    images: Images,
    *,
    key: Key[Array, ""],
    samples: int,
    config: TrainConfig = TrainConfig(),
    **hyperparameters: float,
) -> MCPrediction:
    """Predict with dropout on, by many thinned networks that each see all images: Monte Carlo dropout.

    Args:
        params, images, config: As for `predict`.
        key: Determines the units that each sample drops.
        samples: Number of thinned networks.
        **hyperparameters: Fields of the model to replace, such as `dropout_rate=0.2`.

    Raises:
        TypeError: An argument has the wrong type, or the model has no such field.
        ValueError: A number is out of range, the parameters do not fit the model, or the model drops nothing
            or has variables beside its parameters.

    Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016; mutual information as in Houlsby et
    al., "Bayesian Active Learning for Classification and Preference Learning", arXiv:1112.5745, 2011.

    >>> from fashion_jax.steps import init_state
    >>> params, images = init_state(jax.random.key(0)).params, np.zeros((3, 28, 28), np.uint8)
    >>> prediction = predict_mc(params, images, key=jax.random.key(1), samples=20, dropout_rate=0.2)
    >>> bool((prediction.mutual_information > 0).all())
    True
    """
    key, samples = _checks.key(key), _checks.integer("samples", samples, 1)
    found, pixels, fields, lanes = _check(params, images, hyperparameters, config)
    if found.keys() > {"params"}:
        raise ValueError("with dropout on, BatchNorm would take the statistics of a single image; use predict")
    sample = functools.partial(_sample, jax.device_put(found), key, fields, model=config.model, lanes=lanes)
    parts = []
    for chunk in _chunks(pixels):
        drawn = jax.device_get([sample(chunk, first) for first in range(0, samples, SAMPLES_AT_ONCE)])
        log_probs = np.concatenate(drawn, axis=-3, dtype=np.float64)
        if not fields and (log_probs == log_probs[..., :1, :, :]).all():
            raise ValueError(
                "the model drops nothing; pass the rate that it was trained with, such as dropout_rate=0.2"
            )
        of_samples = np.exp(log_probs[..., :samples, :, :])
        mean, std = of_samples.mean(axis=-3), of_samples.std(axis=-3)
        entropy, conditional = entr(mean).sum(axis=-1), entr(of_samples).sum(axis=-1).mean(axis=-2)
        # The mutual information is at least 0 but for rounding.
        parts.append(MCPrediction(mean, std, entropy, np.maximum(entropy - conditional, 0)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, lanes).take(range(len(images)), lanes), *parts)


def _check(params: Any, images: Any, hyperparameters: Any, config: TrainConfig) -> Any:
    fields: dict[str, Any] = {name: _checks.number(name, value) for name, value in hyperparameters.items()}
    if fields:
        config.model.clone(**fields)  # Checks the fields, which programs only see traced.
    images = _checks.pixels("images", images)
    if images.ndim < 3:
        raise ValueError(f"images must have shape [n, height, width], got {list(images.shape)}")
    found = variables(params)
    lanes = _model_checks.variables(found, _model_checks.variable_shapes(config.model, images.shape[1:]))
    return found, images, fields, lanes


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield at least one chunk; the last is padded with black images."""
    size = next((size for size in SIZES if size >= len(images)), SIZES[-1])
    for start in range(0, max(len(images), 1), size):
        chunk = images[start : start + size]
        padding = np.zeros((size - len(chunk), *chunk.shape[1:]), chunk.dtype)
        yield np.concatenate([chunk, padding]) if len(padding) else chunk


@functools.partial(jax.jit, static_argnames=("model", "lanes"))
def _log_probs(variables, images, fields, *, model: nn.Module, lanes: int):
    model = model.clone(**fields)

    def log_probs(variables):
        return jnp.asarray(model.apply(variables, images, deterministic=True), jnp.result_type(float))

    return _over_lanes(log_probs, lanes)(variables)


@functools.partial(jax.jit, static_argnames=("model", "lanes"))
def _sample(variables, key, fields, images, first, *, model: nn.Module, lanes: int):
    # One image at a time with the sample's key, so that all images pass through the same thinned network.
    def of_image(variables, number, image):
        rngs = {"dropout": jax.random.fold_in(key, number)}
        return model.clone(**fields).apply(variables, image[None], deterministic=False, rngs=rngs)[0]

    of_images = jax.vmap(of_image, (None, None, 0))
    of_samples = jax.vmap(of_images, (None, 0, None))
    numbers = first + jnp.arange(SAMPLES_AT_ONCE)
    return _over_lanes(lambda variables: of_samples(variables, numbers, images), lanes)(variables)


def _over_lanes(function: Callable[[Any], Any], lanes: int) -> Callable[[Any], Any]:
    for _ in range(lanes):
        function = functools.partial(jax.lax.map, function)
    return function
