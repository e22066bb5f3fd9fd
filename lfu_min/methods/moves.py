"""Ways to move th_aux between the two passes, Eq 2 and its variants (--move).

A move is a function f(th_aux, g, alpha, model, batch): it changes the tensors th_aux in place, by
alpha over all of them together, given g, the gradient of l_SFT with respect to them, and returns
||g|| for the log, or the norm of what it used in place of g. A new one: write it, add it to MOVES,
and write its definition into tests/definitions.py. One of several steps does not end alpha away:
its name belongs into SEVERAL_STEPS of tests/test_methods.py.
"""
import torch

from ..engine.passes import joint_norm, last_state, sft_loss
from ..lfu import ascend


def descend(th_aux, g, alpha, model, batch):
    """The control for the sign: the same step towards a LOWER loss."""
    return ascend(th_aux, g, -alpha)


@torch.no_grad()
def random_direction(th_aux, g, alpha, model, batch):
    """The control for the direction: normal noise from batch.generator, of length alpha over all
    tensors. Draws tensor after tensor, in float32. Returns ||g||."""
    device = None if batch.generator is None else batch.generator.device
    noise = [torch.randn(t.shape, generator=batch.generator, device=device, dtype=torch.float32)
             .to(t) for t in th_aux]
    norm = joint_norm(g)
    ascend(th_aux, noise, alpha * (norm > 0).to(norm))  # without targets (g = 0) nothing moves
    return norm


def gradient_at(th_aux, model, batch):
    """The gradient of l_SFT on `batch` with respect to th_aux where it is now; leaves `.grad`
    alone. Costs a pass, forward and backward."""
    loss = batch.loss_scale * sft_loss(model, last_state(model, batch), batch)
    return [g / batch.loss_scale for g in torch.autograd.grad(loss, th_aux, materialize_grads=True)]


def two_steps(th_aux, g, alpha, model, batch):
    """Two ascent steps of alpha / 2 each, the second along the gradient at the moved point."""
    norm = ascend(th_aux, g, alpha / 2)
    ascend(th_aux, gradient_at(th_aux, model, batch), alpha / 2)
    return norm


def ascend_on_another_batch(th_aux, g, alpha, model, batch):
    """The authors' released code: g comes from a second, independently shuffled batch
    (batch.other), which costs a third pass."""
    return ascend(th_aux, gradient_at(th_aux, model, batch.other), alpha)


MOVES = {"ascent": ascend, "descent": descend, "random": random_direction,
         "two-steps": two_steps, "other-batch": ascend_on_another_batch}
