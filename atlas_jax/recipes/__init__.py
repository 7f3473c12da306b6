"""Recipes `sft` and `grpo`, each the only place that chooses its parts, and the parts of GRPO."""
