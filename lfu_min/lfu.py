"""Learning from the Undesirable (LfU, arXiv 2511.13052). `lfu_step` at the end is the method.

Beside the SFT loss, LfU takes one normalised gradient-ASCENT step on auxiliary components, which
makes the model worse, and trains the weights to keep the hidden states of that undesirable model
close to the model's own:

    l_LfU = l_SFT + lambda * l_cons,   in which h and g are constants                      (Eq 6)

symbol   here    shape or unit  meaning                                                    default
-------  ------  -------------  ---------------------------------------------------------  -------
th       th      -              trained weights: the parameters that require a gradient
th_aux   th_aux  -              auxiliary tensors, moved by the ascent: B of a second      lora
                                LoRA, one steering vector per layer, or th itself
g        g       as th_aux      gradient of l_SFT with respect to th_aux
alpha    alpha   -              length of the ascent step, over all of th_aux together     0.1
h_l,t    h[l]    (N, D)         layer l's states under th, at the N positions
h'_l,t   h_aux   as h           the same under th and the moved th_aux
K        layers  numbers, 1..L  the K layers compared; h[L] is taken after the final norm  all
T        N       positions      of all examples, those whose next token is supervised
l_SFT    sft     nats per token mean cross-entropy of the supervised tokens
l_cons   terms   (K,)           mean squared differences of h' and h by layer; l_cons is their mean
lambda   lam     -              weight of l_cons                                           5.0

(D channels, L layers; h[0] is the embedding. `batch` is a micro-batch: its tokens, the N positions
and the tokens to predict there, l_SFT's divisor, float16's loss_scale, and the generator that draws
whatever is random. The divisor is N; of several micro-batches a step, train.py makes it all their
positions, and lam a share of lambda, so that the gradients add up to the step's.)

Why two passes are enough: every auxiliary component starts at zero effect, so until the ascent the
auxiliary model IS the model. The forward that gives h is also the ascent's, and one backward of
l_SFT gives the gradients of th and of th_aux. Both gradients are exact: tests/test_lfu.py compares
with the definition written out slowly. docs/method.md says when two passes are not enough.

Of engine/passes.py, which need not be read: states are model.hidden_states at the N positions;
sft_loss is F.cross_entropy(model.lm_head(h), targets), in chunks; backward_into is loss.backward()
into the `.grad` of the tensors named and of no others, and returns the norm of what th got;
grads_of reads `.grad`; adds_to_grad lets a step begin with empty `.grad`s (where th_aux is th, g is
read from them), and adds what was there before at its end. trained lists th; joint_norm is the norm
over all tensors; over_norm(g, norm) is g / norm, or 0 where that is no number; movement is RMS(h' -
h) / RMS(h) by layer, for the log; last_state is the last of states.
"""
import torch
import torch.nn.functional as F

from .engine.passes import (adds_to_grad, backward_into, grads_of, joint_norm, last_state, movement,
                            over_norm, sft_loss, states, trained)
from .lora import aux_lora


@torch.no_grad()
def ascend(th_aux, g, alpha, model=None, batch=None):
    """Eq 2, in place: th_aux <- th_aux + alpha * g / ||g||_2. Returns ||g||_2, one norm over all.

    Plus, not minus: towards a HIGHER loss. Where g is zero or not finite there is no direction,
    and nothing moves. (model and batch are for the variants in methods/moves.py.)
    """
    norm = joint_norm(g)
    for tensor, grad in zip(th_aux, g):
        tensor += alpha * over_norm(grad, norm)
    return norm


def mse(h, h_aux, layers, model=None):
    """Eq 5, one term per layer, (K,): the mean over positions and channels of (h' - h)^2.

    h is detached: it is what the model should go on doing, and h' is to come to it. The other way
    round th would follow the ascent. (lfu_step has let go of h's graph already; `--method attached`
    keeps it, and shows what happens without the detach.)
    The paper sums over channels; like the authors' code we average, because lambda = 5 is meant
    for that scale. (model is for the variants in methods/distances.py.)
    """
    return torch.stack([F.mse_loss(h_aux[l], h[l].detach()) for l in layers])


@adds_to_grad
def lfu_step(model, batch, auxiliary=aux_lora, lam=5.0, alpha=0.1, layers=None, move=ascend,
             compare=mse):
    """Add the gradient of l_SFT + lam * l_cons on one micro-batch to `.grad`; see the table above.

    batch: engine.passes.make_batch(input_ids, labels). auxiliary: a context manager that attaches
    th_aux at zero effect and yields it (lora.aux_lora, steering.aux_steering, or any of
    methods/auxiliaries.py); move and compare: Eq 2 and Eq 5, or a variant. All weights end as they
    were, bit for bit. Returns the numbers of the log, 0-d tensors, but movement (K,) and
    consistency_per_layer, as `compare` returns it; adds_to_grad adds gradient_cosine.
    """
    th = trained(model)
    layers = layers or range(1, model.config.num_hidden_layers + 1)
    with auxiliary(model, batch.generator) as th_aux:  # zero effect: still the model itself
        h = states(model, batch)                                            # Eq 3
        sft = sft_loss(model, h[-1], batch)                                 # Eq 1
        sft_norm = backward_into(sft, batch, th, th_aux)                    # Eq 6's first term; g
        h, sft = [x.detach() for x in h], sft.detach()  # h is a constant now; frees its graph
        g_norm = move(th_aux, grads_of(th_aux), alpha, model, batch)        # Eq 2
        h_aux = states(model, batch)  # the undesirable model's             # Eq 4
        terms = compare(h, h_aux, layers, model)                            # Eq 5
        # still inside: in place, this backward needs the moved weights, put back at the with's end
        cons_norm = backward_into(lam * terms.mean(), batch, th)            # Eq 6's second term
    return dict(sft=sft, consistency=terms.mean(), consistency_per_layer=terms, ascent_norm=g_norm,
                sft_grad_norm=sft_norm, consistency_grad_norm=cons_norm,
                movement=movement(h, h_aux, layers))


@adds_to_grad
def sft_step(model, batch):
    """Plain SFT, what LfU is compared with: add the gradient of l_SFT to `.grad`."""
    th = trained(model)
    sft = sft_loss(model, last_state(model, batch), batch)                  # Eq 1
    return dict(sft=sft, sft_grad_norm=backward_into(sft, batch, th))
