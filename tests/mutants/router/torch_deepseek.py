"""As Hugging Face's DeepSeek: unsorted top-k, weights gathered from the unbiased scores."""

import torch


def candidate(logits, *, top_k, scoring, bias=None, norm=True, scale=1.0):
    x = logits.to(torch.float32)
    if scoring == "topk_softmax":
        best, ids = torch.topk(x, top_k, dim=-1)
        return ids, torch.softmax(best, dim=-1) * scale
    if scoring == "softmax":
        scores = torch.softmax(x, dim=-1)
    elif scoring == "sigmoid":
        scores = torch.sigmoid(x)
    else:
        scores = torch.sqrt(torch.nn.functional.softplus(x))
    ids = torch.topk(scores if bias is None else scores + bias, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale
