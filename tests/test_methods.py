"""Claim: every auxiliary kind, move and distance that train.py offers does what its definition says
(definitions.py, 1e-8 in float64), and has the properties that the step relies on.

The tests run over the dictionaries of lfu_min/methods: a new entry is tested by being there, and
fails by name until its definition is written.
"""
import contextlib

import pytest
import torch

from conftest import difference, tiny, tiny_batch
import definitions
from lfu_min.engine import passes
from lfu_min.lfu import ascend, lfu_step
from lfu_min.methods import AUXILIARIES, DISTANCES, IN_PLACE, MOVES

SEVERAL_STEPS = {"two-steps"}  # moves whose way may bend, and be shorter than alpha
CHOICES = {"KINDS": AUXILIARIES, "MOVES": MOVES, "TERMS": DISTANCES}


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def step(model, batch, aux, **parts):
    """{name: gradient} and values of lfu_step from empty .grad, beside a second batch."""
    model.zero_grad()
    batch = passes.make_batch(*batch, generator=generator(),
                              other=passes.make_batch(*tiny_batch(seed=2, T=7)))
    values = lfu_step(model, batch, AUXILIARIES[aux], **parts)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, values


# ---- an entry has a definition, and equals it ----

@pytest.mark.parametrize("kind", CHOICES)
def test_every_choice_has_a_definition(kind):
    lacking = CHOICES[kind].keys() ^ getattr(definitions, kind).keys()
    assert not lacking, (f"{', '.join(lacking)}: lfu_min/methods and {kind} of tests/definitions.py"
                         " should have the same entries; write out the missing one slowly")


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux", AUXILIARIES)
@pytest.mark.parametrize("move", MOVES)
def test_every_move_equals_its_definition(move, aux, tune):
    model, batch = tiny(tune), tiny_batch()
    expected, values, _ = definitions.definition(model, *batch, aux, move=move,
                                                 ascent_batch=tiny_batch(seed=2, T=7))
    got, result = step(model, batch, aux, move=MOVES[move])
    assert difference(got, expected) <= 1e-8
    assert result["ascent_norm"].item() == pytest.approx(values["ascent_norm"], rel=1e-10)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux", AUXILIARIES)
@pytest.mark.parametrize("compare", DISTANCES)
def test_every_distance_equals_its_definition(compare, aux, tune):
    if compare == "logit-kl" and aux in IN_PLACE and tune == "full":
        return  # refused: the head that makes z has moved
    model, batch = tiny(tune), tiny_batch()
    for layers in (None, [2, 3]):
        expected, values, _ = definitions.definition(model, *batch, aux, compare=compare,
                                                     layers=layers)
        got, result = step(model, batch, aux, compare=DISTANCES[compare], layers=layers)
        assert difference(got, expected) <= 1e-8
        torch.testing.assert_close(result["consistency_per_layer"], values["consistency_per_layer"],
                                   rtol=1e-8, atol=1e-14)  # 0 where th_aux cannot reach a layer


# ---- auxiliary kinds: what makes two passes enough ----

def outputs(model, ids):
    states = model.hidden_states(ids)
    return [*states, model.lm_head(states[-1])]


def check_kind(kind, model):
    """Zero effect at the start, leaves that require a gradient, nothing left behind."""
    ids, weights = tiny_batch()[0], {n: w.clone() for n, w in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    trained, state = passes.trained(model), torch.get_rng_state()
    with torch.no_grad():
        plain = outputs(model, ids)
    for fails in (False, True):
        with contextlib.suppress(RuntimeError), kind(model, generator()) as th_aux:
            with torch.no_grad():
                attached = outputs(model, ids)
            assert th_aux and all(t.is_leaf and t.requires_grad for t in th_aux), "no leaves"
            assert difference(attached, plain) <= 1e-12, "not the model itself before the ascent"
            passes.sft_loss(model, passes.last_state(model, passes.make_batch(*tiny_batch())),
                            passes.make_batch(*tiny_batch())).backward()
            assert all(t.grad is not None and t.grad.any() for t in th_aux), "would never move"
            with torch.no_grad():
                for t in th_aux:
                    t += 1
                assert difference(outputs(model, ids)[-1], plain[-1]) > 1e-3, "has no effect"
            if fails:
                raise RuntimeError("planted")
        assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items()), "weights"
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(outputs(model, ids), plain)), "attached"
        assert [type(m) for m in model.modules()] == modules
        assert [id(p) for p in trained] == [id(p) for p in passes.trained(model)], "other th"
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a gradient"
    assert torch.equal(torch.get_rng_state(), state), "draws from torch's global generator"


@pytest.mark.parametrize("tune", ["lora", "full", "tied"])
@pytest.mark.parametrize("aux", AUXILIARIES)
def test_a_kind_starts_at_zero_effect_and_leaves_nothing_behind(aux, tune):
    check_kind(AUXILIARIES[aux], tiny(tune))


@pytest.mark.parametrize("aux", AUXILIARIES)
def test_kinds_that_move_the_models_own_weights_are_marked(aux):
    assert (aux in IN_PLACE) == definitions.in_place(aux, tiny("full"))


