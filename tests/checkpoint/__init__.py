"""Tests of atlas_jax.checkpoint."""
