"""What the clips give, in NumPy and float64, from the published formulas; nothing of the library.

A gradient is an array or a `tf.IndexedSlices`, whose dense equivalent is taken first. Lists
of gradients are mapped to lists.
"""

import numpy as np
import tensorflow as tf


def array(gradient):
    """A gradient as a dense float64 array: rows that occur several times are added up."""
    if isinstance(gradient, tf.IndexedSlices):
        dense = np.zeros(tuple(gradient.dense_shape.numpy()), np.float64)
        np.add.at(dense, gradient.indices.numpy(), np.asarray(gradient.values, np.float64))
        return dense
    return np.asarray(gradient, np.float64)


def norm(*gradients):
    """The L2 norm of all the elements together."""
    return np.sqrt(sum(np.sum(array(gradient) ** 2) for gradient in gradients))


def scale(gradients, factor):
    """``factor * G``."""
    return [factor * array(gradient) for gradient in gradients]


def clip_by_value(gradients, max_value):
    """Each element to the nearest number of [-max_value, max_value]."""
    return [np.minimum(np.maximum(array(g), -max_value), max_value) for g in gradients]


def clip_by_norm(gradients, max_norm):
    """``G * max_norm / ||G||`` where ``||G|| > max_norm``, each G by itself."""
    return [array(g) * min(1.0, max_norm / max(norm(g), 1e-300)) for g in gradients]


def clip_by_global_norm(gradients, max_norm):
    """``G * max_norm / ||all G||`` where ``||all G|| > max_norm`` (Pascanu et al. 2013)."""
    factor = min(1.0, max_norm / max(norm(*gradients), 1e-300))
    return [array(gradient) * factor for gradient in gradients]


def units(shape, axes):
    """For each unit, its index: one position on the axes that are not in `axes`, all of those."""
    for position in np.ndindex(*[1 if axis in axes else size for axis, size in enumerate(shape)]):
        yield tuple(slice(None) if axis in axes else i for axis, i in enumerate(position))


def clip_by_agc(gradient, weight, axes, clip_factor=0.01, eps=1e-3):
    """Adaptive gradient clipping, one unit after the other (Brock et al. 2021, equation 3)."""
    clipped, weight = array(gradient).copy(), np.asarray(weight, np.float64)
    for unit in units(clipped.shape, axes):
        limit = clip_factor * max(norm(weight[unit]), eps)
        if norm(clipped[unit]) > limit:
            clipped[unit] = clipped[unit] * (limit / max(norm(clipped[unit]), 1e-6))
    return clipped


def two_layer_gradients(weights, x, y):
    """Gradients of ``mean((y - ((x A + a) B + b))^2)`` for ``weights = [A, a, B, b]``."""
    first, first_bias, second, second_bias = weights
    hidden = x @ first + first_bias
    by_output = 2 * (hidden @ second + second_bias - y) / y.size
    by_hidden = by_output @ second.T
    return [x.T @ by_hidden, by_hidden.sum(0), hidden.T @ by_output, by_output.sum(0)]
