"""The oracle: plain op formulas, a PyTorch model, and per-element error bounds. Knows no engine and no Metal."""
