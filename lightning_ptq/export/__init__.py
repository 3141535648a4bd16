"""Ways out of the library: the packed checkpoint."""
