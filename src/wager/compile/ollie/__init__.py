"""OLLIE: derives expressions until library operators fit, generates kernels for the rest (arXiv 2208.02025)."""
