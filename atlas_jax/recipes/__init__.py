"""One module for each training algorithm, each the only place that chooses its parts."""
