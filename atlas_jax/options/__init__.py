"""Options of runs: type, allowed values, meaning and cross rules of each in one place, no JAX."""