def steering_but(change):
    """A kind that yields change(the vectors of `reps`, generator)."""
    @contextlib.contextmanager
    def kind(model, generator):
        with AUXILIARIES["reps"](model, generator) as vectors:
            yield change(vectors, generator)
    return kind


@torch.no_grad()
def noised(vectors, generator):
    for d in vectors:
        d += 0.01 * torch.randn(d.shape, generator=generator, dtype=d.dtype)
    return vectors


def stays_attached(model, generator, kept=[]):
    kept.append(AUXILIARIES["reps"](model, generator))  # kept, or else Python would end it
    return contextlib.nullcontext(kept[-1].__enter__())


@contextlib.contextmanager
def stays_after_an_exception(model, generator):
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(AUXILIARIES["reps"](model, generator))
        stack = stack.pop_all()
        stack.close()


def does_not_put_back(model, generator):
    return contextlib.nullcontext(passes.trained(model))


@contextlib.contextmanager
def trains_the_base(model, generator):
    base = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    before = base.detach().clone()
    yield [base]
    with torch.no_grad():
        base.copy_(before)


@pytest.mark.parametrize("mistake, said", [
    (steering_but(noised), "not the model itself"), (stays_attached, "attached"),
    (does_not_put_back, "weights"), (trains_the_base, "other th"),
    (steering_but(lambda vectors, _: [1 * d for d in vectors]), "no leaves"),
    (steering_but(lambda vectors, _: [d.requires_grad_(False) for d in vectors]), "no leaves"),
    (steering_but(lambda vectors, _: []), "no leaves"),
    (steering_but(lambda vectors, _: [*vectors, torch.zeros(3, requires_grad=True)]), "never move"),
    (steering_but(lambda vectors, _: [torch.rand(1), vectors][1]), "global generator")])
def test_planted_mistake_in_a_kind_is_seen(mistake, said):
    with pytest.raises(AssertionError, match=said):
        check_kind(mistake, tiny())


# ---- moves ----

def check_move(move, aux, several_steps=False, fresh=False):
    """Length alpha, `.grad` left alone, a norm returned. fresh: the trained LoRA has B = 0, as at
    the start of a run, so that `inplace` has a gradient of zero on each A."""
    model, lengths = tiny(), []
    if fresh:
        model.load_state_dict({name: 0 * w if "lora_B" in name else w
                               for name, w in model.state_dict().items()})

    def measured(th_aux, g, alpha, model, batch):
        before = [t.detach().clone() for t in th_aux]
        grads = [p.grad.clone() for p in passes.trained(model)]
        norm = move(th_aux, g, alpha, model, batch)
        lengths.append(passes.joint_norm([a - b for a, b in zip(th_aux, before)]).item())
        kept = [torch.equal(p.grad, old) for p, old in zip(passes.trained(model), grads)]
        assert all(kept), "`.grad` changed"
        assert norm > 0, "returns no norm"
        return norm
    step(model, tiny_batch(), aux, alpha=0.3, move=measured)
    if several_steps:  # not quite in one direction
        assert 0.15 < lengths[0] < 0.3 - 1e-6
    else:
        assert lengths[0] == pytest.approx(0.3, rel=1e-10), (
            "not alpha: that is the length over all of th_aux together, and tensors whose g is 0 "
            "do not move (a move of several steps should be named in SEVERAL_STEPS)")


def check_without_targets(move, aux):
    model, (ids, labels) = tiny(), tiny_batch()
    nothing = ids, torch.full_like(labels, -100)
    batch = passes.make_batch(*nothing, generator=generator(), other=passes.make_batch(*nothing))
    values = lfu_step(model, batch, AUXILIARIES[aux], move=move)
    assert all(value.count_nonzero() == 0 for value in values.values())
    assert all(p.grad.count_nonzero() == 0 for p in passes.trained(model))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("aux", AUXILIARIES)
@pytest.mark.parametrize("move", MOVES)
def test_a_move_has_length_alpha_and_leaves_the_gradients_alone(move, aux, fresh):
    check_move(MOVES[move], aux, move in SEVERAL_STEPS, fresh)


@pytest.mark.parametrize("aux", AUXILIARIES)
@pytest.mark.parametrize("move", MOVES)
def test_without_targets_nothing_moves(move, aux):
    check_without_targets(MOVES[move], aux)


def not_normalised(th_aux, g, alpha, model, batch):
    return ascend(th_aux, g, alpha * passes.joint_norm(g))


@torch.no_grad()
def by_tensor(th_aux, g, alpha, model, batch):
    """Each tensor normalised by itself, and the tensors without a gradient counted as well."""
    for t, direction in zip(th_aux, g):
        t += alpha / len(g) ** 0.5 * passes.over_norm(direction, passes.joint_norm([direction]))
    return passes.joint_norm(g)


def eats_the_gradient(th_aux, g, alpha, model, batch):
    norm = ascend(th_aux, g, alpha)
    passes.trained(model)[0].grad.zero_()
    return norm


