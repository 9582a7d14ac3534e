"""How exact are matrix products in each precision that the device has, and what does an epoch take?

The oracle is NumPy in float64: log-probabilities and gradient of a trained network on 1,000 images.
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from fashion_jax import fit, subset
from fashion_jax.config import negative_log_likelihood
from fashion_jax.model import FashionMLP
from tests.parity import flat, loss_and_gradient

# A user's default wins over the full precision of `FashionMLP`.
PRECISIONS = ("highest", "BF16_BF16_F32_X9", "BF16_BF16_F32_X6", "TF32_TF32_F32_X3", "tensorfloat32", "bfloat16")

Flags = harness.TimedFlags


def main(flags: Flags) -> None:
    data = harness.load_data()
    run = partial(fit, data.train, data.validation, key=jax.random.key(0), dropout_rate=0.2, progress=False)
    params, batch = run(epochs=1).state.params, subset(data.train, 1_000, key=jax.random.key(0))
    _, exact, gradient = loss_and_gradient(params, batch)
    right = flat(gradient())

    def loss(params):
        images: Any = jnp.asarray(batch.images)
        log_probs: Any = FashionMLP().apply({"params": params}, images, deterministic=True)
        return negative_log_likelihood(log_probs, batch.labels).mean(), log_probs

    programs, apart = {}, {}
    for precision in PRECISIONS:
        in_precision = jax.default_matmul_precision(precision)
        try:
            found, log_probs = in_precision(jax.jit(jax.grad(loss, has_aux=True)))(params)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            print(f"{precision} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        apart[precision] = {
            "log-probabilities, largest": float(np.abs(log_probs - exact).max()),
            "gradient (relative)": float(np.linalg.norm(flat(found) - right) / np.linalg.norm(right)),
        }
        programs[precision] = in_precision(partial(harness.second_epoch, run))
    seconds = harness.take_turns(programs, flags.repetitions)
    rows = [{"precision": name, **apart[name], **harness.spread(runs)} for name, runs in seconds.items()]
    harness.write("precision", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
