"""Exercise 4, layers by a rule: `python -m pytest exercises -k least_moved`

`--layers late` fixes the layers that are compared. Choose them in every micro-batch instead: the
half of the layers (rounded up) that the ascent moved least for their size, by the mean square of
h' - h over the mean square of h. Are these the layers that should hold still, or those that need no
help? Compare with the half that moved most: it is one character away.

The answer is a distance: it has all the states, and returns the terms of Eq 5, with a zero for each
layer left out. l_cons is the mean of what you return, so scale the others: l_cons should be the
mean of Eq 5's terms over the layers chosen, whatever their number. The choice itself is a constant.

In the library: methods/distances.py, DISTANCES.
"""
import torch

from lfu_min.lfu import mse


def least_moved(h, h_aux, layers, model=None):
    """(K,): Eq 5's term for the ceil(K / 2) layers with the smallest relative movement, times K
    over their number; 0 for the others."""
    raise NotImplementedError("lfu.mse gives the terms; argsort or topk the choice")
