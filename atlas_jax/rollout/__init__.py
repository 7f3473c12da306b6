"""Questions become completions: generation and the teaching protocol."""
