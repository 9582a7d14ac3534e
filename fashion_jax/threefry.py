"""Random numbers for weights, dropout and the order of examples: JAX's own, bit for bit, drawn faster on a CPU.

`jax.random.uniform` runs Threefry's twenty rounds in a loop on CPUs, which keeps XLA from fusing them: at the sizes of
this network's masks it draws five times slower than the same rounds written out, which fuse with what uses them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def is_threefry(key: Key[Array, "*shape"]) -> bool:
    """Tell whether a key is for JAX's default generator, the one whose draws are the same under `jax.vmap`.

    >>> is_threefry(jax.random.key(0)), is_threefry(jax.random.key(0, impl="rbg"))
    (True, False)
    """
    return str(jax.random.key_impl(key)) == "threefry2x32"


def bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Draw random 32-bit numbers: the same as `jax.random.bits(key, shape, jax.numpy.uint32)`.

    Keys of another kind than Threefry's, and draws of 2**32 numbers or more, are handed to `jax.random`.

    Args:
        key: One typed key.
        shape: Shape of the result.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Threefry-2x32, 20 rounds).

    >>> key = jax.random.key(0)
    >>> bool((bits(key, (4, 3)) == jax.random.bits(key, (4, 3), jnp.uint32)).all())
    True
    """
    size = int(np.prod(shape, dtype=np.int64))
    counts_differ = not getattr(jax.config, "jax_threefry_partitionable", True)
    if not is_threefry(key) or counts_differ or size >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32)
    high, low = _threefry_2x32(jax.random.key_data(key), jnp.arange(size, dtype=jnp.uint32))
    return (high ^ low).reshape(shape)


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Draw float32 numbers from U[0, 1): the same as `jax.random.uniform(key, shape, jax.numpy.float32)`.

    They are the upper 23 of the `bits` of each.

    Args:
        key: One typed key.
        shape: Shape of the result.

    >>> key = jax.random.key(0)
    >>> bool((uniform(key, (4, 3)) == jax.random.uniform(key, (4, 3))).all())
    True
    """
    mantissa = bits(key, shape) >> 9
    return mantissa.astype(jnp.float32) * 2.0**-23


# A jitted function of its own is traced once for a size, not once for each layer and program.
@jax.jit
def _threefry_2x32(key, count):
    """Encrypt the 64-bit counters (0, count) with a key of two words."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = jnp.full_like(count, schedule[0]), count + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << distance) | (y >> (32 - distance))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
