"""The page of a run: one self-contained HTML file of what the run has written. Imports no JAX."""
