"""The other side of the benchmark: transformers and peft, and the authors' LfU step on top of them.

bench.py calls these; tests/test_bench.py checks that they do the work they are said to do.
"""
import torch
import torch.nn.functional as F

from ..files.checkpoint import config_to_dict
from ..lora import TARGET_MODULES


def transformers_model(config, weights, tune, device):
    """transformers' model on the tensors of a state dict (shared, not copied), with peft's LoRA for
    tune = lora."""
    import peft
    import transformers
    raw = config_to_dict(config)
    architecture = getattr(transformers, raw["architectures"][0])
    with torch.device("meta"):
        model = architecture(architecture.config_class(**raw))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    rotary = model.model.rotary_emb  # its table is no weight
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    if tune == "lora":
        targets = list(TARGET_MODULES)
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        model = peft.get_peft_model(model, lora)
    return model.train()


def their_sft_step(model):
    """One SFT step as transformers' Trainer takes it: logits at all positions, in float32 for the
    loss."""
    def step(batch, other):
        ids, labels = batch
        model.zero_grad()
        model(input_ids=ids, labels=labels.to(ids.device), use_cache=False).loss.backward()
    return step


def their_lfu_step(model, lam=5.0, alpha=0.1):
    """One LfU step in the order of the authors' released trainer: three forwards, the backward of
    three graphs.

    The ascent's gradient comes from a second batch, the trained weights themselves are moved, and
    states are compared at the label positions of all L+1 entries. Restoring the weights before the
    last backward, through two graphs at once, makes its gradient inexact (docs/method.md, "Paper
    and code"); it stays so here, since the cost is what is measured.
    """
    params = [p for p in model.parameters() if p.requires_grad]

    def forward(ids, labels):
        return model(input_ids=ids, labels=labels.to(ids.device), use_cache=False,
                     output_hidden_states=True)

    def step(batch, other):
        clean = forward(*batch)
        model.zero_grad()
        forward(*other).loss.backward()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        before = [p.data.clone() for p in params]
        for p in params:
            p.data += alpha * p.grad / norm
        worse = forward(*batch)
        supervised = batch[1].to(batch[0].device) != -100
        terms = [F.mse_loss(b[supervised], a.detach()[supervised])
                 for a, b in zip(clean.hidden_states, worse.hidden_states)]
        for p, old in zip(params, before):
            p.data.copy_(old)
        model.zero_grad()
        (clean.loss + lam * sum(terms) / len(terms)).backward()
    return step


def their_steps(s, weights):
    """{case: step(batch, other)} under bench.py's settings s, on the tensors of a state dict."""
    model = transformers_model(s.config, weights, s.tune, s.device)
    if s.activation_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    half = torch.autocast(s.device.type, s.torch_dtype,
                          enabled=s.tune == "full" and s.torch_dtype != torch.float32)
    return {"their-sft": half(their_sft_step(model)), "their-lfu": half(their_lfu_step(model))}


def their_evaluation(s, texts, prompts):
    """[load, tokenise, generate], functions for bench.evaluation; none where transformers is not
    installed. The tokenizer is called once with all texts, which it spreads over the cores."""
    try:
        import transformers
    except ImportError:
        return []

    def load():
        found = transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=s.torch_dtype)
        return found.to(s.device).eval()
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(s.model), load()
    model.generation_config.eos_token_id = None  # both make all 64 tokens
    padded = tokenizer.pad(dict(input_ids=prompts), padding_side="left",
                           return_tensors="pt").to(s.device)
    return [load, lambda: tokenizer(texts),
            lambda: model.generate(**padded, max_new_tokens=64, do_sample=False, pad_token_id=0)]
