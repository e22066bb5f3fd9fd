"""Pretraining of the bundled model: batches of questions, the loss, the exported folder.

Called by __main__.py. Verified by tests/test_world.py: what a batch holds, that an interrupted run
ends as an uninterrupted one, and that the committed model answers at least 90 % of the test
questions of every category.
"""
from itertools import islice
import math
import random

import torch
import torch.nn.functional as F

from ..files.checkpoint import config_to_dict, save_model
from ..files.data import collate, encode_example, Example, IGNORE
from ..files.jsons import write_json
from .questions import pretraining_stream

# 1.3 million parameters: six layers, so that early, middle and late layers can be told apart, and
# grouped-query attention (2 key/value heads for 4 query heads), so that every path of model.py is
# in use.
MODEL = dict(vocab_size=896, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
             num_attention_heads=4, num_key_value_heads=2, head_dim=32,
             max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-5,
             tie_word_embeddings=True)
POOL = 1024  # examples that are sorted by length together, so that a batch has little padding
BATCH_TOKENS = 2048  # padded tokens a batch
PROMPT_WEIGHT = 0.1  # of a question's tokens in the loss; an answer's tokens weigh 1
WARMUP_STEPS = 200


def batches(tokenizer, seed, pool):
    """The batches made of pool number `pool`: lists of (input_ids, labels) in the `plain` template,
    of similar length, in random order."""
    questions = islice(pretraining_stream(f"{seed} {pool}"), POOL)
    examples = sorted((encode_example(tokenizer, Example(q.question, q.answer)) for q in questions),
                      key=lambda pair: len(pair[0]))
    out = [[]]
    for example in examples:
        if (len(out[-1]) + 1) * len(example[0]) > BATCH_TOKENS:
            out.append([])
        out[-1].append(example)
    random.Random(f"{seed} {pool} order").shuffle(out)
    return out


def weigh(batch):
    """input_ids and targets (B, T-1), and the targets' weights in the loss (B, T-1): an answer's 1,
    a question's PROMPT_WEIGHT, padding's 0."""
    ids, labels = collate(batch, pad_id=-1)  # (B, T)
    weights = torch.where(labels[:, 1:] != IGNORE, 1.0, PROMPT_WEIGHT) * (ids[:, 1:] >= 0)
    ids.clamp_(min=0)
    return ids[:, :-1], ids[:, 1:], weights


def make_optimizer(model):
    """AdamW with weight decay on matrices only."""
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def learning_rate(step, steps, peak):
    """Linear warm-up, then a cosine to 0."""
    return peak * min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_step(model, optimizer, batch, lr):
    """One optimizer step; returns the loss over the answers (nats a token)."""
    input_ids, targets, weights = weigh(batch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    logits = model(input_ids)  # (B, T-1, V)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                          reduction="none").view_as(weights)  # (B, T-1)
    optimizer.zero_grad()
    ((nll * weights).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return nll.detach()[weights == 1].mean().item()


def export(model, folder):
    """Write the model in bfloat16 as a Hugging Face folder, beside the tokenizer that is there
    already."""
    eos = model.config.vocab_size - 1
    save_model(model, folder, state_dict={name: p.to(torch.bfloat16)
                                          for name, p in model.state_dict().items()})
    config = dict(config_to_dict(model.config, torch.bfloat16), bos_token_id=None,
                  eos_token_id=eos, pad_token_id=eos)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json",
               dict(eos_token_id=eos, pad_token_id=eos, do_sample=False))
