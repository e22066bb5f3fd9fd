"""What the tests share: a tiny Llama whose weights are ALL random, at a scale at which mistakes
show.

With fresh weights (std 0.02, norm gains of one) a model with the two norms of a block swapped gives
the same logits, and one with a wrong RoPE almost the same. So: std 0.3 everywhere, norm gains,
biases and LoRA's B included.
"""
import warnings

import pytest
import torch

from lfu_min.files.checkpoint import FAMILIES, config_to_dict, parse_config
from lfu_min.lora import add_lora
from lfu_min.model import Llama, LlamaConfig

# config.json in the form of transformers 4: K < H, and head_dim is not hidden_size /
# num_attention_heads = 8.
TINY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are fastest on one thread, and sums come out in one order."""
    torch.set_num_threads(1)


@torch.no_grad()
def randomise(model, std=0.3, seed=0):
    """Every parameter normal(0, std), with 1 added to norm gains. In place; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(0, std, generator=generator)
        if "norm" in name:
            p += 1
    return model


def tiny_model(seed=0, std=0.3, dtype=torch.float32, **changes):
    """A random model.Llama as config.json would give it; changes: to the fields of TINY."""
    return randomise(Llama(parse_config({**TINY, **changes})), std, seed).to(dtype)


def tiny(tune="lora", dtype=torch.float64, layers=4, seed=0):
    """An even smaller one, with biases, to be trained. tune: "lora" (r = 2, scaling 3/2, B is not
    zero either), "full", or "tied" (full; the head is the embedding)."""
    model = Llama(LlamaConfig(vocab_size=29, hidden_size=16, intermediate_size=20,
                              num_hidden_layers=layers, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=4, attention_bias=True,
                              mlp_bias=True, tie_word_embeddings=tune == "tied"))
    if tune == "lora":
        add_lora(model, r=2, lora_alpha=3)
    return randomise(model, seed=seed).to(dtype)


def tiny_batch(seed=1, B=3, T=9):
    """ids and unshifted labels (B, T) for `tiny`: prompts and right padding are -100; nothing
    predicts a first token."""
    ids = torch.randint(29, (B, T), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :3], labels[1, 7:] = -100, -100
    return ids, labels


def random_ids(B=2, T=96, seed=0):
    return torch.randint(0, TINY["vocab_size"], (B, T),
                         generator=torch.Generator().manual_seed(seed))


def next_token_loss(logits, input_ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                             input_ids[:, 1:].flatten())


def difference(a, b):
    """max |a - b| / max |b| of tensors, or the largest over lists or dictionaries of tensors. NaN
    and a wrong shape or name are failures."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(difference(a[name], b[name]) for name in b)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return max(difference(x, y) for x, y in zip(a, b))
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    assert a.isfinite().all() and b.isfinite().all()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def quiet_transformers():
    """The transformers library without its progress bars and warnings, or a skip."""
    transformers = pytest.importorskip("transformers",
                                       reason="needs transformers (requirements-dev.txt)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    return transformers


def transformers_twin(ours=None, seed=0, **changes):
    """transformers' model in float32, plain attention: with the sizes and weights of `ours`, or
    random with `changes` to the fields of TINY. What has no value, head_dim say, is left out."""
    transformers = quiet_transformers()
    raw = {**TINY, **changes, **(config_to_dict(ours.config) if ours else {})}
    architecture = getattr(transformers, FAMILIES[raw["model_type"]].architecture)
    raw = {name: value for name, value in raw.items()
           if value is not None or name == "sliding_window"}
    config = architecture.config_class(**raw, attn_implementation="eager")
    theirs = architecture(config).float().eval()
    if ours is None:
        return randomise(theirs, seed=seed)
    theirs.load_state_dict(ours.state_dict())
    return theirs
