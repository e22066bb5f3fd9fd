"""Claim: lfu_backward adds the exact gradient of l_SFT + lambda * l_cons, and touches nothing else.

The definition is written out slowly in this file, from the paper's equations: three passes,
auxiliary components added by hooks, loops over layers, full logits. Largest relative difference,
tensor by tensor: 1e-8 in float64, 1e-4 in float32, for every auxiliary component, under LoRA and
full tuning. Every weight is random, norm gains and LoRA B included, and the planted mistakes at the
end show that each difference would be seen.
"""
import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as F

from lfu_min import lfu
from lfu_min.lfu import lfu_backward, parse_layers
from lfu_min.lora import TARGET_MODULES, add_lora, aux_lora, lora_modules
from lfu_min.model import Llama, LlamaConfig

AUX = ("lora", "reps", "inplace")
# a trained LoRA; all weights; all weights with the head tied to the embedding
TUNED = ("lora", "full", "tied")
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def tiny(tune="lora", dtype=torch.float64, layers=4, seed=0):
    """Random weights everywhere (std 0.3, gains around 1), K < H, biases; a LoRA with scaling 3/2
    and B nonzero."""
    model = Llama(LlamaConfig(vocab_size=29, hidden_size=16, intermediate_size=20,
                              num_hidden_layers=layers,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                              attention_bias=True,
                              mlp_bias=True, tie_word_embeddings=tune == "tied"))
    if tune == "lora":
        add_lora(model, r=2, lora_alpha=3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3, generator=generator)
            if "norm" in name:
                p += 1
    return model.to(dtype)