def returns_no_norm(th_aux, g, alpha, model, batch):
    return 0 * ascend(th_aux, g, alpha)


@torch.no_grad()
def divides_by_zero(th_aux, g, alpha, model, batch):
    norm = passes.joint_norm(g)
    for t, direction in zip(th_aux, g):
        t += alpha * direction / norm
    return norm


@pytest.mark.parametrize("mistake, said", [
    (not_normalised, "not alpha"), (eats_the_gradient, "changed"), (returns_no_norm, "no norm")])
def test_planted_mistake_in_a_move_is_seen(mistake, said):
    with pytest.raises(AssertionError, match=said):
        check_move(mistake, "reps")


def test_a_length_that_counts_tensors_which_do_not_move_is_seen():
    check_move(by_tensor, "inplace")
    with pytest.raises(AssertionError, match="not alpha"):
        check_move(by_tensor, "inplace", fresh=True)


def test_a_move_that_divides_by_zero_is_seen():
    check_move(divides_by_zero, "reps")
    with pytest.raises(AssertionError):
        check_without_targets(divides_by_zero, "reps")


def test_float16_scales_the_other_batch_by_its_own_divisor():
    """The two batches' loss scales differ where their numbers of targets do; Eq 2 must not see it.
    (Scaled by the step's divisor, a batch of few targets overflows beside one of many.)"""
    model, (ids, labels) = tiny("lora", torch.float32), tiny_batch()
    plain, _ = step(model, (ids, labels), "reps", move=MOVES["other-batch"])
    other = passes.make_batch(*tiny_batch(seed=2, T=7), loss_scale=64.0)
    batch = passes.make_batch(ids, labels, loss_scale=4096.0, generator=generator(), other=other)
    model.zero_grad()
    lfu_step(model, batch, AUXILIARIES["reps"], move=MOVES["other-batch"])
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert difference(got, plain) <= 1e-5


# ---- distances ----

def check_distance(distance):
    """0 for equal states, positive otherwise, a gradient for h' alone."""
    model = tiny("full")
    drawn = generator()
    h, h_aux = ([torch.randn(5, 16, dtype=torch.float64, generator=drawn).requires_grad_()
                 for _ in range(5)] for _ in range(2))
    same = distance(h, [x.detach().clone() for x in h], [1, 2, 3, 4], model)
    terms = distance(h, h_aux, [1, 2, 3, 4], model)
    assert terms.dim() == 1 and terms.shape == same.shape, "one term a layer, or a single one"
    assert same.abs().max() < 1e-12, "not 0 for equal states"
    assert (terms >= 0).all() and terms.mean() > 1e-3, "not positive"
    assert terms.requires_grad, "no gradient for h'"
    terms.mean().backward()
    assert all(x.grad is None for x in h), "h must be a constant: detach it"
    assert any(x.grad is not None and x.grad.any() for x in h_aux[1:]), "no gradient for h'"
    assert h_aux[0].grad is None, "the embedding is not compared: detach h_aux[0]"


@pytest.mark.parametrize("compare", DISTANCES)
def test_a_distance_is_zero_for_equal_states_positive_otherwise_and_moves_h_aux_alone(compare):
    check_distance(DISTANCES[compare])


def summed(term, detach=True):
    """A distance with the mean of term(h', h) for each layer, h detached or not."""
    def distance(h, h_aux, layers, model):
        first = [x.detach() if detach else x for x in h]
        return torch.stack([term(h_aux[l], first[l]).mean() for l in layers])
    return distance


@pytest.mark.parametrize("mistake, said", [
    (summed(lambda a, b: (a - b) ** 2 + 1), "not 0"), (summed(lambda a, b: a - b), "not positive"),
    (summed(lambda a, b: -(a - b) ** 2), "not positive"),
    (summed(lambda a, b: (a - b) ** 2, detach=False), "detach it"),
    (summed(lambda a, b: (a.detach() - b) ** 2), "no gradient"),
    (lambda h, h_aux, layers, model: DISTANCES["mse"](h, h_aux, layers).sum(), "one term a layer"),
    (lambda h, h_aux, layers, model: DISTANCES["mse"](h, h_aux, [0, *layers]), "embedding")])
def test_planted_mistake_in_a_distance_is_seen(mistake, said):
    check_distance(summed(lambda a, b: (a - b) ** 2))
    with pytest.raises(AssertionError, match=said):
        check_distance(mistake)


def test_planted_mistakes_in_a_part_are_seen():
    """A distance of the other sign's detach, and a descent that calls itself an ascent."""
    model, batch = tiny(), tiny_batch()
    expected, _, _ = definitions.definition(model, *batch, "lora")
    wrong = dict(move=lambda th_aux, g, alpha, model, batch: ascend(th_aux, g, -alpha)), dict(
        compare=lambda h, h_aux, layers, model: DISTANCES["mse"](h, h_aux, layers) / len(layers))
    for parts in wrong:
        assert difference(step(model, batch, "lora", **parts)[0], expected) > 1e-3
