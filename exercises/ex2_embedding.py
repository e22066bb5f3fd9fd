"""Exercise 2, an auxiliary component: `python -m pytest exercises -k embedding`

RepS adds a vector to the output of every block. Here there is one single vector d (D,), added to
the embedding of every token, so that the ascent makes the model's INPUT worse:

    x_t <- x_t + d,   d starts at zero and is moved by Eq 2

NEFTune (arXiv 2310.05914) adds noise to the same place: fresh for every token, in a random
direction, and without any comparison afterwards. With `--move random` your vector is one draw of
noise for all tokens of a micro-batch; with the ascent it is the worst such draw, to first order.

In the library: methods/auxiliaries.py, AUXILIARIES. Its first comment says what a kind must keep
to. Careful: the embedding's weight is often the head's as well; d is on the embedding alone.
"""
from contextlib import contextmanager

import torch


@contextmanager
def aux_embedding(model, generator=None):
    """Attach a zero vector (D,) to the embedding's output, yield [it], take it off: also when the
    block ends with an exception. It has the dtype that steering's vectors have."""
    raise NotImplementedError("a forward hook on model.model.embed_tokens; see steering.py")
    yield
