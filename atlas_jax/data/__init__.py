"""From dataset rows to batches of tokens: sources → examples → chat → packing → loader."""
