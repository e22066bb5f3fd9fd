"""Claim: lfu_step adds the exact gradient of l_SFT + lambda * l_cons, and touches nothing else.

The definition is written out slowly in definitions.py, from the paper's equations: three passes,
auxiliary components added by hooks, loops over layers, full logits. Largest relative difference,
tensor by tensor: 1e-8 in float64, 1e-4 in float32, for every auxiliary kind, move and distance of
lfu_min/methods, under LoRA and full tuning. Every weight is random, norm gains and LoRA B included,
and the planted mistakes at the end show that each difference would be seen.
"""
import contextlib

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as F

from conftest import difference, tiny, tiny_batch
import definitions
from definitions import definition, drawn, l_sft, pairs, run, squared, total_norm
from lfu_min import lfu
from lfu_min.engine import passes
from lfu_min.lfu import ascend, lfu_step, mse
from lfu_min.lora import aux_lora, lora_modules
from lfu_min.methods import AUXILIARIES, lfu_backward, parse_layers

AUX = tuple(AUXILIARIES)
# a trained LoRA; all weights; all weights with the head tied to the embedding
TUNED = ("lora", "full", "tied")
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def fused(model, *args, seed=7, **settings):
    """({name: gradient}, values) of lfu_backward from empty .grad."""
    model.zero_grad()
    values = lfu_backward(model, *args, generator=torch.Generator().manual_seed(seed), **settings)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, values


def stepped(model, ids, labels, aux="lora", other=None, seed=7, **parts):
    """The same of lfu_step, with any of its parts: move=, compare=, layers=, lam=, alpha=."""
    model.zero_grad()
    batch = passes.make_batch(ids, labels, generator=torch.Generator().manual_seed(seed),
                              other=other and passes.make_batch(*other))
    values = lfu_step(model, batch, AUXILIARIES[aux], **parts)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, values


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- the gradient ----

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


@pytest.mark.slow
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
    _, attach = definitions.KINDS[aux](model, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(5)
    th = {n: p.detach() for n, p in model.named_parameters()}
    u = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in th.items()}

    @torch.no_grad()
    def loss(s):
        shifted = {n: p + s * u[n] for n, p in th.items()}
        h = run(model, ids)[0]
        how = attach(moved)
        weights = {n: w + s * u[n] for n, w in how.pop("weights", {}).items()}  # in place
        h_aux = run(model, ids, weights={**shifted, **weights}, **how)[0]
        return l_sft(run(model, ids, weights=shifted)[1],
                     labels) + 5.0 * squared(h, h_aux, None, None, labels, [1]).mean()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert sum((got[n] * u[n]).sum() for n in got).item() == pytest.approx(slope.item(), rel=1e-6)


def test_steering_on_one_layer_by_hand():
    """One layer, reps: d is added just before the final norm, so Eq 1-6 are a page of NumPy. No
    autograd at all."""
    model, (ids, labels) = tiny("full", layers=1), tiny_batch()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda block, x, out: seen.append(out))
    model.hidden_states(ids)
    hook.remove()
    # (N, D) before the norm
    x = np.stack([seen[0][b, t].detach().numpy() for b, t in pairs(labels)])
    y = [labels[b, t + 1].item() for b, t in pairs(labels)]
    gain, W = model.model.norm.weight.detach().numpy(), model.lm_head.weight.numpy()
    eps, (N, D) = 1e-6, x.shape
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
    pull = 2 / (N * D) * ((h_aux - h) * moved * scale(moved)).sum(0)
    gradient = (dh * x * scale(x)).sum(0) + 5 * pull

    # reps needs a path to d; the norm's gain is what we compare
    model.model.layers.requires_grad_(True)
    got, result = fused(model, ids, labels, "reps")
    np.testing.assert_allclose(result["sft"], sft, rtol=1e-12)
    np.testing.assert_allclose(result["ascent_norm"], np.linalg.norm(g), rtol=1e-10)
    np.testing.assert_allclose(result["consistency"], ((h_aux - h) ** 2).mean(), rtol=1e-10)
    np.testing.assert_allclose(got["model.norm.weight"], gradient, rtol=1e-9)


# ---- the ascent ----

def spy(calls):
    """`ascend`, recording in `calls` what it moved: (before, gradient, after, the tensors)."""
    def recorded(th_aux, g, alpha, model, batch):
        before, g = [t.detach().clone() for t in th_aux], [d.clone() for d in g]
        norm = ascend(th_aux, g, alpha)
        calls.append((before, g, [t.detach().clone() for t in th_aux], th_aux))
        return norm
    return recorded


