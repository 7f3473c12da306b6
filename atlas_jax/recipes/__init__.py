"""Recipes `sft`, `grpo` and `gkd`, each the only place that chooses its parts, and these parts."""
