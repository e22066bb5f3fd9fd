"""model.Llama computes what transformers' LlamaForCausalLM computes: logits, every hidden state,
every gradient.

Tolerance: max|a - b| / max|b| <= 1e-5 in float32, all weights random (conftest.py). Then what is
this model's own: right padding without a mask, key/value cache, dtypes, activation checkpointing.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import (difference, LLAMA3_ROPE, next_token_loss, random_ids, TINY, tiny_model,
                      transformers_twin)
from lfu_min import model as model_module
from lfu_min.files.checkpoint import parse_config
from lfu_min.model import Block, Llama, RMSNorm, rope_tables

VARIANTS = {
    "grouped-query": {},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    # T = 96 of an original 32
    "llama3 RoPE": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "plain heads": {"num_key_value_heads": 4, "head_dim": None, "rope_theta": 1e6,
                    "rms_norm_eps": 1e-3},
    "one kv head": {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
}


def twins(changes, dtype=torch.float32):
    """(ours, theirs) with the same random weights; loading is strict, so the parameter names are
    the same."""
    theirs = transformers_twin(**changes)
    ours = Llama(parse_config({**TINY, **changes}))
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs


def their_states(theirs, ids, **kwargs):
    return theirs(input_ids=ids, output_hidden_states=True, **kwargs)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_all_hidden_states_equal_transformers(changes):
    ours, theirs = twins(changes)
    ids = random_ids()
    with torch.no_grad():
        reference = their_states(theirs, ids)
        logits, states = ours(ids), ours.hidden_states(ids)
    assert len(states) == TINY["num_hidden_layers"] + 1
    worst = max(difference(logits, reference.logits), difference(states, reference.hidden_states))
    print(f"difference {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradients_of_all_parameters_equal_transformers(changes):
    # at this scale a layer doubles the rounding errors
    ours, theirs = twins({**changes, "num_hidden_layers": 2})
    ids = random_ids(T=40)
    next_token_loss(ours(ids), ids).backward()
    next_token_loss(their_states(theirs, ids).logits, ids).backward()
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)  # a tied head counts once
    differences = {name: difference(p.grad, expected[name].grad)
                   for name, p in ours.named_parameters()}
    print(f"difference {max(differences.values()):.1e}")
    assert max(differences.values()) <= 1e-5, differences


# ---- the comparison has teeth: each planted mistake is seen, by far more than the tolerance ----

def swap_norms(ours, monkeypatch):
    for block in ours.model.layers:
        first, second = block.input_layernorm, block.post_attention_layernorm
        block.input_layernorm, block.post_attention_layernorm = second, first


def interleaved_rope(ours, monkeypatch):
    def rotate(x, cos, sin):  # Meta's layout: neighbours are a pair
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        cos, sin = (table[..., :table.shape[-1] // 2].repeat_interleave(2, -1)
                    for table in (cos, sin))
        return x * cos + turned * sin
    monkeypatch.setattr(model_module, "rotate", rotate)


def unscaled_rope(ours, monkeypatch):
    ours.config.rope_scaling = {}


def other_epsilon(ours, monkeypatch):
    for module in ours.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-2


def key_heads_tiled(ours, monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention
    def tiled(q, k, v, enable_gqa=False, **kwargs):  # heads 0 1 0 1 instead of 0 0 1 1
        n = q.shape[1] // k.shape[1]
        return attention(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1), **kwargs)
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", tiled)


def attention_left_out_of_the_stream(ours, monkeypatch):
    def forward(self, x, rope, mask=None, cache=None, layer=0):  # the second sum leaves out a term
        y = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(y))
    monkeypatch.setattr(Block, "forward", forward)


def gate_and_up_swapped(ours, monkeypatch):
    for block in ours.model.layers:
        block.mlp.gate_proj, block.mlp.up_proj = block.mlp.up_proj, block.mlp.gate_proj


def not_causal(ours, monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention",
                        lambda q, k, v, is_causal=False, **kwargs: attention(q, k, v, **kwargs))


MISTAKES = [swap_norms, interleaved_rope, unscaled_rope, other_epsilon, key_heads_tiled,
            attention_left_out_of_the_stream, gate_and_up_swapped, not_causal]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_planted_mistake_breaks_parity(mistake, monkeypatch):
    ours, theirs = twins(VARIANTS["llama3 RoPE"])
    ids = random_ids()
    mistake(ours, monkeypatch)
    with torch.no_grad():
        assert difference(ours(ids), their_states(theirs, ids).logits) > 1e-3


# ---- RoPE ----

def test_llama3_frequencies_are_the_published_ones():
    """Llama 3.1's: theta 500000, head_dim 128, factor 8 beyond 8192 positions."""
    scaling = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    config = parse_config({**TINY, "head_dim": 128, "rope_theta": 500000.0,
                           "rope_scaling": scaling})
    cos, sin = rope_tables(config, torch.ones(1, 1, dtype=torch.int64), torch.float64)
    freq = torch.atan2(sin, cos)[0, 0, 0]  # the angle at position 1
    assert torch.equal(freq[:64], freq[64:])
    assert freq[[0, 1, 63]].tolist() == pytest.approx([1.0, 0.8146172, 3.0689e-07], rel=1e-5)
    plain = 500000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    ratio = freq[:64] / plain
    assert difference(ratio[:29], torch.ones(29)) < 1e-12  # short waves are left alone
    assert difference(ratio[35:], torch.full((29,), 1 / 8)) < 1e-12  # long ones are 8 times slower
    assert (ratio[28:36].diff() < 0).all()  # blended between


