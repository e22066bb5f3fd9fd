"""Representation steering (RepS): one vector d_l per layer, as an auxiliary kind.

Paper, section 3.1: h'_l = h_l + d_l. Here d_l is added to the output of block l, so that it travels
on through the residual stream into every later block, and h'_l holds the earlier ones' effect as
well; the last one is added before the final norm. The vectors start at zero, live for one
micro-batch and are moved by lfu.ascend alone. (The authors' code trains random vectors with Adam
instead; see docs/method.md, "Paper and code".)
"""
from contextlib import contextmanager

import torch


@contextmanager
def aux_steering(model, generator=None):
    """Attach a zero steering vector (D,) to every block, as a forward hook; the hooks go when the
    `with` block ends.

    Yields the L vectors, in the order of the layers: the tensors the ascent may move. They are
    float32 over half-precision weights and otherwise in the weights' dtype, like the residual
    stream they are added to. (generator: nothing is drawn.)
    """
    weight = model.model.norm.weight  # (D,)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    vectors = [torch.zeros(len(weight), dtype=dtype, device=weight.device, requires_grad=True)
               for _ in model.model.layers]
    hooks = [block.register_forward_hook(lambda block, x, h, d=d: h + d)  # (B, T, D) + (D,)
             for block, d in zip(model.model.layers, vectors)]
    try:
        yield vectors
    finally:
        for hook in hooks:
            hook.remove()
