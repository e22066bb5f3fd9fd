"""The definition of LfU, written out slowly from the paper's equations, with which the code is
compared: three passes, auxiliary components added by hooks, loops over positions, full logits.

Every auxiliary kind, move and distance of lfu_min/methods has its definition here, under the same
name: KINDS, MOVES, TERMS. tests/test_methods.py fails by name for an entry without one, and what
compares with it skips. A kind is in place where it gives run() `weights`: l_cons then has its
gradient at these, the moved ones.
"""
import math

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from lfu_min import methods
from lfu_min.lora import TARGET_MODULES, lora_modules


class Definitions(dict):
    """{name: definition}; a test that asks for one that `offered` has and this lacks is skipped."""

    def __init__(self, offered, definitions):
        super().__init__(definitions)
        self.offered = offered

    def __missing__(self, name):
        if name not in self.offered:
            raise KeyError(name)
        pytest.skip(f"{name} has no definition: tests/test_methods.py: "
                    "test_every_choice_has_a_definition says where to write it")


class States(nn.Module):
    """The model as a function ids -> (states of layers 0..L, logits), so that functional_call can
    swap its weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        states = self.model.hidden_states(ids)
        return states, self.model.lm_head(states[-1])


def run(model, ids, weights=None, added=None):
    """(states, logits) with `weights` for the model's, and `added[name](input)` on top of those
    modules' outputs."""
    def on_top(f):
        return lambda module, inputs, output: output + f(inputs[0])
    hooks = [model.get_submodule(name).register_forward_hook(on_top(f))
             for name, f in (added or {}).items()]
    try:
        weights = {f"model.{n}": w for n, w in (weights or {}).items()}
        return torch.func.functional_call(States(model), weights, (ids,))
    finally:
        for hook in hooks:
            hook.remove()


def pairs(labels):
    """(b, t) of every state that predicts a supervised token, labels[b, t + 1]."""
    B, T = labels.shape
    return [(b, t) for b in range(B) for t in range(T - 1) if labels[b, t + 1] != -100]


def total_norm(tensors):
    return math.sqrt(sum((t.double() ** 2).sum().item() for t in tensors))


# ---- Eq 1 ----

def l_sft(logits, labels, divisor=None):
    where = pairs(labels)
    terms = [-F.log_softmax(logits[b, t], -1)[labels[b, t + 1]] for b, t in where]
    return sum(terms, 0 * logits.sum()) / (divisor or max(len(where), 1))


# ---- Eq 5: {name: f(h, h_aux, z, z_aux, labels, layers) -> a term a layer} ----

def over_positions(f, x, labels):
    """The mean of f(b, t) over the positions that count; 0 * x keeps the graph where none do."""
    where = pairs(labels)
    return sum((f(b, t) for b, t in where), 0 * x.sum()) / max(len(where), 1)


def squared(h, h_aux, z, z_aux, labels, layers):
    return torch.stack([over_positions(lambda b, t: ((h_aux[l][b, t] - h[l][b, t]) ** 2).mean(),
                                       h_aux[l], labels) for l in layers])


def angle(h, h_aux, z, z_aux, labels, layers):
    def one(x, y):
        return 1 - (x * y).sum() / ((x ** 2).sum() * (y ** 2).sum()).sqrt()
    return torch.stack([over_positions(lambda b, t: one(h_aux[l][b, t], h[l][b, t]), h_aux[l],
                                       labels) for l in layers])


def divergence(h, h_aux, z, z_aux, labels, layers):  # Eq 7
    def one(b, t):
        p, q = F.softmax(z[b, t], -1), F.softmax(z_aux[b, t], -1)
        return (p * (p / q).log()).sum()
    return over_positions(one, z_aux, labels)[None]


TERMS = Definitions(methods.DISTANCES,
                    {"mse": squared, "cosine": angle, "logit-kl": divergence})


# ---- th_aux at zero effect: {name: f(model, generator) -> ({tensor's name: tensor}, function from
#      such a dictionary to run's arguments)} ----

def drawn(model, generator):
    """{name: A} of the auxiliary LoRA, drawn as documented."""
    lora = {name: module.lora_A.shape[0] for name, module in model.named_modules()
            if hasattr(module, "lora_A")}
    A = {}
    for name, module in model.named_modules():
        if name in lora or (not lora and name.rpartition(".")[2] in TARGET_MODULES):
            bound = 1 / math.sqrt(module.in_features)
            A[name] = torch.empty(lora.get(name, 8), module.in_features, dtype=torch.float32)
            A[name].uniform_(-bound, bound, generator=generator)
            A[name] = A[name].to(module.weight.dtype)
    return A


def lora_kind(model, generator):
    A = drawn(model, generator)
    trained = [module for _, module in lora_modules(model)]
    scaling = trained[0].lora_alpha / trained[0].r if trained else 16 / 8
    zero = {n: torch.zeros(model.get_submodule(n).out_features, len(a), dtype=a.dtype)
            for n, a in A.items()}
    branch = lambda a, b: lambda x: scaling * (x @ a.T) @ b.T
    return zero, lambda values: dict(added={n: branch(A[n], b) for n, b in values.items()})


