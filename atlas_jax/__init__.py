"""atlas_jax: post-training of language models in JAX, where a teacher learns to guide a student."""

__version__ = "0.1.0"
