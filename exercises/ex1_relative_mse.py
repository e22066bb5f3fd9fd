"""Exercise 1, a distance: `python -m pytest exercises -k relative_mse`

Equation 5 takes the mean square of h' - h in every layer and averages over the layers. The residual
stream grows from layer to layer, so the last layers before the norm make up most of l_cons
(`python -m lfu_min.teach.explain` shows it as bars). Divide each layer's term by the mean square
of h there: what counts is then how far a state moved for its size.

A question for yourself: h stands above and below the fraction line, and is a constant in both
places. What would the loss reward if the one below were not?

In the library: methods/distances.py, DISTANCES. Lambda needs another value then; why?
"""
import torch
import torch.nn.functional as F


def relative_mse(h, h_aux, layers, model=None):
    """(K,): for each of `layers` the mean of (h' - h)^2 over the mean of h^2, both over positions
    and channels. h, h_aux: L+1 tensors (N, D); h is a constant."""
    raise NotImplementedError("stack one term a layer; lfu.mse is the same without the denominator")
