"""The transformer: a Llama decoder in one file, with Hugging Face's parameter names. Mistral is the
same; Qwen 2.5 has biases on q, k and v, Qwen 3 norms on q and k: one field of LlamaConfig each.

Nothing in here knows about LfU. lora.py and steering.py attach to it, lfu.py asks it for hidden
states, and files/checkpoint.py fills it from disk. tests/test_model.py and tests/test_families.py
compare logits, every hidden state and every gradient with transformers' models.

Shapes: B batch, T tokens, D hidden, H query heads, K key/value heads, d head_dim, L layers, V
vocabulary, S tokens attended to: those in the cache, the T new ones among them.

Precision. Linear layers multiply in the dtype of their weights. Everything between them (the
residual stream, norms, RoPE, the hidden states handed to the consistency loss) stays in float32
when the weights are float16 or bfloat16, and in the weights' dtype otherwise, so a float64 model is
float64 all through. docs/method.md, "Half precision", says why LfU needs this: the difference
h' - h it measures is 0.05 % to 5 % of h, and a half-precision residual stream rounds it away.
"""
from dataclasses import dataclass, field

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class LlamaConfig:
    """The fields of config.json that shape the model, under Hugging Face's names
    (files/checkpoint.py: parse_config reads them)."""
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, divides H
    head_dim: int  # d
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or Llama 3's: factor, ...
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False  # biases on gate, up and down
    qkv_bias: bool = False  # biases on q, k and v alone: Qwen 2.5
    qk_norm: bool = False  # an RMSNorm of every head of q and k, before RoPE: Qwen 3
    model_type: str = "llama"  # of files/checkpoint.py: FAMILIES


def at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Linear(nn.Linear):
    """nn.Linear that casts its input to the weight's dtype, or both to `matmul_dtype` where that is
    set (full tuning in half precision keeps float32 weights, because an update of 1e-6 would be
    rounded away, and multiplies in half)."""
    matmul_dtype = None

    @property
    def compute_dtype(self):
        return self.matmul_dtype or self.weight.dtype

    def forward(self, x):
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # x is never half
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_tables(config, positions, dtype):
    """cos and sin of the rotary embedding, each (B, 1, T, d), for positions (B, T), computed in
    `dtype`.

    Hugging Face's layout: the first half of a head is rotated against the second half. With Llama
    3's scaling, waves longer than the original context turn `factor` times slower, short ones are
    left alone, and those in between are blended (formula: transformers' modeling_rope_utils, and
    Meta's llama-models).
    """
    d = config.head_dim
    index = torch.arange(0, d, 2, dtype=dtype, device=positions.device)
    freq = 1.0 / config.rope_theta ** (index / d)  # (d/2,) radians a token
    if config.rope_scaling:
        s = config.rope_scaling
        # full turns within the original context
        turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)
        blend = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        blend = blend.clamp(0, 1)
        freq = (1 - blend) * freq / s["factor"] + blend * freq
    angle = positions[:, None, :, None].to(dtype) * freq  # (B, 1, T, d/2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, d)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Apply RoPE to x (B, heads, T, d), in the tables' dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, bias = c.head_dim, c.attention_bias or c.qkv_bias
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size,
                             bias=c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def heads(self, y, norm=None):  # (B, T, H*d) -> (B, H, T, d); norm: over d, of each head
        y = y.view(*y.shape[:2], -1, self.head_dim)
        return (y if norm is None else norm(at_least_float32(y))).transpose(1, 2)

    def forward(self, x, rope, mask, cache, layer):
        B, T, _ = x.shape
        dtype = self.q_proj.compute_dtype
        q = rotate(self.heads(self.q_proj(x), self.q_norm), *rope).to(dtype)  # (B, H, T, d)
        k = rotate(self.heads(self.k_proj(x), self.k_norm), *rope).to(dtype)  # (B, K, T, d)
        v = self.heads(self.v_proj(x)).to(dtype)  # (B, K, T, d)
        if cache is not None:
            if cache[layer] is not None:
                # (B, K, S, d)
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[layer], (k, v)))
            cache[layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None and T > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate = at_least_float32(self.gate_proj(x))  # (B, T, intermediate)
        return self.down_proj(F.silu(gate) * self.up_proj(x))  # SwiGLU: (B, T, D)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, D)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part whose parameters are called model.* in a
    checkpoint."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """Llama, or a relative, for causal language modelling. `activation_checkpointing` (off)
    recomputes each block in the backward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_matmul_dtype(self, dtype):
        """Let all linear layers multiply in `dtype` while the parameters keep theirs; None: in the
        parameters' own."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.matmul_dtype = dtype

    def hidden_states(self, input_ids, positions=None, mask=None, cache=None):
        """The residual stream at every depth: a list of L+1 tensors (B, T, D), in transformers'
        convention.

        [0] is the embedding, [l] the output of block l for l = 1..L-1, and [L] the output of the
        final norm, so that model.lm_head(states[-1]) are the logits; states[l][:, t] is Eq 3's
        state that predicts token t+1. input_ids (B, T) int64; padding goes on the right, where
        causal attention never sees it, and needs no mask. For generation: positions (B, T); mask
        bool, broadcastable to (B, 1, T, S), True = attend; cache, a list of L entries (None, or
        keys and values (B, K, S, d)) that this call extends.
        """
        T, past = input_ids.shape[1], 0
        if cache is not None and cache[0] is not None:
            past = cache[0][0].shape[2]
        if positions is None:
            positions = torch.arange(past, past + T, device=input_ids.device)[None]  # (1, T)
        if mask is None and past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=input_ids.device).tril(past)
        x = at_least_float32(self.model.embed_tokens(input_ids))  # (B, T, D)
        rope = rope_tables(self.config, positions, x.dtype)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        states = [x]
        for i, block in enumerate(self.model.layers):
            if recompute:
                x = checkpoint(block, x, rope, mask, cache, i, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, i)
            states.append(x)
        states[-1] = self.model.norm(x)
        return states

    def forward(self, input_ids, positions=None, mask=None, cache=None):
        """Logits (B, T, V). Arguments as in hidden_states."""
        return self.lm_head(self.hidden_states(input_ids, positions, mask, cache)[-1])
