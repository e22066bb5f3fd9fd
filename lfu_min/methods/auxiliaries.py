"""Auxiliary kinds: what the ascent makes worse (--aux).

A kind is a context manager f(model, generator). It attaches leaf tensors that require a gradient
and change nothing yet (zero effect: two passes are enough only then), yields them in a list, and
takes them off, also after an exception. It draws from `generator` alone, each of its tensors has a
gradient at the start (else it would never move), none is in half precision, and no module is of
another type afterwards. A new one: write it, add it to AUXILIARIES (to IN_PLACE as well if it moves
weights of the model itself), its definition to tests/definitions.py, its table to docs/method.md.
"""
from contextlib import contextmanager

import torch

from ..engine.passes import trained
from ..lora import aux_lora
from ..steering import aux_steering


@contextmanager
def put_back(weights):
    """Trained weights of the model as th_aux: whatever moved them is undone, bit for bit.

    Raises ValueError for weights in half precision, which round a step of this size away.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in weights):
        raise ValueError("the ascent moves trained weights by less than half precision "
                         "resolves: keep them in float32")
    before = [p.detach().clone() for p in weights]
    try:
        yield weights
    finally:
        with torch.no_grad():
            for p, old in zip(weights, before):
                p.copy_(old)


def inplace(model, generator=None):
    """The trained weights themselves."""
    return put_back(trained(model))


AUXILIARIES = {"lora": aux_lora, "reps": aux_steering, "inplace": inplace}
IN_PLACE = {"inplace"}  # those that move weights of the model itself: not with --shard, say