@pytest.mark.parametrize("name", ["grouped-query", "llama3 RoPE"])
def test_far_positions_equal_transformers(name):
    ours, theirs = twins(VARIANTS[name])
    ids, positions = random_ids(T=40), torch.arange(100_000, 100_040)[None]
    with torch.no_grad():
        worst = difference(ours.hidden_states(ids, positions=positions),
                           their_states(theirs, ids, position_ids=positions).hidden_states)
    print(f"difference {worst:.1e}")
    assert worst <= 1e-5


# ---- padding and the arguments for generation ----

def test_right_padding_needs_no_mask():
    """States of real tokens do not see what follows them; transformers with an attention mask
    agrees."""
    ours, theirs = twins(VARIANTS["grouped-query"])
    ids, length = random_ids(T=60), 41
    padded, other = ids.clone(), ids.clone()
    padded[0, length:] = 0
    other[0, length:] = 5
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    with torch.no_grad():
        reference = their_states(theirs, padded, attention_mask=mask).hidden_states
        for h, h_other, h_short, r in zip(ours.hidden_states(padded), ours.hidden_states(other),
                                          ours.hidden_states(ids[:1, :length]), reference):
            assert torch.equal(h[0, :length], h_other[0, :length])  # bit for bit
            assert difference(h[0, :length], h_short[0]) <= 1e-5
            assert difference(h[0, :length], r[0, :length]) <= 1e-5
            assert difference(h[1], r[1]) <= 1e-5


@pytest.mark.parametrize("name", ["grouped-query", "llama3 RoPE", "plain heads"])
def test_decoding_with_a_cache_equals_the_full_pass(name):
    """In pieces of several tokens and of one; hidden states too. The cache holds K heads, not H."""
    ours = tiny_model(**VARIANTS[name])
    ids = random_ids(T=100)
    with torch.no_grad():
        full = ours.hidden_states(ids)
        cache, pieces, done = [None] * 3, [], 0
        for T in (70, 1, 1, 20, 1, 7):
            pieces.append(ours.hidden_states(ids[:, done:done + T], cache=cache))
            done += T
            K, d = ours.config.num_key_value_heads, ours.config.head_dim
            assert all(k.shape == v.shape == (2, K, done, d) for k, v in cache)
        assert difference([torch.cat(h, dim=1) for h in zip(*pieces)], full) <= 1e-5
        stale = [None] * 3  # teeth: positions that restart at 0
        ours(ids[:, :70], cache=stale)
        wrong = ours.hidden_states(ids[:, 70:71], positions=torch.zeros(1, 1, dtype=torch.int64),
                                   cache=stale)
        assert difference(wrong[-1], full[-1][:, 70:71]) > 1e-3


