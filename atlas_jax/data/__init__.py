"""Dataset rows become batches of tokens: sources → examples → chat → packing → loader."""
