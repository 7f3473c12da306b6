"""One decoder for every supported family, driven by `ModelConfig`."""