def tiny_batch(seed=1, B=3, T=9):
    """Unshifted labels over right-padded rows: prompts and padding are -100; nothing predicts a
    first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(29, (B, T), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :3], labels[1, 7:] = -100, -100
    return ids, labels


# ---- the slow definition

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
    hooks = [model.get_submodule(name).register_forward_hook(lambda module, inputs, output, f=f: output + f(inputs[0]))
             for name, f in (added or {}).items()]
    try:
        return torch.func.functional_call(States(model),
                                          {f"model.{n}": w for n, w in (weights or {}).items()},
                                          (ids,))
    finally:
        for hook in hooks:
            hook.remove()


def pairs(labels):
    """(b, t) of every state that predicts a supervised token, labels[b, t + 1]."""
    B, T = labels.shape
    return [(b, t) for b in range(B) for t in range(T - 1) if labels[b, t + 1] != -100]


def l_sft(logits, labels, divisor=None):  # Eq 1
    where = pairs(labels)
    terms = [-F.log_softmax(logits[b, t], -1)[labels[b, t + 1]] for b, t in where]
    return sum(terms, 0 * logits.sum()) / (divisor or max(len(where), 1))


def l_cons(h, h_aux, labels, layers):  # Eq 5, channels averaged; returns a term a layer
    where, D = pairs(labels), h[0].shape[-1]
    return torch.stack([sum(((h_aux[l][b, t] - h[l][b, t]) ** 2).sum()
                            for b, t in where) / (D * max(len(where), 1))
                        + 0 * h_aux[l].sum() for l in layers])


def drawn(model, generator):
    """{name: A} of the auxiliary LoRA, drawn as documented."""
    lora = {name: module.lora_A.shape[0] for name, module in model.named_modules()
            if hasattr(module, "lora_A")}
    A = {}
    for name, module in model.named_modules():
        if name in lora or (not lora and name.rpartition(".")[2] in TARGET_MODULES):
            bound = 1 / math.sqrt(module.in_features)
            A[name] = torch.empty(lora.get(name, 8),
                                  module.in_features).uniform_(-bound, bound, generator=generator)
            A[name] = A[name].to(module.weight.dtype)
    return A


def zero_aux(model, aux, generator):
    """({name: th_aux tensor at zero effect}, function from such a dict to `run`'s arguments)."""
    dtype = model.model.norm.weight.dtype
    if aux == "inplace":
        zero = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        return zero, lambda values: dict(weights=values)
    if aux == "reps":
        zero = {f"model.layers.{l}": torch.zeros(model.config.hidden_size, dtype=dtype)
                for l in range(model.config.num_hidden_layers)}
        return zero, lambda values: dict(added={n: lambda x, d=d: d for n, d in values.items()})
    A = drawn(model, generator)
    scaling = 3 / 2 if lora_modules(model) else 16 / 8
    zero = {n: torch.zeros(model.get_submodule(n).out_features, len(a), dtype=dtype)
            for n, a in A.items()}
    branch = lambda a, b: lambda x: scaling * (x @ a.T) @ b.T
    return zero, lambda values: dict(added={n: branch(A[n], b) for n, b in values.items()})


def total_norm(tensors):
    return math.sqrt(sum((t.double() ** 2).sum().item() for t in tensors))


def definition(model, ids, labels, aux, lam=5.0, alpha=0.1, layers=None, seed=7, divisor=None,
               ascent_batch=None,
               mistake=None):
    """({name: gradient}, values, moved th_aux) of Eq 1-6, in three passes. `mistake` plants one
    error."""
    layers = list(layers or range(1, model.config.num_hidden_layers + 1))
    th = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradient(loss, wrt, **more):
        return [torch.zeros_like(w) if g is None else g
                for w, g in zip(wrt, torch.autograd.grad(loss, wrt, allow_unused=True, **more))]

    # Pass 1: Eq 2's g and the ascent.
    zero, attach = zero_aux(model, aux, torch.Generator().manual_seed(seed))
    start = {n: t.requires_grad_() for n, t in zero.items()}
    ascent_ids, ascent_labels = ascent_batch or (ids, labels)
    loss = l_sft(run(model, ascent_ids, **attach(start))[1], ascent_labels,
                 divisor if ascent_batch is None else None)
    constant = mistake != "direction not constant"
    g = dict(zip(start, gradient(loss, list(start.values()), create_graph=not constant)))
    norm = total_norm(t.detach() for t in g.values())
    step = {n: alpha * t / norm if norm else 0 * t for n, t in g.items()}
    moved = {n: t.detach() + (step[n].detach() if constant else step[n]) for n, t in start.items()}

    # Pass 2: h, and l_SFT of th. Pass 3: h'.
    h, logits = run(model, ids)
    sft = l_sft(logits, labels, divisor)
    if aux == "inplace":
        moved = {n: t.detach().requires_grad_() for n, t in moved.items()}
    h_aux, logits_aux = run(model, ids, **attach(moved))
    first, second = [x.detach() for x in h], h_aux
    if mistake == "detach on the other side":
        first, second = h, [x.detach() for x in h_aux]
    if mistake == "no detach":
        first = h
    per_layer = l_cons(first, second, labels,
                       [0, *layers] if mistake == "embedding included" else layers)
    cons = per_layer.mean()
    if mistake == "SFT at the perturbed model":
        sft = l_sft(logits_aux, labels, divisor)

    wrt = list(th.values())
    sft_grad = gradient(sft, wrt, retain_graph=True)
    where = list(moved.values()) if aux == "inplace" and mistake != "detach on the other side" else wrt
    cons_grad = [lam * t for t in gradient(cons, where, retain_graph=True)]
    if aux == "inplace" and mistake == "no detach":
        cons_grad = [a + lam * b for a, b in zip(cons_grad, gradient(cons, wrt))]
    values = dict(sft=sft.item(), consistency=cons.item(), ascent_norm=norm,
                  consistency_per_layer=per_layer.detach(),
                  sft_grad_norm=total_norm(sft_grad), consistency_grad_norm=total_norm(cons_grad))
    return {n: a + b for n, a, b in zip(th, sft_grad,
                                        cons_grad)}, values, {n: t.detach() for n, t in moved.items()}


def fused(model, *args, seed=7, **settings):
    """({name: gradient}, values) of lfu_backward from empty .grad."""
    model.zero_grad()
    values = lfu_backward(model, *args, generator=torch.Generator().manual_seed(seed), **settings)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, values


def difference(got, expected):
    """max |a - b| / max |b|, the worst tensor."""
    assert got.keys() == expected.keys()
    return max(((got[n] - e).abs().max() / e.abs().max().clamp(min=1e-30)).item()
               for n, e in expected.items())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- the gradient

@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_gradient_and_values_equal_the_definition(aux, tune, dtype):
    model, batch = tiny(tune, dtype), tiny_batch()
    expected, values, _ = definition(model, *batch, aux)
    got, result = fused(model, *batch, aux)
    worst = difference(got, expected)
    print(f"{aux}, {tune}, {dtype}: largest relative difference {worst:.1e}")  # pytest -rP shows it
    assert worst <= TOLERANCE[dtype]
    for name, value in values.items():
        torch.testing.assert_close(result[name], torch.as_tensor(value, dtype=dtype),
                                   rtol=TOLERANCE[dtype], atol=0)
    assert result["consistency_per_layer"].shape == (4,)
    torch.testing.assert_close(result["consistency_per_layer"].mean(), result["consistency"])
    assert not any(value.requires_grad for value in result.values())


@pytest.mark.parametrize("layers, numbers",
                         [("early", [1, 2]), ("middle", [3]), ("late", [4]), ("2-3", [2, 3]),
                                             ("1-1", [1])])
@pytest.mark.parametrize("aux", AUX)
def test_layers_limit_the_consistency_term_alone(aux, layers, numbers):
    model, batch = tiny(), tiny_batch()
    expected, values, _ = definition(model, *batch, aux, layers=numbers)
    got, result = fused(model, *batch, aux, layers=layers)
    assert difference(got, expected) <= 1e-8
    assert result["consistency_per_layer"].shape == (len(numbers),)
    assert result["ascent_norm"].item() == pytest.approx(values["ascent_norm"], rel=1e-10)


def test_layer_groups_are_the_papers():
    assert parse_layers("all", 3) == [1, 2, 3]
    assert [parse_layers(group, 32) for group in ("early", "middle", "late")] == [
        list(range(1, 12)), list(range(12, 23)), list(range(23, 33))]
    for L in (3, 4, 5, 30):
        assert [parse_layers(group, L) for group in ("early", "middle", "late")] == [
            list(part) for part in np.array_split(range(1, L + 1), 3)]


@pytest.mark.parametrize("layers",
                         ["", "0-2", "3-2", "1-5", "2", "-1", "a-b", "1-2-3", "1.0-2", "Late",
                          None])
def test_layers_out_of_range_are_refused(layers):
    with pytest.raises(ValueError, match="within 1-4") as error:
        parse_layers(layers, 4)
    assert repr(layers) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("aux", AUX)
def test_gradient_equals_finite_differences_on_one_layer(aux):
    """d/ds of l_SFT(th + s u) + lam * l_cons(h, h'(th_aux + s u)) along a random u: no autograd on
    the checked side."""
    model, (ids, labels) = tiny("full", layers=1), tiny_batch()
    got, _ = fused(model, ids, labels, aux)
    _, _, moved = definition(model, ids, labels, aux)
    _, attach = zero_aux(model, aux, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(5)
    th = {n: p.detach() for n, p in model.named_parameters()}
    u = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in th.items()}

    @torch.no_grad()
    def loss(s):
        shifted = {n: p + s * u[n] for n, p in th.items()}
        h = run(model, ids)[0]
        if aux == "inplace":
            h_aux = run(model, ids, weights={n: m + s * u[n] for n, m in moved.items()})[0]
        else:
            h_aux = run(model, ids, **{"weights": shifted, **attach(moved)})[0]
        return l_sft(run(model, ids, weights=shifted)[1],
                     labels) + 5.0 * l_cons(h, h_aux, labels, [1]).mean()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert sum((got[n] * u[n]).sum() for n in got).item() == pytest.approx(slope.item(), rel=1e-6)


def test_steering_on_one_layer_by_hand():
    """One layer, reps: d is added just before the final norm, so Eq 1-6 are a page of NumPy. No
    autograd at all."""
    model, (ids, labels) = tiny("full", layers=1), tiny_batch()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.hidden_states(ids)
    hook.remove()
    # (N, D) before the norm
    x = np.stack([seen[0][b, t].detach().numpy() for b, t in pairs(labels)])
    y = [labels[b, t + 1].item() for b, t in pairs(labels)]
    gain, W, eps, (N, D) = model.model.norm.weight.detach().numpy(), model.lm_head.weight.numpy(), 1e-6, x.shape
    scale = lambda x: 1 / np.sqrt((x ** 2).mean(1, keepdims=True) + eps)  # (N, 1)
    h = gain * x * scale(x)  # (N, D)
    p = np.exp(h @ W.T)
    p /= p.sum(1, keepdims=True)  # (N, V)
    sft = -np.log(p[range(N), y]).mean()
    p[range(N), y] -= 1
    dh = p @ W / N  # d l_SFT / d h
    dx = scale(x) * gain * dh - scale(x) ** 3 * x * (x * gain * dh).mean(1, keepdims=True)
    g = dx.sum(0)  # d l_SFT / d d_1
    moved = x + 0.1 * g / np.linalg.norm(g)
    h_aux = gain * moved * scale(moved)
    gradient = (dh * x * scale(x)).sum(0) + 5 * 2 / (N * D) * ((h_aux - h) * moved * scale(moved)).sum(0)

    # reps needs a path to d; the norm's gain is what we compare
    model.model.layers.requires_grad_(True)
    got, result = fused(model, ids, labels, "reps")
    np.testing.assert_allclose(result["sft"], sft, rtol=1e-12)
    np.testing.assert_allclose(result["ascent_norm"], np.linalg.norm(g), rtol=1e-10)
    np.testing.assert_allclose(result["consistency"], ((h_aux - h) ** 2).mean(), rtol=1e-10)
    np.testing.assert_allclose(got["model.norm.weight"], gradient, rtol=1e-9)


# ---- the ascent

def spy(monkeypatch):
    """Records what every call of lfu.ascend moved: a list of (before, gradient, after, the tensors
    themselves)."""
    calls, ascend = [], lfu.ascend

    def recorded(moved, g, alpha):
        before, g = [t.detach().clone() for t in moved], [d.clone() for d in g]
        norm = ascend(moved, g, alpha)
        calls.append((before, g, [t.detach().clone() for t in moved], moved))
        return norm
    monkeypatch.setattr(lfu, "ascend", recorded)
    return calls


@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_ascent_step_has_length_alpha_and_the_gradients_direction(aux, tune, monkeypatch):
    model, batch, calls = tiny(tune), tiny_batch(), spy(monkeypatch)
    fused(model, *batch, aux, alpha=0.3)
    _, values, expected = definition(model, *batch, aux, alpha=0.3)
    (before, g, after, moved), = calls
    step = torch.cat([(a - b).flatten() for a, b in zip(after, before)])
    direction = torch.cat([d.flatten() for d in g])
    assert step.norm().item() == pytest.approx(0.3, rel=1e-10)
    # upwards
    assert torch.dot(step, direction).item() == pytest.approx(0.3 * values["ascent_norm"], rel=1e-10)
    assert all(torch.allclose(a, e, rtol=0, atol=1e-11) for a, e in zip(after, expected.values()))
    if aux != "inplace":  # l_cons takes no gradient with respect to th_aux: a constant
        assert all(torch.equal(t.grad, d) for t, d in zip(moved, g))


@pytest.mark.parametrize("aux", AUX)
def test_ascent_raises_the_loss_on_its_own_batch(aux):
    """And by alpha * ||g||, as the first order says."""
    model, (ids, labels) = tiny(), tiny_batch()
    _, values, moved = definition(model, ids, labels, aux, alpha=1e-4)
    _, attach = zero_aux(model, aux, torch.Generator().manual_seed(7))
    rise = l_sft(run(model, ids, **attach(moved))[1], labels).item() - values["sft"]
    _, result = fused(model, ids, labels, aux, alpha=1e-4)
    assert rise == pytest.approx(1e-4 * result["ascent_norm"].item(), rel=0.02) and rise > 0


def test_zero_B_gives_A_exactly_no_gradient_so_B_alone_moves():
    model, (ids, labels) = tiny(), tiny_batch()
    with aux_lora(model, torch.Generator().manual_seed(0)) as moved:
        for _, module in lora_modules(model):
            module.aux_A.requires_grad_()
        l_sft(model(ids), labels).backward()
        assert all(module.aux_A.grad.count_nonzero() == 0 for _, module in lora_modules(model))
        assert [id(t) for t in moved] == [id(module.aux_B) for _, module in lora_modules(model)]
        assert all(t.grad.count_nonzero() > 0 for t in moved)


def test_A_is_drawn_in_module_order_within_its_bounds():
    for tune in TUNED:
        model = tiny(tune)
        mine, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        expected, before = drawn(model, mine), torch.get_rng_state()
        with aux_lora(model, theirs):
            got = {name: m.aux_A for name, m in model.named_modules()
                   if getattr(m, "aux_A", None) is not None}
            assert all(m.aux_B.count_nonzero() == 0 for m in model.modules()
                       if getattr(m, "aux_B", None) is not None)
        assert list(got) == list(expected) and equal(got, expected)
        assert len(got) == 4 * 7
        assert all(a.abs().max() <= a.shape[1] ** -0.5 for a in got.values())
        lfu_backward(model, *tiny_batch(), "lora", generator=torch.Generator().manual_seed(3))
        # paired runs: the global generator stays put
        assert torch.equal(torch.get_rng_state(), before)


def test_no_gradient_no_step():
    """Nor one of unknown direction: a float16 overflow must not reach th_aux."""
    for value in (0.0, float("inf"), float("nan")):
        moved = [torch.ones(2, 2), torch.ones(3)]
        norm = lfu.ascend(moved, [torch.full((2, 2), value), None], 0.1)
        assert str(norm.item()) == str(value)
        assert all(t.eq(1).all() for t in moved)


@pytest.mark.parametrize("aux", AUX)
def test_ascent_on_another_batch(aux):
    model, batch, other = tiny(), tiny_batch(), tiny_batch(seed=2, T=7)
    expected, values, _ = definition(model, *batch, aux, ascent_batch=other)
    got, result = fused(model, *batch, aux, ascent_batch=other)
    assert difference(got, expected) <= 1e-8
    assert result["ascent_norm"].item() == pytest.approx(values["ascent_norm"], rel=1e-10)
    assert difference(fused(model, *batch, aux)[0], expected) > 1e-3


# ---- what the call leaves behind
# -------------------------------------------------------------------------------------

def footprint(model):
    """Everything a call could leave behind, but .grad."""
    return dict(types=[type(m) for m in model.modules()], keys=list(model.state_dict()),
                hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                tensor_hooks=[len(p._backward_hooks or ()) for p in model.parameters()],
                aux=[getattr(m, name, None) for m in model.modules()
                     for name in ("aux_A", "aux_B")],
                ids=[id(p) for p in model.parameters()],
                trained=[p.requires_grad for p in model.parameters()])


@pytest.mark.parametrize("failing", [None, "sft_backward", "ascend", "squared_difference"])
@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_weights_are_untouched_and_nothing_is_left_behind(aux, tune, failing, monkeypatch):
    """Bit for bit, also when an exception leaves the function halfway: before, in, and after the
    ascent."""
    model, batch = tiny(tune, torch.float32), tiny_batch()
    weights, before = {n: w.clone() for n, w in model.state_dict().items()}, footprint(model)
    if failing:
        original = getattr(lfu, failing)

        def broken(*args, **kwargs):
            original(*args, **kwargs)
            raise RuntimeError("planted")
        monkeypatch.setattr(lfu, failing, broken)
    with pytest.raises(RuntimeError, match="planted") if failing else contextlib.nullcontext():
        lfu_backward(model, *batch, aux, alpha=0.5)
    assert equal(dict(model.state_dict()), weights)
    assert footprint(model) == before


@pytest.mark.parametrize("aux", (*AUX, "none"))
def test_gradients_add_to_what_is_there(aux):
    """Two calls add up, and the ascent of `inplace` does not see the first call's gradient."""
    model, one, two = tiny(), tiny_batch(1), tiny_batch(2)
    (first, _), (second, alone) = fused(model, *one, aux), fused(model, *two, aux)
    fused(model, *one, aux)
    on_top = lfu_backward(model, *two, aux, generator=torch.Generator().manual_seed(7))
    assert equal({n: p.grad for n, p in model.named_parameters() if p.requires_grad},
                 {n: first[n] + second[n] for n in first})
    assert all(torch.equal(on_top[name], alone[name]) for name in alone)
    assert difference(second, first) > 0.1


# ---- plain SFT, divisors, missing targets
# ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("tune", TUNED)
def test_lambda_zero_and_no_aux_are_plain_sft(tune, dtype):
    """Bit for bit the gradient of F.cross_entropy on the supervised positions' logits, and of one
    another."""
    model, (ids, labels) = tiny(tune, dtype), tiny_batch()
    b, t = map(list, zip(*pairs(labels)))
    logits = model.lm_head(model.hidden_states(ids)[-1][b, t])
    loss = F.cross_entropy(logits, labels[b, [i + 1 for i in t]], reduction="sum") / len(b)
    loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for settings in (dict(aux="none"), dict(aux="none", lam=0.0),
                     *(dict(aux=aux, lam=0.0) for aux in AUX)):
        got, result = fused(model, ids, labels, **settings)
        assert equal(got, plain) and torch.equal(result["sft"], loss.detach())
        assert result["consistency"] == result["ascent_norm"] == result["consistency_grad_norm"] == 0
        assert result["consistency_per_layer"].shape == (4,)
        assert result["sft_grad_norm"].item() == pytest.approx(total_norm(plain.values()), rel=1e-5)
    model.zero_grad()
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert difference(plain, {n: p.grad for n, p in model.named_parameters()
                              if p.grad is not None}) <= TOLERANCE[dtype]


def test_labels_follow_transformers():
    transformers = pytest.importorskip("transformers")
    model, (ids, labels) = tiny("full", torch.float64), tiny_batch()
    c = model.config
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        attention_bias=True, mlp_bias=True, attn_implementation="eager")).double()
    reference.load_state_dict(model.state_dict())
    loss = reference(input_ids=ids, labels=labels).loss
    loss.backward()
    got, result = fused(model, ids, labels, aux="none")
    # transformers' softmax is float32
    assert result["sft"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert difference(got, {n: p.grad for n, p in reference.named_parameters()}) <= 1e-5


@pytest.mark.parametrize("aux", AUX)
def test_accumulation_over_micro_batches(aux):
    """num_target_tokens = the step's count and lam / k: l_SFT is the token mean, l_cons the mean
    over micro-batches."""
    model, batches = tiny(), [tiny_batch(1), tiny_batch(2, B=2, T=7), tiny_batch(3, B=2)]
    total = sum(len(pairs(labels)) for _, labels in batches)
    model.zero_grad()
    sft, expected_sft, expected = 0, 0, {}
    for k, batch in enumerate(batches):
        result = lfu_backward(model, *batch, aux, lam=5 / 3, num_target_tokens=total,
                              generator=torch.Generator().manual_seed(k))
        sft += result["sft"].item()
        gradient, values, _ = definition(model, *batch, aux, lam=5 / 3, divisor=total, seed=k)
        expected_sft += values["sft"]
        expected = {n: g + expected.get(n, 0) for n, g in gradient.items()}
        assert result["ascent_norm"].item() == pytest.approx(values["ascent_norm"], rel=1e-10)
    assert difference({n: p.grad for n, p in model.named_parameters() if p.requires_grad},
                      expected) <= 1e-8
    assert sft == pytest.approx(expected_sft, rel=1e-10)
    mean = sum(l_sft(model(ids), labels).item() * len(pairs(labels))
               for ids, labels in batches) / total
    assert sft == pytest.approx(mean, rel=1e-10)


@pytest.mark.parametrize("tune", ["lora", "tied"])
@pytest.mark.parametrize("aux", (*AUX, "none"))
def test_micro_batch_without_targets_contributes_nothing(aux, tune):
    model, (ids, labels) = tiny(tune), tiny_batch()
    before, _ = fused(model, ids, labels, aux)
    only_the_first_token = torch.where(torch.arange(9) == 0, labels, -100)
    for nothing, total in ((torch.full_like(labels, -100), None), (only_the_first_token, 5)):
        result = lfu_backward(model, ids, nothing, aux, num_target_tokens=total)
        assert equal({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, before)
        assert all(value.count_nonzero() == 0 for value in result.values())  # nan counts as nonzero
    got, _ = fused(model, ids, torch.full_like(labels, -100), aux)
    assert got.keys() == before.keys() and all(g.count_nonzero() == 0 for g in got.values())


@pytest.mark.parametrize("aux", AUX)
def test_row_without_targets_and_padding_change_nothing(aux):
    model, (ids, labels) = tiny(), tiny_batch()
    labels[1] = -100
    got, _ = fused(model, ids, labels, aux)
    assert difference(got, definition(model, ids, labels, aux)[0]) <= 1e-8
    padded = F.pad(ids[[0, 2]], (0, 3), value=5), F.pad(labels[[0, 2]], (0, 3), value=-100)
    assert difference(fused(model, *padded, aux)[0], got) <= 1e-10


# ---- the same numbers by other roads
# ---------------------------------------------------------------------------------

@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_head_in_chunks_gives_the_same(aux, tune, monkeypatch):
    model, batch = tiny(tune), tiny_batch()
    whole, result = fused(model, *batch, aux)
    for chunk in (3, 7):
        monkeypatch.setattr(lfu, "HEAD_CHUNK", chunk)
        got, pieces = fused(model, *batch, aux)
        assert difference(got, whole) <= 1e-10
        assert pieces["sft"].item() == pytest.approx(result["sft"].item(), rel=1e-12)


@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", (*AUX, "none"))
def test_activation_checkpointing_gives_the_same(aux, tune):
    model, batch = tiny(tune, torch.float32), tiny_batch()
    plain, result = fused(model, *batch, aux)
    model.activation_checkpointing = True
    got, recomputed = fused(model, *batch, aux)
    assert difference(got, plain) <= 1e-6
    for name in result:
        torch.testing.assert_close(recomputed[name], result[name])


@pytest.mark.parametrize("aux", AUX)
def test_a_second_pass_that_is_not_recomputed_gives_the_same_in_five_forwards_for_six(aux):
    """Of a block: with checkpointing SFT is two forwards and a backward; LfU twice that, or once
    that and 1 + 1."""
    model, batch = tiny("lora", torch.float32), tiny_batch()
    plain, result = fused(model, *batch, aux)
    model.activation_checkpointing = True
    calls = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    got, again = fused(model, *batch, aux, recompute=False)
    hook.remove()
    # 4 if the second pass were recomputed
    assert len(calls) == 3 and difference(got, plain) <= 1e-6
    for name in result:
        torch.testing.assert_close(again[name], result[name])


def test_restoring_before_the_backward_is_not_exact():
    """Why step 5 comes before 6: the authors' order (perturb, forward, restore, backward) mixes two
    sets of weights."""
    model, (ids, labels) = tiny("full"), tiny_batch()
    exact = {n: g - s for (n, g), s in zip(definition(model, ids, labels, "inplace")[0].items(),
                                           definition(model, ids, labels, "inplace",
                                                      lam=0.0)[0].values())}
    moved = definition(model, ids, labels, "inplace")[2]
    h = [state.detach() for state in run(model, ids)[0]]
    for checkpointing in (False, True):
        for restore_first in (False, True):
            model.zero_grad()
            model.activation_checkpointing = checkpointing
            th = {n: p.detach().clone() for n, p in model.named_parameters()}
            for n, p in model.named_parameters():
                p.data.copy_(moved[n])  # .data: autograd does not notice
            loss = 5.0 * l_cons(h, model.hidden_states(ids), labels, [1, 2, 3, 4]).mean()
            if not restore_first:
                loss.backward()
            for n, p in model.named_parameters():
                p.data.copy_(th[n])
            if restore_first:
                loss.backward()
            got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            worst = difference(got, {n: exact[n] for n in got})
            assert worst > 1e-3 if restore_first else worst <= 1e-8


# ---- settings

@pytest.mark.parametrize("settings, word", [
    (dict(aux="sam"), "sam"), (dict(aux=None), "None"), (dict(lam=-1.0), "-1"),
    (dict(lam=float("nan")), "nan"),
    (dict(lam=float("inf")), "inf"), (dict(alpha=-0.1), "-0.1"), (dict(alpha=float("nan")), "nan"),
    (dict(alpha=float("inf")), "inf"), (dict(layers="5-6"), "5-6"), (dict(layers="top"), "top")])
def test_settings_out_of_range_are_refused_in_one_line(settings, word):
    model = tiny()
    with pytest.raises(ValueError) as error:
        lfu_backward(model, *tiny_batch(), **settings)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_model_is_refused():
    model = tiny("full").requires_grad_(False)
    for aux in (*AUX, "none"):
        with pytest.raises(ValueError, match="requires a gradient"):
            lfu_backward(model, *tiny_batch(), aux)


# ---- planted mistakes: what the tests above would see
# ----------------------------------------------------------------

DEFINITION_MISTAKES = ("detach on the other side", "no detach", "embedding included",
                       "SFT at the perturbed model",
                       "direction not constant")


@pytest.mark.parametrize("aux, mistake",
                         [(aux, mistake) for aux in AUX for mistake in DEFINITION_MISTAKES
                                          # no such path
                                          if (aux, mistake) != ("inplace", "direction not constant")])
def test_planted_mistake_in_the_definition_is_seen(aux, mistake):
    model, batch = tiny("full"), tiny_batch()
    with sdpa_kernel(SDPBackend.MATH):  # the only one with a second derivative
        wrong, _, _ = definition(model, *batch, aux, mistake=mistake)
    assert difference(fused(model, *batch, aux)[0], wrong) > 1e-3


def descent(moved, g, alpha, ascend=lfu.ascend):
    return ascend(moved, g, -alpha)


def one_norm_a_tensor(moved, g, alpha, ascend=lfu.ascend):
    for tensor, direction in zip(moved, g):
        ascend([tensor], [direction], alpha)
    return lfu.joint_norm(g)


def not_normalised(moved, g, alpha, ascend=lfu.ascend):
    return ascend(moved, g, alpha * lfu.joint_norm(g))


def channels_summed(h, h_aux, squared_difference=lfu.squared_difference):
    return squared_difference(h, h_aux) * h[0].shape[-1]


def positions_of_the_labels(labels, device, supervised=lfu.supervised):
    positions, targets = supervised(labels, device)
    return positions + 1, targets


CODE_MISTAKES = {"ascend": (descent, one_norm_a_tensor, not_normalised),
                 "squared_difference": (channels_summed,),
                 "supervised": (positions_of_the_labels,)}


@pytest.mark.parametrize("name, mistake", [(n, m) for n, ms in CODE_MISTAKES.items() for m in ms])
@pytest.mark.parametrize("aux", AUX)
def test_planted_mistake_in_the_code_is_seen(aux, name, mistake, monkeypatch):
    model, batch = tiny(), tiny_batch()
    expected, _, _ = definition(model, *batch, aux)
    monkeypatch.setattr(lfu, name, mistake)
    assert difference(fused(model, *batch, aux)[0], expected) > 1e-3


def test_an_exception_keeps_the_gradients_of_earlier_micro_batches(monkeypatch):
    model, (ids, labels) = tiny(), tiny_batch()
    lfu_backward(model, ids, labels, aux="inplace")
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    monkeypatch.setattr(lfu, "ascend",
                        lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        lfu_backward(model, ids, labels, aux="inplace")
    assert before and all(torch.equal(model.get_parameter(name).grad, grad)
                          for name, grad in before.items())


def test_weights_the_consistency_cannot_reach_get_the_sft_gradient_alone():
    """Only the head trained: no state depends on it. Only block 4 trained, layers 1-1 compared:
    nothing below to pull."""
    ids, labels = tiny_batch()
    for trained, settings in (("lm_head", dict(aux="reps")),
                              ("layers.3.mlp.up_proj", dict(aux="reps", layers="1-1"))):
        grads = []
        for aux in (settings["aux"], "none"):
            model = tiny("full").requires_grad_(False)
            p = model.get_parameter(next(n for n, _ in model.named_parameters()
                                         if trained in n)).requires_grad_()
            lfu_backward(model, ids, labels, **{**settings, "aux": aux})
            grads.append(p.grad)
        assert grads[0].abs().max() > 0 and torch.allclose(grads[0], grads[1], rtol=1e-12, atol=0)
