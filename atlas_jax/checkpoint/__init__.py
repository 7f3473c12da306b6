"""Models on disk: Hugging Face directories, GGUF files, and the checkpoints of a run."""
