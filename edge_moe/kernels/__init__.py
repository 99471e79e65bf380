"""Numeric kernels: they take arrays, addresses and numbers, and know nothing of models or files."""
