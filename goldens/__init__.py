"""Goldens: Traces, how they are stored in HDF5, and how a new one replaces an old one. Knows nothing of engines."""
