"""With B = 0 and A's gradient zero, T is eta on all that moves: SAM's direction, rho * eta long.
As LfU's move on the trained weights (--aux inplace) it would take Eq 2's step in the coordinates
w / T: large weights go far, small ones hardly move, and alpha is no longer their common length."""
import torch

from lfu_min.engine.passes import (adds_to_grad, backward_into, grads_of, joint_norm, last_state,
                                   over_norm, sft_loss, trained)
from lfu_min.methods.auxiliaries import inplace


@adds_to_grad
def asam_step(model, batch, rho=0.5, eta=0.01):
    th = trained(model)
    with inplace(model):
        sft = sft_loss(model, last_state(model, batch), batch)
        backward_into(sft, batch, th)
        with torch.no_grad():
            T = [p.abs() + eta for p in th]
            Tg = [t * g for t, g in zip(T, grads_of(th))]
            norm = joint_norm(Tg)
            for p, t, tg in zip(th, T, Tg):
                p += rho * t * over_norm(tg, norm)
                p.grad = None  # g has done its work
        moved = sft_loss(model, last_state(model, batch), batch)
        backward_into(moved, batch, th)
    return dict(sft=sft, loss=moved)
