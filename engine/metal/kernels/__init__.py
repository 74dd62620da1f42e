"""The engine's Metal kernels (*.metal), run on NumPy arrays by `host` and described for MLX by `apple`."""