def test_left_padding_with_mask_and_positions_equals_each_sequence_alone():
    """As generation batches prompts: prefill, then one token at a time, rows of different
    length."""
    ours = tiny_model()
    rows = [random_ids(1, 30, seed=1), random_ids(1, 18, seed=2)]
    prompt, steps = [24, 12], 6
    width = max(prompt)
    pads = torch.tensor([width - n for n in prompt])  # (B,)
    ids = torch.zeros(2, width + steps, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, pads[b]:] = row
    slots = torch.arange(width + steps)
    positions = (slots[None] - pads[:, None]).clamp(min=0)  # (B, S)
    real = slots[None] >= pads[:, None]  # (B, S)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    with torch.no_grad():
        cache = [None] * 3
        logits = [ours(ids[:, :width], positions[:, :width],
                       (causal & real[:, None, :width])[:, None], cache)]
        for t in range(width, width + steps):
            logits.append(ours(ids[:, t:t + 1], positions[:, t:t + 1], real[:, None, None, :t + 1],
                               cache))
        logits = torch.cat(logits, dim=1)
        for b, row in enumerate(rows):
            assert difference(logits[b, pads[b]:], ours(row)[0]) <= 1e-5
        unmasked = ours(ids, positions)  # teeth: the pads are attended to
        assert difference(unmasked[1, pads[1]:], ours(rows[1])[0]) > 1e-3


def test_the_head_can_be_applied_to_chosen_positions():
    ours, ids = tiny_model(), random_ids(T=20)
    with torch.no_grad():
        states, logits = ours.hidden_states(ids)[-1], ours(ids)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert difference(ours.lm_head(states[chosen]), logits[chosen]) <= 1e-6


# ---- dtypes ----

class Dtypes(TorchDispatchMode):
    """The floating dtypes of everything any operation makes, in the forward and the backward."""
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.seen.add(t.dtype)
        return out


@pytest.mark.parametrize("name", ["biases", "llama3 RoPE"])
def test_float64_stays_float64_all_through(name, monkeypatch):
    ours, ids = tiny_model(dtype=torch.float64, **VARIANTS[name]), random_ids(T=30)
    with Dtypes() as dtypes:
        next_token_loss(ours(ids), ids).backward()
    assert dtypes.seen == {torch.float64}
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: torch.nn.functional.rms_norm(  # teeth
        x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype))
    with Dtypes() as dtypes:
        ours(ids)
    assert torch.float32 in dtypes.seen


def test_float32_is_close_to_float64():
    ours, ids = tiny_model(), random_ids()
    with torch.no_grad():
        single, double = ours.hidden_states(ids), ours.double().hidden_states(ids)
    print(f"difference {difference(single, double):.1e}")
    assert difference(single, double) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_multiply_in_half_and_keep_a_float32_residual_stream(dtype):
    ours, ids = tiny_model(dtype=dtype), random_ids(T=30)
    made = {}
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: made.update({name: o.dtype}))
    states = ours.hidden_states(ids)
    assert {h.dtype for h in states} == {torch.float32}
    for name, seen in made.items():
        # norms and blocks
        if name.endswith("norm") or name.startswith("model.layers.") and name.count(".") == 2:
            assert seen is torch.float32, name
        elif name.endswith("_proj"):
            assert seen is dtype, name
    assert {p.dtype for p in ours.parameters()} == {dtype}


def test_half_weights_compute_norm_and_rope_in_float32():
    """The same float32 stream through half and float32 modules: norm and rotation differ by the
    weights' rounding."""
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    half = tiny_model(dtype=torch.bfloat16)
    exact = tiny_model(dtype=torch.bfloat16).float()  # the same rounded weights
    norm = half.model.norm(x)
    assert norm.dtype is torch.float32 and torch.equal(norm, exact.model.norm(x))
    tables = {}
    for name, m in (("half", half), ("exact", exact)):
        handle = m.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, name=name: tables.update({name: args[1]}))
        m(random_ids())
        handle.remove()
    for a, b in zip(tables["half"], tables["exact"]):
        assert a.dtype is torch.float32 and torch.equal(a, b)
    rotated = model_module.rotate(torch.ones(1, 4, 96, 16, dtype=torch.bfloat16), *tables["half"])
    assert difference(rotated, model_module.rotate(torch.ones(1, 4, 96, 16),
                                                   *tables["exact"])) <= 2 ** -8


# ---- activation checkpointing ----

def test_activation_checkpointing_gives_the_same_gradients_and_recomputes():
    ids, gradients, calls = random_ids(T=40), [], []
    for on in (False, True):
        ours = tiny_model(**VARIANTS["biases"])
        ours.activation_checkpointing = on
        count = []
        for block in ours.model.layers:
            block.register_forward_pre_hook(lambda m, args: count.append(1))
        next_token_loss(ours(ids), ids).backward()
        gradients.append([p.grad for p in ours.parameters()])
        calls.append(len(count))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))  # bit for bit
    assert calls == [3, 6]  # each block a second time
    with torch.no_grad():
        count.clear()
        ours(ids)
    assert len(count) == 3
