"""Memory and time of a run on devices that are not there, told by the compiler alone."""
