"""Both h are constants. If the denominator were not, the model could lower l_cons by making its
states larger, without moving h' any closer. A term is now the square of a relative movement, which
is a per cent or so: lambda = 5 would hardly be felt. (On explain's first batch its gradient makes
2 % of the sum of both, Eq 5's 42 %.)"""
import torch
import torch.nn.functional as F


def relative_mse(h, h_aux, layers, model=None):
    return torch.stack([F.mse_loss(h_aux[l], h[l].detach()) / h[l].detach().square().mean()
                        for l in layers])
