"""Claim: representation steering adds d_l to the output of block l, and does nothing else.

Zero vectors leave every state as it is, bit for bit; d_l changes the states from layer l on; the
last vector acts before the final norm; nothing stays behind. h' equals transformers' with the same
vectors added by hooks: 1e-5 in fp32.
"""
import pytest
import torch

from conftest import difference, tiny, transformers_twin
from lfu_min.steering import aux_steering

L = 3


def model_of(dtype=torch.float32):
    return tiny("full", dtype, layers=L)


def some_ids():
    return torch.randint(29, (2, 7), generator=torch.Generator().manual_seed(1))


def random_vectors():
    return torch.randn(L, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def steered_states(model, vectors):
    with aux_steering(model) as moved:
        for d, value in zip(moved, vectors):
            d += value
        return model.hidden_states(some_ids())


def hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_have_no_effect_bit_for_bit(dtype):
    model = model_of(dtype)
    with torch.no_grad():
        plain = model.hidden_states(some_ids())
    assert all(torch.equal(a, b) for a, b in zip(steered_states(model, torch.zeros(L, 16)), plain))


@pytest.mark.parametrize("dtype, expected", [
    (torch.float64, torch.float64), (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32)])
def test_one_vector_a_block_in_the_residual_streams_dtype(dtype, expected):
    model = model_of(dtype)
    with aux_steering(model) as moved:
        assert [(d.shape, d.dtype, d.requires_grad) for d in moved] == [((16,), expected, True)] * L
        model.hidden_states(some_ids())[-1].sum().backward()
        assert all(d.grad.dtype == expected and d.grad.count_nonzero() for d in moved)


@pytest.mark.parametrize("layer", range(1, L + 1))
def test_a_vector_changes_its_layer_and_the_later_ones_alone(layer):
    model, vectors = model_of(), torch.zeros(L, 16)
    vectors[layer - 1] = random_vectors()[layer - 1]
    with torch.no_grad():
        plain = model.hidden_states(some_ids())
    steered = steered_states(model, vectors)
    for l, (a, b) in enumerate(zip(steered, plain)):
        assert torch.equal(a, b) if l < layer else ((a - b).abs().amax(-1) > 1e-3).all(), l
    if layer < L:
        added = steered[layer] - plain[layer]
        torch.testing.assert_close(added, vectors[layer - 1].expand(2, 7, -1), rtol=0, atol=1e-5)


def test_the_last_vector_is_added_before_the_final_norm():
    model, d, seen = model_of(), random_vectors()[-1], []
    hook = model.model.norm.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        plain = model.hidden_states(some_ids())[-1]
    hook.remove()
    steered = steered_states(model, torch.stack([*torch.zeros(L - 1, 16), d]))[-1]
    with torch.no_grad():
        assert torch.equal(steered, model.model.norm(seen[0] + d))
    assert (steered - (plain + d)).abs().max() > 0.1  # the planted mistake: added after the norm


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind_also_after_an_exception(fails):
    model = model_of()
    with torch.no_grad():
        plain, before = model.hidden_states(some_ids()), hooks(model)
    try:
        with aux_steering(model) as moved:
            assert sum(hooks(model)) == sum(before) + L
            with torch.no_grad():
                for d in moved:
                    d += 1
            if fails:
                raise RuntimeError("planted")
    except RuntimeError:
        pass
    assert hooks(model) == before
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.hidden_states(some_ids()), plain))


def test_activation_checkpointing_keeps_the_vectors_gradient():
    """The hook sits outside the recomputed block: applied once, not twice."""
    model, gradients = model_of(), []
    for model.activation_checkpointing in (False, True):
        with aux_steering(model) as moved:
            model.hidden_states(some_ids())[-1].square().sum().backward()
            gradients.append([d.grad for d in moved])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_steered_states_equal_transformers_with_the_same_hooks():
    model, vectors = model_of(), random_vectors()
    reference = transformers_twin(model)

    def expected(layers):  # vectors[i] on the block layers[i]
        # States are recorded here: whether output_hidden_states sees what hooks change depends on
        # transformers' version.
        states = []

        def add(d):
            def hook(module, inputs, out):
                states.append((out[0] if isinstance(out, tuple) else out) + d)
                return (states[-1], *out[1:]) if isinstance(out, tuple) else states[-1]
            return hook
        decoder = reference.model
        attached = [decoder.embed_tokens.register_forward_hook(add(0)),
                    decoder.norm.register_forward_hook(add(0)),
                    *(decoder.layers[i].register_forward_hook(add(d))
                      for i, d in zip(layers, vectors))]
        with torch.no_grad():
            reference(some_ids())
        for hook in attached:
            hook.remove()
        return states[:L] + states[-1:]  # the last block's state is taken after the final norm

    got = steered_states(model, vectors)
    assert len(got) == L + 1 and difference(got, expected(range(L))) <= 1e-5
    wrong = expected(reversed(range(L)))  # the planted mistake: vectors swapped
    assert min(difference(a, b) for a, b in zip(got[1:], wrong[1:])) > 1e-3
