"""Pretraining of the bundled model: batches of questions, the loss, the score, the exported folder.

Called by __main__.py. Verified by tests/test_world.py: what a batch holds, that an interrupted run
ends as an uninterrupted one, and that the committed model answers at least 90 % of the test
questions of every category.
"""
from itertools import islice
import json
import math
import random

import torch
import torch.nn.functional as F

from ..files.checkpoint import config_to_dict, save_model
from ..files.data import Example, encode_example, prompt_ids
from ..scoring.generate import generate
from .questions import pretraining_stream

# 1.3 million parameters: six layers, so that early, middle and late layers can be told apart, and
# grouped-query attention (2 key/value heads for 4 query heads), so that every path of model.py is
# in use.
MODEL = dict(vocab_size=896, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
             num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=10000.0,
             rms_norm_eps=1e-5,
             tie_word_embeddings=True)
POOL = 1024  # examples that are sorted by length together, so that a batch has little padding
BATCH_TOKENS = 2048  # padded tokens a batch
PROMPT_WEIGHT = 0.1  # of a question's tokens in the loss; an answer's tokens weigh 1
WARMUP_STEPS = 200
MAX_NEW_TOKENS = 48


def encode(tokenizer, question, answer):
    """(ids of question, answer and EOS in the `plain` template, number of ids that are the
    question's)."""
    ids, labels = encode_example(tokenizer, Example(question, answer))
    return ids, sum(label == -100 for label in labels)


def batches(tokenizer, seed, pool):
    """The batches made of pool number `pool`: lists of encode()'s pairs, of similar length, in
    random order."""
    questions = islice(pretraining_stream(f"{seed} {pool}"), POOL)
    examples = sorted((encode(tokenizer, q.question, q.answer) for q in questions),
                      key=lambda pair: len(pair[0]))
    out = [[]]
    for example in examples:
        if (len(out[-1]) + 1) * len(example[0]) > BATCH_TOKENS:
            out.append([])
        out[-1].append(example)
    random.Random(f"{seed} {pool} order").shuffle(out)
    return out


def collate(batch):
    """input_ids (B, T), targets (B, T-1) and the targets' weights (B, T-1); padding on the right
    has weight 0."""
    T = max(len(ids) for ids, _ in batch)
    input_ids = torch.zeros(len(batch), T, dtype=torch.long)  # (B, T)
    weights = torch.zeros(len(batch), T - 1)  # (B, T-1)
    for row, (ids, prompt) in enumerate(batch):
        input_ids[row, :len(ids)] = torch.tensor(ids)
        weights[row, :len(ids) - 1] = 1
        weights[row, :prompt - 1] = PROMPT_WEIGHT
    return input_ids, input_ids[:, 1:], weights


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
    input_ids, targets, weights = collate(batch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    logits = model(input_ids[:, :-1])  # (B, T-1, V)
    # (B, T-1)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                          reduction="none").view_as(weights)
    optimizer.zero_grad()
    ((nll * weights).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return nll.detach()[weights == 1].mean().item()


def exact_match(model, tokenizer, rows):
    """For each row, whether the greedy answer is the expected one, character by character."""
    prompts = [prompt_ids(tokenizer, row["question"]) for row in rows]
    replies = generate(model, prompts, MAX_NEW_TOKENS, stop_ids=tokenizer.eos_ids)
    return [tokenizer.decode(reply) == " " + row["answer"] for reply, row in zip(replies, rows)]


def export(model, folder):
    """Write the model in bfloat16 as a Hugging Face folder, beside the tokenizer that is there
    already."""
    eos = model.config.vocab_size - 1
    save_model(model, folder, state_dict={name: p.to(torch.bfloat16)
                                          for name, p in model.state_dict().items()})
    config = dict(config_to_dict(model.config, torch.bfloat16), bos_token_id=None,
                  eos_token_id=eos, pad_token_id=eos)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = dict(eos_token_id=eos, pad_token_id=eos, do_sample=False)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n",
                                                   encoding="utf-8")
