"""Exercise 5, a relative from the same parts: `python -m pytest exercises -k asam`

SAM (arXiv 2010.01412) is LfU's ascent alone: it moves the trained weights by rho * g / ||g|| and
takes the gradient of l_SFT there; `sam_step` in methods/baselines.py is that in 12 lines. But a
length of 0.05 is a lot for a small weight and little for a large one. ASAM (arXiv 2102.11600)
measures it in each weight's own size, T = |w| + eta:

    w <- w + rho * T^2 g / ||T g||,   products elementwise, one norm over all trained weights

that is, SAM's step in the coordinates w / T. Write its step. What is it on a fresh LoRA, whose B is
zero? And what would LfU be with this as its move and the trained weights as th_aux?

In the library: methods/baselines.py, BASELINES.
"""
import torch

from lfu_min.engine.passes import (adds_to_grad, backward_into, grads_of, joint_norm, last_state,
                                   over_norm, sft_loss, trained)
from lfu_min.methods.auxiliaries import inplace


@adds_to_grad  # .grad begins empty, and what was there before is added at the end
def asam_step(model, batch, rho=0.5, eta=0.01):
    """Add to `.grad` the gradient of l_SFT at the moved weights; the weights end where they were,
    bit for bit. Returns dict(sft=l_SFT before the move, loss=l_SFT after it)."""
    raise NotImplementedError("sam_step with another direction; clear .grad before the second pass")
