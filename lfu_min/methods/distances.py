"""What is compared between the model and the undesirable model, Eq 5 and its variants (--compare).

A distance is a function f(h, h_aux, layers, model) of the states of both passes, lists of L+1
tensors (N, D), and of the layers compared: [0] is the embedding, which gets no gradient, and [L]
comes after the final norm, on another scale. It returns one term a layer, (K,), or a single one,
(1,); l_cons is their mean. That is 0 for equal states, positive otherwise, and h is a constant of
it (detach). A new one: write it, add it to DISTANCES, and write its definition into
tests/definitions.py. Lambda has to be chosen anew for another scale.
"""
import torch
import torch.nn.functional as F

from ..lfu import mse


def cosine(h, h_aux, layers, model=None):
    """1 - cosine similarity of h and h', mean over positions: the direction alone counts."""
    return torch.stack([(1 - F.cosine_similarity(h_aux[l], h[l].detach(), dim=-1)).mean()
                        for l in layers])


def logit_kl(h, h_aux, layers, model):
    """Eq 7: KL(softmax(z) || softmax(z')) of the two models' predictions z = head(h_L), mean over
    positions, a single term; `layers` plays no part. z is a constant. Takes N x V logits, twice.

    z is computed here, after the move, so the head must not be among what moved: not with the
    auxiliary kind `inplace` where the head is trained (train.py and lfu_backward refuse that).
    """
    with torch.no_grad():
        log_p = model.lm_head(h[-1]).to(h[-1].dtype).log_softmax(-1)  # (N, V)
    log_q = model.lm_head(h_aux[-1]).to(h[-1].dtype).log_softmax(-1)  # (N, V)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)[None]


DISTANCES = {"mse": mse, "cosine": cosine, "logit-kl": logit_kl}
