"""What the paper compares LfU with, and the ablations of its Table 6: steps like lfu.sft_step, by
name (--method).

A step f(model, batch, **settings) adds its gradient to `.grad` and returns 0-d tensors
(logit_kl, attached: the numbers of lfu_step, and loss):

    sft            l_SFT (Eq 1) of its first forward; for neftune of the noised model
    loss           what it minimises, where that is not sft; for sam sft at the moved weights
    penalty        what l1 and l2 add to sft, before the weight lam
    ascent_norm    ||g|| of sam's ascent
    sft_grad_norm  norm of l_SFT's gradient where the step adds that, for sam at the moved weights

h_l,t, K and N are those of the table in lfu.py: only states that predict a supervised token count.
Another step: write it, add it to BASELINES, and write its definition into
tests/baseline_definitions.py; the tests run over the dictionary.

SDFT changes the data alone: training/sdft.py. The authors' ascent on another batch is in
methods/moves.py. Not here is the RepS of the authors' code: its random vectors and an Adam of
theirs live over the whole run, which does not fit a step of one micro-batch, and it compares the
states of two different batches, which is not the paper's method; that one is
steering.py: aux_steering.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..engine import passes
from ..engine.passes import (added_to_embedding, adds_to_grad, backward_into, grads_of, last_state,
                             movement, sft_loss, states, trained)
from ..lfu import ascend, lfu_step, sft_step
from ..lora import aux_lora
from .auxiliaries import inplace
from .distances import logit_kl


# ---- NEFTune: noise on the embeddings ----

def real_lengths(batch):
    """(B,) int64: tokens of each row up to its last supervised one. What follows is padding, as it
    is in every example of files/data.py, whose last token is supervised; a row without any has
    length 0."""
    B, T = batch.input_ids.shape
    rows, t = batch.positions // T, batch.positions % T  # (N,) each: the state at t predicts t + 1
    return rows.new_zeros(B).scatter_reduce(0, rows, t + 2, "amax")


def embedding_noise(model, batch, alpha, lengths=None, padded=False):
    """(B, T, D): alpha / sqrt(length * D) * u, with u uniform in -1..1, drawn in float32 from
    batch.generator, and the real length of the row; 0 on padding. See neftune_step."""
    weight, generator = model.model.embed_tokens.weight, batch.generator
    (B, T), D = batch.input_ids.shape, weight.shape[1]
    u = torch.empty(B, T, D, device=weight.device if generator is None else generator.device,
                    dtype=torch.float32).uniform_(-1, 1, generator=generator)
    lengths = real_lengths(batch) if lengths is None else lengths
    lengths = torch.full_like(lengths, T) if padded else lengths  # (B,)
    real = torch.arange(T, device=weight.device) < lengths[:, None]  # (B, T)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = alpha / (lengths * D).clamp(min=1).to(dtype).sqrt()  # (B,)
    return (size[:, None] * real)[..., None] * u.to(weight.device)


@adds_to_grad
def neftune_step(model, batch, alpha=5.0, lengths=None, padded=False):
    """NEFTune (arXiv 2310.05914): SFT on noised embeddings, with fresh noise in every micro-batch,

        x_b,t <- x_b,t + alpha / sqrt(length_b * D) * u,   u ~ Uniform(-1, 1) in each channel.

    length_b are the row's real tokens, and padding gets no noise: its authors' training code.
    alpha: 5 there, 5 to 15 in use. lengths: (B,) int64, None: real_lengths(batch).
    padded=True is the form of transformers and trl, and so of LLaMA-Factory, which LfU's authors
    train with: T for length_b, so that the longest row decides how much noise the others get, and
    noise on padding, which no supervised token sees.
    """
    with added_to_embedding(model, embedding_noise(model, batch, alpha, lengths, padded)):
        sft = sft_loss(model, last_state(model, batch), batch)
    return dict(sft=sft, sft_grad_norm=backward_into(sft, batch, trained(model)))


# ---- Instruction modelling: every token is trained ----

def prompt_examples(examples):
    """Instruction modelling (arXiv 2405.14394) is SFT on other labels: of encoded examples
    (input_ids, labels) every token is supervised, prompt and template too. Padding, which
    data.collate adds later, is not. (The authors mean to leave the template out; what their code
    leaves out is BOS and the user tag in front, if at all.)"""
    return [(ids, ids[:]) for ids, _ in examples]


# ---- GEM: another loss of the same logits ----

def gem_sums(model, last, y, beta, h):
    """GEM's loss and the cross-entropy of last (n, D), states that predict the tokens y (n,): two
    sums, 0-d. See gem_step."""
    z = model.lm_head(last).to(last.dtype)  # (n, V)
    log_p = z.log_softmax(-1)
    log_p_y = log_p.gather(1, y[:, None])  # (n, 1)
    with torch.no_grad():  # q and w are constants
        weight = (z / beta).softmax(-1)  # q
        if h == "logsigmoid":
            weight *= torch.sigmoid(0.01 * (z - z.gather(1, y[:, None])))  # q * w
    return -(weight * (log_p_y - log_p)).sum(), -log_p_y.sum()


@adds_to_grad
def gem_step(model, batch, beta=0.7, h="logsigmoid"):
    """GEM (arXiv 2408.16673), in place of the cross-entropy; per supervised token y with logits z,

        l = - sum_i q_i w_i (log p_y - log p_i),   p = softmax(z),  q = softmax(z / beta),
        w_i = 1 (h = "linear")   or   sigmoid(0.01 (z_i - z_y)) (h = "logsigmoid"),

    q and w constants, mean over tokens. Its gradient in z_j, q_j w_j - [j = y] sum_i q_i w_i, is
    for "linear" that of beta * cross-entropy(z / beta, y): with beta < 1 it fades sooner, while p
    still leaves room for other tokens. Defaults: beta everywhere in the authors' code, h in their
    scripts; there w is about 1/2, and so the gradient half of the other's.
    Logits exist HEAD_CHUNK positions at a time, and once more in the backward: memory does not grow
    with N x V. Raises ValueError for another h.
    """
    if h not in ("linear", "logsigmoid"):
        raise ValueError(f"h {h!r}: choose from linear, logsigmoid")
    chunks = zip(*(x.split(passes.HEAD_CHUNK) for x in (last_state(model, batch), batch.targets)))
    sums = [checkpoint(gem_sums, model, last, y, beta, h, use_reentrant=False,
                       preserve_rng_state=False) for last, y in chunks]
    gem, sft = (sum(terms) / batch.divisor for terms in zip(*sums))
    backward_into(gem, batch, trained(model))
    return dict(sft=sft, loss=gem)


# ---- SAM: the ascent alone ----

@adds_to_grad
def sam_step(model, batch, rho=0.05):
    """SAM (arXiv 2010.01412), Table 6 b: the gradient of l_SFT(th + rho * g / ||g||), g that of
    l_SFT(th), one norm over all trained weights; th ends where it was, bit for bit.

    Of LfU it has the ascent (Eq 2, with th_aux = th, by micro-batch), not the consistency.
    rho: 0.05 as in SAM's own experiments; the LfU paper does not give its value.
    """
    th = trained(model)
    with inplace(model):
        sft = sft_loss(model, last_state(model, batch), batch)
        backward_into(sft, batch, th)
        g_norm = ascend(th, grads_of(th), rho)
        for p in th:
            p.grad = None  # g has done its work: it is no part of the sum
        moved = sft_loss(model, last_state(model, batch), batch)
        moved_norm = backward_into(moved, batch, th)
    return dict(sft=sft, loss=moved, ascent_norm=g_norm, sft_grad_norm=moved_norm)


# ---- Table 6 c, d: small states in place of equal ones ----

@adds_to_grad
def l1_step(model, batch, lam=5.0):
    """Table 6 c: l_SFT + lam * mean |h|, over the N positions, K layers and D channels.

    The paper prints the sum of ||h_l,t||_1 over positions and layers. It grows with all three
    numbers, to millions, where no lam near the paper's 5 could work; l_SFT and l_cons are means.
    (It gives no lam for c to e: 5 here is LfU's, to be tuned.)
    """
    return smaller_states(model, batch, lam, lambda h: h.abs().mean())


@adds_to_grad
def l2_step(model, batch, lam=5.0):
    """Table 6 d: l_SFT + lam * mean ||h_l,t||_2 (not squared), over the N positions and K layers.

    Printed as a sum, too. The norm itself stays, and is about sqrt(D) times the channels' size: on
    the bundled model 75, so lam belongs far below l1_step's.
    """
    return smaller_states(model, batch, lam, lambda h: h.norm(dim=-1).mean())


def smaller_states(model, batch, lam, size):
    """l_SFT + lam * the mean of size(h_l), h_l (N, D), over the layers 1..L."""
    h = states(model, batch)
    sft = sft_loss(model, h[-1], batch)
    penalty = torch.stack([size(x) for x in h[1:]]).mean()
    loss = sft + lam * penalty
    backward_into(loss, batch, trained(model))
    return dict(sft=sft, loss=loss, penalty=penalty)


# ---- Table 6 e: LfU with another distance ----

def logit_kl_step(model, batch, lam=5.0, alpha=0.1):
    """Table 6 e, Eq 7: LfU with a fresh auxiliary LoRA, and the KL of predictions for l_cons. The
    same as `train.py --compare logit-kl`, which takes the other auxiliary kinds as well."""
    result = lfu_step(model, batch, lam=lam, alpha=alpha, compare=logit_kl)
    return dict(result, loss=result["sft"] + lam * result["consistency"])


# ---- LfU with h not detached ----

@adds_to_grad
def attached_step(model, batch, lam=5.0, alpha=0.1):
    """LfU with an auxiliary LoRA and an Eq 5 in which h is not detached: the model is pulled to the
    worsened one, too. It takes a third forward, because the ascent moves what the first one's graph
    would need."""
    th, checkpointing = trained(model), model.activation_checkpointing
    try:
        model.activation_checkpointing = False  # its blocks, run again, would have the moved LoRA
        own = states(model, batch)
    finally:
        model.activation_checkpointing = checkpointing
    with aux_lora(model, batch.generator) as th_aux:
        sft = sft_loss(model, last_state(model, batch), batch)
        sft_norm = backward_into(sft, batch, th, th_aux)
        g_norm = ascend(th_aux, grads_of(th_aux), alpha)
        h_aux = states(model, batch)
        terms = torch.stack([F.mse_loss(b, a) for a, b in zip(own[1:], h_aux[1:])])
        cons_norm = backward_into(lam * terms.mean(), batch, th)
    return dict(sft=sft, loss=sft + lam * terms.mean(), consistency=terms.mean(),
                ascent_norm=g_norm, sft_grad_norm=sft_norm, consistency_grad_norm=cons_norm,
                movement=movement(own, h_aux, range(1, len(own))))


BASELINES = {
    "sft": sft_step, "neftune": neftune_step,
    "prompt": sft_step,  # the step is SFT's, on prompt_examples(...)
    "gem": gem_step, "sam": sam_step, "l1": l1_step, "l2": l2_step, "logit_kl": logit_kl_step,
    "attached": attached_step}