@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_ascent_step_has_length_alpha_and_the_gradients_direction(aux, tune):
    model, batch, calls = tiny(tune), tiny_batch(), []
    stepped(model, *batch, aux, alpha=0.3, move=spy(calls))
    _, values, expected = definition(model, *batch, aux, alpha=0.3)
    (before, g, after, moved), = calls
    step = torch.cat([(a - b).flatten() for a, b in zip(after, before)])
    direction = torch.cat([d.flatten() for d in g])
    assert step.norm().item() == pytest.approx(0.3, rel=1e-10)
    # upwards
    rise = torch.dot(step, direction).item()
    assert rise == pytest.approx(0.3 * values["ascent_norm"], rel=1e-10)
    assert all(torch.allclose(a, e, rtol=0, atol=1e-11) for a, e in zip(after, expected.values()))
    own = {id(p) for p in model.parameters()}  # in place: `.grad` is th's
    # l_cons takes no gradient with respect to th_aux: a constant
    assert all(torch.equal(t.grad, d) for t, d in zip(moved, g) if id(t) not in own)


@pytest.mark.parametrize("aux", AUX)
def test_ascent_raises_the_loss_on_its_own_batch(aux):
    """And by alpha * ||g||, as the first order says."""
    model, (ids, labels) = tiny(), tiny_batch()
    _, values, moved = definition(model, ids, labels, aux, alpha=1e-4)
    _, attach = definitions.KINDS[aux](model, torch.Generator().manual_seed(7))
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
        norm = ascend(moved, [torch.full((2, 2), value), torch.full((3,), value)], 0.1)
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


def test_your_own_loop_takes_the_parts_by_name():
    model, batch = tiny(), tiny_batch()
    for parts in (dict(move="descent"), dict(compare="cosine"), dict(move="two-steps")):
        expected, _, _ = definition(model, *batch, "reps", **parts)
        assert difference(fused(model, *batch, "reps", **parts)[0], expected) <= 1e-8
    for wrong, said in ((dict(move="up"), "move 'up': choose from ascent"),
                        (dict(compare="l3"), "compare 'l3': choose from mse"),
                        (dict(aux="both"), "aux 'both': choose from lora"),
                        (dict(move="other-batch"), "goes with other-batch"),
                        (dict(move="descent", ascent_batch=batch), "goes with other-batch")):
        with pytest.raises(ValueError, match=said):
            fused(model, *batch, **wrong)
    with pytest.raises(ValueError, match="is a Linear: load it with lfu_min.load_model"):
        fused(torch.nn.Linear(2, 2), *batch)


# ---- what the call leaves behind ----
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


def then_fails(part):
    def broken(*args):
        part(*args)
        raise RuntimeError("planted")
    return broken


@pytest.mark.parametrize("failing", [None, "sft_loss", "move", "compare"])
@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_weights_are_untouched_and_nothing_is_left_behind(aux, tune, failing, monkeypatch):
    """Bit for bit, also when an exception leaves the function halfway: before, in, and after the
    ascent."""
    model, batch = tiny(tune, torch.float32), tiny_batch()
    weights, before = {n: w.clone() for n, w in model.state_dict().items()}, footprint(model)
    parts = {"move": dict(move=then_fails(ascend)), "compare": dict(compare=then_fails(mse))}
    if failing == "sft_loss":
        monkeypatch.setattr(lfu, "sft_loss", then_fails(lfu.sft_loss))
    with pytest.raises(RuntimeError, match="planted") if failing else contextlib.nullcontext():
        stepped(model, *batch, aux, alpha=0.5, **parts.get(failing, {}))
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


# ---- plain SFT, divisors, missing targets ----
# ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("tune", TUNED)
def test_lambda_zero_and_no_aux_are_plain_sft(tune, dtype):
    """The gradient of F.cross_entropy on the supervised positions' logits, up to the order of its
    sums; of one another bit for bit."""
    model, (ids, labels) = tiny(tune, dtype), tiny_batch()
    b, t = map(list, zip(*pairs(labels)))
    logits = model.lm_head(model.hidden_states(ids)[-1][b, t])
    loss = F.cross_entropy(logits, labels[b, [i + 1 for i in t]], reduction="sum") / len(b)
    loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for settings in (dict(aux="none"), dict(aux="none", lam=0.0),
                     *(dict(aux=aux, lam=0.0) for aux in AUX)):
        got, result = fused(model, ids, labels, **settings)
        assert difference(got, plain) <= (1e-13 if dtype == torch.float64 else 1e-5)
        assert result["sft"].item() == pytest.approx(loss.item(), rel=1e-6)
        first = got if settings == dict(aux="none") else first
        assert equal(got, first)
        assert result["consistency"] == result["ascent_norm"] == 0
        assert result["consistency_grad_norm"] == 0
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
    got, values = fused(model, ids, labels, aux)
    assert difference(got, definition(model, ids, labels, aux)[0]) <= 1e-8
    padded = F.pad(ids[[0, 2]], (0, 3), value=5), F.pad(labels[[0, 2]], (0, 3), value=-100)
    again, same = fused(model, *padded, aux)
    assert difference(again, got) <= 1e-10
    for name in ("sft", "consistency"):
        assert same[name].item() == pytest.approx(values[name].item(), rel=1e-10)


