"""Comparison of results with their expected values."""

import jax
import numpy as np


def close(found, expected, tolerance=1e-5):
    """Asserts that no element of an array is off by `tolerance` of the array's largest element.

    Args:
        found: a tree of arrays.
        expected: a tree of the same structure.
        tolerance: the error that is allowed, relative to the largest expected element.
    """
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))
