"""atlas_jax: post-training of language models in JAX, where a teacher learns to guide a student."""