# ---- the same numbers by other roads ----
# ---------------------------------------------------------------------------------

@pytest.mark.parametrize("tune", TUNED)
@pytest.mark.parametrize("aux", AUX)
def test_head_in_chunks_gives_the_same(aux, tune, monkeypatch):
    model, batch = tiny(tune), tiny_batch()
    whole, result = fused(model, *batch, aux)
    for chunk in (3, 7):
        monkeypatch.setattr(passes, "HEAD_CHUNK", chunk)
        got, pieces = fused(model, *batch, aux)
        assert difference(got, whole) <= 1e-10
        assert pieces["sft"].item() == pytest.approx(result["sft"].item(), rel=1e-12)


@pytest.mark.slow
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
            h_aux = model.hidden_states(ids)
            loss = 5.0 * squared(h, h_aux, None, None, labels, [1, 2, 3, 4]).mean()
            if not restore_first:
                loss.backward()
            for n, p in model.named_parameters():
                p.data.copy_(th[n])
            if restore_first:
                loss.backward()
            got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            worst = difference(got, {n: exact[n] for n in got})
            assert worst > 1e-3 if restore_first else worst <= 1e-8


# ---- settings ----

@pytest.mark.parametrize("settings, word", [
    (dict(aux="sam"), "sam"), (dict(aux=None), "None"), (dict(lam=-1.0), "-1"),
    (dict(lam=float("nan")), "nan"),
    (dict(lam=float("inf")), "inf"), (dict(alpha=-0.1), "-0.1"), (dict(alpha=float("nan")), "nan"),
    (dict(alpha=float("inf")), "inf"), (dict(layers="5-6"), "5-6"), (dict(layers="top"), "top"),
    (dict(aux="inplace", compare="logit-kl"), "the head"), (dict(lam="5"), "lam = 5"),
    (dict(layers=[1, 2]), "[1, 2]"), (dict(num_target_tokens=0), "num_target_tokens = 0"),
    (dict(num_target_tokens=-3), "-3"), (dict(num_target_tokens=float("nan")), "nan"),
    (dict(labels=tiny_batch()[1][:, :5]), "labels (3, 5)")])
def test_settings_out_of_range_are_refused_in_one_line(settings, word):
    model = tiny("full")
    with pytest.raises(ValueError) as error:
        lfu_backward(model, **dict(zip(("input_ids", "labels"), tiny_batch())) | settings)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_a_third_of_this_name_is_told_so():
    with pytest.raises(ValueError, match="of 2 layers none are late; write all, or a range"):
        parse_layers("late", 2)


def test_without_gradients_the_head_makes_none(monkeypatch):
    """needs_input_grad is true under no_grad too: a trained head's gradient would be computed."""
    model, batch, asked = tiny("full"), passes.make_batch(*tiny_batch()), []

    class Noted:
        def apply(h, weight, *rest):
            asked.append(weight.requires_grad)
            return passes_cross_entropy(h, weight, *rest)
    passes_cross_entropy = passes.ChunkedCrossEntropy.apply
    monkeypatch.setattr(passes, "ChunkedCrossEntropy", Noted)
    with torch.no_grad():
        loss = passes.sft_loss(model, passes.last_state(model, batch), batch)
    assert loss == passes.sft_loss(model, passes.last_state(model, batch), batch)
    assert asked == [False, True]


def test_a_step_without_targets_has_a_divisor_of_zero():
    model, (ids, labels) = tiny(), tiny_batch()
    result = lfu_backward(model, ids, torch.full_like(labels, -100), num_target_tokens=0)
    assert result["sft"] == 0 and all(p.grad is None or not p.grad.any()
                                      for p in model.parameters())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_nothing_passes_for_learning(off):
    for aux in (*AUX, "none"):
        with off(), pytest.raises(ValueError, match="gradients are off"):
            lfu_backward(tiny(), *tiny_batch(), aux)


def test_a_frozen_model_is_refused():
    model = tiny("full").requires_grad_(False)
    for aux in (*AUX, "none"):
        with pytest.raises(ValueError, match="requires a gradient"):
            lfu_backward(model, *tiny_batch(), aux)


# ---- planted mistakes: what the tests above would see ----

DEFINITION_MISTAKES = ("detach on the other side", "no detach", "embedding included",
                       "SFT at the perturbed model", "direction not constant")


