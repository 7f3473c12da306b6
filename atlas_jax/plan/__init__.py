"""Whether a run fits its devices and how long its steps take, told by the compiler alone."""
