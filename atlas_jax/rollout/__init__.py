"""From questions to scored completions: generation and the teaching protocol."""
