"""As vLLM's: counts by scatter, then whole rows; in the input's dtype."""

import torch


def candidate(logits, history, *, repetition, presence, frequency):
    V = logits.shape[-1]
    seen = history.long()
    counts = torch.zeros(*logits.shape[:-1], V + 1, dtype=torch.long)
    seen = torch.where((seen >= 0) & (seen < V), seen, V)
    counts = counts.scatter_add(-1, seen, torch.ones_like(seen))[..., :V]
    out = torch.where(logits > 0, logits / repetition, logits * repetition)
    out = out - frequency * counts.to(logits.dtype) - presence * (counts > 0).to(logits.dtype)
    return torch.where(counts > 0, out, logits)