def reps_kind(model, generator):
    zero = {f"model.layers.{l}": model.model.norm.weight.detach() * 0
            for l in range(model.config.num_hidden_layers)}
    return zero, lambda values: dict(added={n: lambda x, d=d: d for n, d in values.items()})


def inplace_kind(model, generator):
    th = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return th, lambda values: dict(weights=values)


KINDS = Definitions(methods.AUXILIARIES,
                    {"lora": lora_kind, "reps": reps_kind, "inplace": inplace_kind})


def in_place(aux, model):
    """Whether this kind moves weights of the model itself."""
    start, attach = KINDS[aux](model, torch.Generator().manual_seed(0))
    return "weights" in attach(start)


# ---- Eq 2: {name: f(start, g, g_at, g_other, alpha, generator) -> the moved tensors}, all of them
#      dictionaries; g_at(th_aux) is the gradient elsewhere, g_other() that on the other batch ----

def moved_by(start, direction, alpha):
    norm = total_norm(t.detach() for t in direction.values())
    return {n: t + (alpha * direction[n] / norm if norm else 0) for n, t in start.items()}


def noise(start, generator):
    return {n: torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t)
            for n, t in start.items()}


def half_and_half(start, g, g_at, g_other, alpha, generator):
    middle = moved_by(start, g, alpha / 2)
    return moved_by(middle, g_at(middle), alpha / 2)


MOVES = Definitions(methods.MOVES, {
    "ascent": lambda start, g, g_at, g_other, alpha, generator: moved_by(start, g, alpha),
    "descent": lambda start, g, g_at, g_other, alpha, generator: moved_by(start, g, -alpha),
    "random": lambda start, g, g_at, g_other, alpha, generator:
        moved_by(start, noise(start, generator), alpha if total_norm(g.values()) else 0.0),
    "two-steps": half_and_half,
    "other-batch": lambda start, g, g_at, g_other, alpha, generator:
        moved_by(start, g_other(), alpha),
})


# ---- Eq 6 ----

def definition(model, ids, labels, aux, lam=5.0, alpha=0.1, layers=None, seed=7, divisor=None,
               ascent_batch=None, move=None, compare="mse", mistake=None):
    """({name: gradient}, values, moved th_aux) of Eq 1-6, in three passes. `mistake` plants one."""
    layers = list(layers or range(1, model.config.num_hidden_layers + 1))
    th = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    move = move or ("ascent" if ascent_batch is None else "other-batch")

    def gradient(loss, wrt, **more):
        found = torch.autograd.grad(loss, wrt, allow_unused=True, **more)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wrt, found)]

    # Pass 1: Eq 2's g and the ascent.
    start, attach = KINDS[aux](model, generator)
    constant = mistake != "direction not constant"

    def g_at(values, batch=(ids, labels), divisor=divisor):
        values = {n: t.detach().requires_grad_() if constant else t.requires_grad_()
                  for n, t in values.items()}
        loss = l_sft(run(model, batch[0], **attach(values))[1], batch[1], divisor)
        g = gradient(loss, list(values.values()), create_graph=not constant)
        return {n: t.detach() if constant else t for n, t in zip(values, g)}
    g = g_at(start)
    moved = MOVES[move](start, g, g_at, lambda: g_at(start, ascent_batch, None), alpha, generator)
    if constant:
        moved = {n: t.detach() for n, t in moved.items()}
    norm = total_norm(t.detach() for t in (g_at(start, ascent_batch, None) if move == "other-batch"
                                           else g).values())

    # Pass 2: h, and l_SFT of th. Pass 3: h'.
    h, logits = run(model, ids)
    sft = l_sft(logits, labels, divisor)
    if "weights" in attach(moved):
        moved = {n: t.detach().requires_grad_() for n, t in moved.items()}
    h_aux, logits_aux = run(model, ids, **attach(moved))
    first, second = [x.detach() for x in h], h_aux
    if mistake == "detach on the other side":
        first, second = h, [x.detach() for x in h_aux]
    if mistake == "no detach":
        first = h
    compared = [0, *layers] if mistake == "embedding included" else layers
    per_layer = TERMS[compare](first, second, logits.detach(), logits_aux, labels, compared)
    cons = per_layer.mean()
    if mistake == "SFT at the perturbed model":
        sft = l_sft(logits_aux, labels, divisor)

    wrt, weights = list(th.values()), attach(moved).get("weights", {})
    sft_grad = gradient(sft, wrt, retain_graph=True)
    where = [weights.get(n, p) for n, p in th.items()]  # in place: at the moved weights
    if mistake == "detach on the other side":
        where = wrt
    cons_grad = [lam * t for t in gradient(cons, where, retain_graph=True)]
    if mistake == "no detach":  # h adds what it says about the weights that h' does not see
        cons_grad = [a if n not in weights else a + lam * b for n, a, b in
                     zip(th, cons_grad, gradient(cons, wrt))]
    values = dict(sft=sft.item(), consistency=cons.item(), ascent_norm=norm,
                  consistency_per_layer=per_layer.detach(), sft_grad_norm=total_norm(sft_grad),
                  consistency_grad_norm=total_norm(cons_grad))
    gradients = {n: a + b for n, a, b in zip(th, sft_grad, cons_grad)}
    return gradients, values, {n: t.detach() for n, t in moved.items()}
