"""Convolutions whose gradients are as fast inside a loop as outside, on CPUs.

XLA brings convolutions into the order of axes that its fast library reads, but only outside of loops. Inside, where
`fit` trains, it computes gradients by slower code of its own: `docs/benchmarks.md`. Here they arrive in that order.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array


def convolve(images: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """Compute `jax.lax.conv_general_dilated`, for `conv_general_dilated=` of `nn.Conv` or `nnx.Conv`.

    >>> images, kernel = jax.numpy.ones((1, 4, 4, 2)), jax.numpy.ones((3, 3, 2, 5))
    >>> convolve(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
    (1, 4, 4, 5)
    """

    def plain(images, kernel):
        return lax.conv_general_dilated(images, kernel, *args, **options)

    def gradients(images, kernel, gradient):
        return jax.vjp(plain, images, kernel)[1](gradient)

    convolved = jax.custom_vjp(plain)
    convolved.defvjp(
        lambda *inputs: (plain(*inputs), inputs),
        lambda inputs, gradient: tuple(_interpret(jax.make_jaxpr(gradients)(*inputs, gradient), *inputs, gradient)),
    )
    return convolved(images, kernel)


def in_every_layer(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Let each `nn.Conv` use `convolve`, unless it has a convolution of its own; for `nn.intercept_methods`."""
    if isinstance(context.module, nn.Conv) and context.module.conv_general_dilated is None:
        object.__setattr__(context.module, "conv_general_dilated", convolve)
    return call(*args, **kwargs)


def _interpret(closed: ClosedJaxpr, *inputs: Any) -> list[Any]:
    """Evaluate operations one by one, convolutions with their axes in order."""
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, inputs, strict=True)
    for equation in closed.jaxpr.eqns:
        read = [leaf.val if isinstance(leaf, Literal) else values[leaf] for leaf in equation.invars]
        primitive = equation.primitive
        written = (_in_order if primitive is lax.conv_general_dilated_p else primitive.bind)(*read, **equation.params)
        values |= zip(equation.outvars, written if primitive.multiple_results else [written], strict=True)
    return [values[leaf] for leaf in closed.jaxpr.outvars]


def _in_order(images: Array, kernel: Array, *, dimension_numbers: lax.ConvDimensionNumbers, **params: Any) -> Array:
    """Convolve with images [n, height, width, channels] and a kernel [height, width, inputs, outputs]."""
    n, *spatial = range(images.ndim - 1)
    images_spec, kernel_spec, output_spec = dimension_numbers
    last = len(spatial) + 1
    of_images, of_kernel = (n, last, *spatial), (last, last - 1, *range(last - 1))
    output = lax.conv_general_dilated_p.bind(
        images.transpose(images_spec[0], *images_spec[2:], images_spec[1]),
        kernel.transpose(*kernel_spec[2:], kernel_spec[1], kernel_spec[0]),
        dimension_numbers=lax.ConvDimensionNumbers(of_images, of_kernel, of_images),
        **params,
    )
    return output.transpose(np.argsort((output_spec[0], *output_spec[2:], output_spec[1])))
