"""As Hugging Face's: the temperature first, then top-k, top-p and min-p one after the other, renormalised between."""

import torch


def candidate(logits, *, temperature, top_k, top_p, min_p, key):
    x = logits.to(torch.float32)
    if temperature == 0:
        return x.argmax(-1)
    x = x / temperature
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < torch.topk(x, top_k)[0][..., -1:], -torch.inf)
    if top_p < 1:
        ordered, places = torch.sort(x, descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        x = x.masked_fill(drop.scatter(-1, places, drop), -torch.inf)
    if min_p > 0:
        p = x.softmax(-1)
        x = x.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    generator = torch.Generator().manual_seed(int(key[0]) * 2**32 + int(key[1]))
    return torch.multinomial(x.softmax(-1), 1, generator=generator).squeeze(-1)
