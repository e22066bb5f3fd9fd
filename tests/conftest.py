"""What the tests share: a tiny Llama whose weights are ALL random, at a scale at which mistakes
show.

With fresh weights (std 0.02, norm gains of one) a model with the two norms of a block swapped gives
the same logits, and one with a wrong RoPE almost the same. So: std 0.3 everywhere, norm gains,
biases and LoRA's B included.
"""
import warnings

import pytest
import torch

from lfu_min.files.checkpoint import parse_config
from lfu_min.model import Llama

# config.json in the form of transformers 4: K < H, and head_dim is not hidden_size /
# num_attention_heads = 8.
TINY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are fastest on one thread, and sums come out in one order."""
    torch.set_num_threads(1)


@torch.no_grad()
def randomise(model, std=0.3, seed=0):
    """Every parameter normal(0, std), with 1 added to norm gains. In place; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * std
        p.copy_(noise + 1 if "norm" in name else noise)
    return model


def tiny_model(seed=0, std=0.3, dtype=torch.float32, **changes):
    """A random model.Llama; changes: to the fields of TINY."""
    return randomise(Llama(parse_config({**TINY, **changes})).to(dtype), std, seed)


def random_ids(B=2, T=96, seed=0):
    return torch.randint(0, TINY["vocab_size"], (B, T),
                         generator=torch.Generator().manual_seed(seed))


def next_token_loss(logits, input_ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                             input_ids[:, 1:].flatten())


def difference(a, b):
    """max |a - b| / max |b|, of tensors, or the largest over lists of tensors. NaN and a wrong
    shape are failures."""
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return max(difference(x, y) for x, y in zip(a, b))
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    assert a.isfinite().all() and b.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


def quiet_transformers():
    """The transformers library without its progress bars and warnings, or a skip."""
    transformers = pytest.importorskip("transformers",
                                       reason="needs transformers (requirements-dev.txt)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    return transformers


def transformers_twin(ours=None, seed=0, **changes):
    """transformers' LlamaForCausalLM in float32, plain attention; random, or with the weights of
    `ours`."""
    transformers = quiet_transformers()
    config = transformers.LlamaConfig(**{**TINY, **changes}, attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config).float().eval()
    if ours is None:
        return randomise(theirs, seed=seed)
    theirs.load_state_dict(ours.state_dict())
    return theirs
