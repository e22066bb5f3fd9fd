"""n + 1 passes in all: g comes from the first one, every further step takes one, h' the last. A
hardly moves: on explain's first batch by 0.0029 for n = 2 and 0.0049 for n = 8, B by 0.0998 and
0.0997."""
from contextlib import contextmanager

from lfu_min.lfu import ascend
from lfu_min.lora import aux_lora
from lfu_min.methods.moves import gradient_at


@contextmanager
def aux_lora_ab(model, generator=None):
    with aux_lora(model, generator) as B:
        A = [m.aux_A.requires_grad_() for m in model.modules()
             if getattr(m, "aux_A", None) is not None]
        yield [*B, *A]


def steps(n):
    def move(th_aux, g, alpha, model, batch):
        norm = ascend(th_aux, g, alpha / n)
        for _ in range(n - 1):
            g = gradient_at(th_aux, model, batch)
            ascend(th_aux, g, alpha / n)
        return norm
    return move
