"""Whether a run fits its devices and how long its steps take, from the compiler, without devices."""