@pytest.mark.slow
@pytest.mark.parametrize("mistake", DEFINITION_MISTAKES)
@pytest.mark.parametrize("aux", AUX)
def test_planted_mistake_in_the_definition_is_seen(aux, mistake):
    model, batch = tiny("full"), tiny_batch()
    if mistake == "direction not constant" and definitions.in_place(aux, model):
        return  # h' is taken at th_aux as a leaf: there is no such path
    with sdpa_kernel(SDPBackend.MATH):  # the only one with a second derivative
        wrong, _, _ = definition(model, *batch, aux, mistake=mistake)
    assert difference(fused(model, *batch, aux)[0], wrong) > 1e-5, (
        f"the comparison with the definition (1e-8) could not tell this mistake for {aux}")


def descent(th_aux, g, alpha, model, batch):
    return ascend(th_aux, g, -alpha)


def one_norm_a_tensor(th_aux, g, alpha, model, batch):
    for tensor, direction in zip(th_aux, g):
        ascend([tensor], [direction], alpha)
    return passes.joint_norm(g)


def not_normalised(th_aux, g, alpha, model, batch):
    return ascend(th_aux, g, alpha * passes.joint_norm(g))


def channels_summed(h, h_aux, layers, model):
    return mse(h, h_aux, layers) * h[0].shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [
    dict(move=descent), dict(move=one_norm_a_tensor), dict(move=not_normalised),
    dict(compare=channels_summed), dict(lam=0.1, alpha=5.0), dict(layers=[1, 2, 3])],
    ids=lambda parts: getattr(*parts.values(), "__name__", "") if len(parts) == 1 else "swapped")
@pytest.mark.parametrize("aux", AUX)
def test_planted_mistake_in_a_part_is_seen(aux, parts):
    model, batch = tiny(), tiny_batch()
    with AUXILIARIES[aux](model, torch.Generator()) as th_aux:
        if len(th_aux) == 1 and parts.get("move") is one_norm_a_tensor:
            pytest.skip("of one tensor both norms are the same")
    expected, _, _ = definition(model, *batch, aux)
    assert difference(stepped(model, *batch, aux)[0], expected) <= 1e-8
    assert difference(stepped(model, *batch, aux, **parts)[0], expected) > 1e-3


def test_positions_of_the_labels_would_be_seen():
    """The authors' code compares the states AT the supervised tokens, one too late."""
    model, (ids, labels) = tiny(), tiny_batch()
    expected, _, _ = definition(model, ids, labels, "reps")
    batch = passes.make_batch(ids, labels)
    batch.positions = batch.positions + 1
    model.zero_grad()
    lfu_step(model, batch, AUXILIARIES["reps"])
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert difference(got, expected) > 1e-3


def test_an_exception_keeps_the_gradients_of_earlier_micro_batches():
    model, batch = tiny(), tiny_batch()
    before, _ = stepped(model, *batch, "inplace")
    with pytest.raises(RuntimeError, match="planted"):
        lfu_step(model, passes.make_batch(*batch), AUXILIARIES["inplace"], move=then_fails(ascend))
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before and equal(before, after)


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


@pytest.mark.parametrize("aux", ["lora", "reps", "inplace"])
def test_cosine_and_movement_are_those_of_the_written_out_parts(aux):
    """gradient_cosine from three norms, against the cosine of both gradients, each taken alone;
    movement against states taken inside and outside the auxiliary's block."""
    model, (ids, labels) = tiny(), tiny_batch()
    th = [p for p in model.parameters() if p.requires_grad]

    def of(lam):
        for p in th:
            p.grad = None
        result = lfu_backward(model, ids, labels, aux, lam, 0.3,
                              generator=torch.Generator().manual_seed(3))
        return torch.cat([p.grad.flatten() for p in th]), result
    both, result = of(7.0)
    sft, _ = of(0.0)
    cosine = F.cosine_similarity(both - sft, sft, dim=0)
    torch.testing.assert_close(result["gradient_cosine"], cosine, rtol=1e-8, atol=1e-10)
    assert abs(cosine) > 0.01  # the sign is seen
    h = passes.states(model, passes.make_batch(ids, labels))
    squares = torch.stack([x.detach().square().mean() for x in h[1:]])
    expected = (result["consistency_per_layer"] / squares).sqrt()
    torch.testing.assert_close(result["movement"], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("aux", AUX)
def test_the_first_graph_is_let_go_before_the_second_pass(aux):
    """What is compared holds on to no graph: its thousand small nodes would keep a process's freed
    memory in pieces (a quarter more at the peak of SmolLM2's LoRA step)."""
    seen = []

    def compare(h, h_aux, layers, model):
        seen.extend(x.grad_fn for x in h)
        assert all(x.grad_fn is not None for x in h_aux[1:])
        return mse(h, h_aux, layers)
    stepped(tiny(), *tiny_batch(), aux=aux, compare=compare)
    assert len(seen) == 5 and not any(seen)
