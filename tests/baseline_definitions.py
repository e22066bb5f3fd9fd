"""The paper's baselines and ablations, written out slowly from their papers, with which
lfu_min/methods/baselines.py is compared: loops over positions and vocabulary, full logits, weights
swapped by functional_call.

DEFINITIONS: {name: f(model, ids, labels, lengths, generator, mistake, **settings) -> (loss,
gradients)}, gradients as {name: tensor}. `lengths`: real tokens a row. `mistake` plants one of
MISTAKES[name], so that the tests can show that they would see it.
"""
import math

import torch
import torch.nn.functional as F

from definitions import definition, l_sft, pairs, run, total_norm

MISTAKES = {
    "sft": ["summed"], "neftune": ["padded length", "no root", "normal noise", "one draw a token"],
    "prompt": ["padding trained", "answer alone"],
    "gem": ["q not detached", "w not detached", "cross-entropy", "q not sharpened"],
    "sam": ["norm per tensor", "descent", "not moved", "both gradients", "second order"],
    "l1": ["summed", "embedding included", "every token"],
    "l2": ["summed", "embedding included", "every token", "squared"],
    "logit_kl": ["direction not constant", "SFT at the perturbed model"],
    "attached": ["detached", "detach on the other side"]}


def weights(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradient(loss, th, **more):
    found = torch.autograd.grad(loss, list(th.values()), allow_unused=True, **more)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(th.items(), found)}


def sft(model, ids, labels, lengths, generator, mistake=None):
    loss = l_sft(run(model, ids)[1], labels, divisor=1 if mistake == "summed" else None)
    return loss, gradient(loss, weights(model))


def noise(shape, lengths, generator, alpha, dtype, mistake=None):
    B, T, D = shape
    draw = torch.randn if mistake == "normal noise" else lambda *a, **k: 2 * torch.rand(*a, **k) - 1
    u = draw(B, T, D, generator=generator, dtype=torch.float32).to(dtype)
    if mistake == "one draw a token":
        u = u[..., :1].expand(B, T, D)
    eps = torch.zeros(B, T, D, dtype=dtype)
    for b in range(B):
        for t in range(lengths[b]):
            L = T if mistake == "padded length" else lengths[b]
            eps[b, t] = u[b, t] * alpha / (L * D if mistake == "no root" else math.sqrt(L * D))
    return eps


def neftune(model, ids, labels, lengths, generator, mistake=None, alpha=5.0):
    D, dtype = model.config.hidden_size, model.model.norm.weight.dtype
    eps = noise((*ids.shape, D), lengths, generator, alpha, dtype, mistake)
    loss = l_sft(run(model, ids, added={"model.embed_tokens": lambda ids: eps})[1], labels)
    return loss, gradient(loss, weights(model))


def prompt(model, ids, labels, lengths, generator, mistake=None):
    every = torch.full_like(labels, -100)
    for b, length in enumerate(lengths):
        for t in range(ids.shape[1] if mistake == "padding trained" else length):
            every[b, t] = ids[b, t]
    loss = l_sft(run(model, ids)[1], labels if mistake == "answer alone" else every)
    return loss, gradient(loss, weights(model))


def gem(model, ids, labels, lengths, generator, mistake=None, beta=0.7, h="logsigmoid"):
    logits, where = run(model, ids)[1], pairs(labels)
    if mistake == "cross-entropy":
        loss = l_sft(logits, labels)
        return loss, gradient(loss, weights(model))
    total = 0 * logits.sum()
    for b, t in where:
        z, y = logits[b, t], labels[b, t + 1]
        p = F.softmax(z, -1)
        q = F.softmax(z if mistake == "q not sharpened" else z / beta, -1)
        q = q if mistake == "q not detached" else q.detach()
        for i in range(len(z)):
            w = torch.sigmoid(0.01 * (z[i] - z[y])) if h == "logsigmoid" else torch.ones(())
            w = w if mistake == "w not detached" else w.detach()
            total = total - q[i] * w * (p[y].log() - p[i].log())
    loss = total / max(len(where), 1)
    return loss, gradient(loss, weights(model))


def sam(model, ids, labels, lengths, generator, mistake=None, rho=0.05):
    th = weights(model)
    second = mistake == "second order"
    g = gradient(l_sft(run(model, ids)[1], labels), th, create_graph=second)
    norm = total_norm(t.detach() for t in g.values())
    norms = {n: t.norm().item() if mistake == "norm per tensor" else norm for n, t in g.items()}
    step = {"descent": -rho, "not moved": 0.0}.get(mistake, rho)
    moved = {n: p + (step * g[n] / norms[n] if norms[n] else 0) for n, p in th.items()}
    if not second:
        moved = {n: p.detach().requires_grad_() for n, p in moved.items()}
    loss = l_sft(run(model, ids, weights=moved)[1], labels)
    at_moved = gradient(loss, th if second else moved)
    if mistake == "both gradients":
        at_moved = {n: at_moved[n] + g[n] for n in g}
    return loss, at_moved


def magnitude(size):
    """`size` of one state (D,) -> the definition of l_SFT + lam * its mean."""
    def penalised(model, ids, labels, lengths, generator, mistake=None, lam=5.0):
        h, logits = run(model, ids)
        where = pairs(labels)
        if mistake == "every token":
            where = [(b, t) for b in range(len(ids)) for t in range(lengths[b])]
        terms = [size(x[b, t], mistake)
                 for x in (h if mistake == "embedding included" else h[1:]) for b, t in where]
        count = 1 if mistake == "summed" else max(len(terms), 1)
        loss = l_sft(logits, labels) + lam * sum(terms, 0 * logits.sum()) / count
        return loss, gradient(loss, weights(model))
    return penalised


def mean_magnitude(x, mistake):
    return sum(c.abs() for c in x) / len(x)


def euclidean(x, mistake):
    return sum(c ** 2 for c in x) ** (1 if mistake == "squared" else 0.5)


def logit_kl(model, ids, labels, lengths, generator, mistake=None, lam=5.0, alpha=0.1):
    gradients, values, _ = definition(model, ids, labels, "lora", lam, alpha, compare="logit-kl",
                                      seed=generator.initial_seed(), mistake=mistake)
    loss = values["sft"] + lam * values["consistency"]
    return torch.tensor(loss, dtype=torch.float64), gradients


def attached(model, ids, labels, lengths, generator, mistake=None, lam=5.0, alpha=0.1):
    mistake = None if mistake == "detached" else mistake or "no detach"
    gradients, values, _ = definition(model, ids, labels, "lora", lam, alpha,
                                      seed=generator.initial_seed(), mistake=mistake)
    loss = values["sft"] + lam * values["consistency"]
    return torch.tensor(loss, dtype=torch.float64), gradients


DEFINITIONS = {"sft": sft, "neftune": neftune, "prompt": prompt, "gem": gem, "sam": sam,
               "l1": magnitude(mean_magnitude), "l2": magnitude(euclidean), "logit_kl": logit_kl,
               "attached": attached}
