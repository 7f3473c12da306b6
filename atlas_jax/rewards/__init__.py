"""What a rollout is worth: rewards that compare answers with a known one. Imports no JAX."""
