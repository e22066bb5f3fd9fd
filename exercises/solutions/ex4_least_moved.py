"""A mask keeps every layer's term in its place, for the log, and waits for no GPU. On explain's
first batch it chooses layers 1 to 3. Whether it is these that should hold still is not known:
fixed thirds, the early layers alone and the late ones, are two rows of docs/results.md, and
their intervals overlap."""
import torch

from lfu_min.lfu import mse


def least_moved(h, h_aux, layers, model=None):
    terms = mse(h, h_aux, layers)  # (K,)
    K, chosen = len(terms), (len(terms) + 1) // 2
    sizes = torch.stack([h[l].detach().square().mean() for l in layers])  # (K,)
    least = (terms.detach() / sizes).argsort()[:chosen]
    keep = torch.zeros_like(terms).index_fill(0, least, K / chosen)
    return keep * terms
