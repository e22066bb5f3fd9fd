"""Exercise 3, a component and a move: `python -m pytest exercises -k several_steps`

The auxiliary LoRA starts at B = 0. Its branch is B A x, so the gradient with respect to A is
B^T (...) = 0: one ascent step moves B alone, and `aux_lora` yields B alone. After that step B is
not zero any more, and A has a gradient. So let A move as well, and take n steps of alpha / n, each
along the gradient where the tensors then are.

Write both parts. How many passes does a training step take for n steps? Does A move much? (Print
the lengths by which A and B move, for n = 2 and n = 8, on the bundled model. It comes with the
first batch of a training out of `s, model, tokenizer, [batch] = prepare(["--device", "cpu"])`, from
lfu_min.teach.explain: settings, the model with a fresh LoRA, its tokenizer, batches. Give lfu_step
a move that looks at th_aux before and after yours.)

In the library: methods/auxiliaries.py and methods/moves.py. gradient_at, in the latter, is what the
second step needs; two_steps is n = 2.
"""
from contextlib import contextmanager

from lfu_min.lfu import ascend
from lfu_min.lora import aux_lora
from lfu_min.methods.moves import gradient_at


@contextmanager
def aux_lora_ab(model, generator=None):
    """aux_lora whose A may move as well: yields every B and every A of the auxiliary LoRA. An A is
    an attribute of the modules that carry one, `aux_A`, and requires no gradient yet."""
    raise NotImplementedError("inside `with aux_lora(model, generator) as B:`, find the A")
    yield


def steps(n):
    """The move (see methods/moves.py) of n ascent steps of alpha / n each. Returns, as any move,
    the norm of the gradient g it was given."""
    def move(th_aux, g, alpha, model, batch):
        raise NotImplementedError("g is the gradient of the first step only")
    return move
