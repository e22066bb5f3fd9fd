"""A hook on the embedding. It starts at zero, or the first pass would not be the model's own."""
from contextlib import contextmanager

import torch


@contextmanager
def aux_embedding(model, generator=None):
    weight = model.model.embed_tokens.weight  # (V, D)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    d = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device, requires_grad=True)
    hook = model.model.embed_tokens.register_forward_hook(lambda module, ids, x: x + d)
    try:
        yield [d]
    finally:
        hook.remove()
