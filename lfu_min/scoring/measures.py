"""The measures: log-likelihood of given text, generated text, and a mean with its standard error.

Everything eval.py reports is made of the three functions score (log-likelihood and greedy match of
continuations), reply (generated text up to a stop string) and text_nats (every token of a long
text, in windows). tasks.py puts real benchmarks on top of them, categories.py the bundled world,
robustness.py Figures 3, 5 and 6. Definitions: lm-evaluation-harness's. Verified in
tests/test_eval_tasks.py against transformers on the same examples.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..files import data
from ..files.jsons import short
from .generate import generate

HEAD_ROWS = 512  # states whose logits exist at one time: 100 MB at a vocabulary of 49,152


class Result(NamedTuple):
    """One number of one model. value and stderr are fractions for shares (0.25, not 25), nats for
    log-losses."""
    task: str
    metric: str
    value: float
    stderr: float
    n: int


def mean_sd(values):
    """(mean, sample standard deviation, n) of numbers: of seeds, wordings or examples. One number
    alone has no deviation: NaN."""
    values = torch.as_tensor(values, dtype=torch.float64)
    n = len(values)
    return values.mean().item(), values.std().item() if n > 1 else math.nan, n


def finite(task, metric, values):
    """One value an example as a float64 tensor (n,). ValueError names the first that is NaN or
    infinite: a model that gives no numbers must not get a score."""
    values = torch.as_tensor(values, dtype=torch.float64)
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        i = bad[0].item()
        raise ValueError(f"{task}, example {i + 1}: {metric} is {values[i].item()}; the model "
                         "gives NaN or infinity (in half precision, try --dtype fp32)")
    return values


def mean_result(task, metric, values):
    """The mean of one value an example, with the standard error of a mean: sample deviation /
    sqrt(n). ValueError if a value is not finite."""
    mean, sd, n = mean_sd(finite(task, metric, values))
    return Result(task, metric, mean, sd / math.sqrt(n), n)


def ratio_result(task, metric, sums, counts):
    """sum(sums) / sum(counts) over examples, e.g. nats a token; the standard error treats examples
    as independent. ValueError if a sum is not finite."""
    s, c = finite(task, metric, sums), torch.as_tensor(counts, dtype=torch.float64)  # (n,) each
    n, value = len(s), (s.sum() / c.sum()).item()
    squares = (s - value * c).square().sum().item()
    stderr = math.sqrt(squares * n / (n - 1)) / c.sum().item() if n > 1 else math.nan
    return Result(task, metric, value, stderr, n)


def split_continuation(tokenizer, context, continuation):
    """(context ids, continuation ids) as the harness splits them: blanks at the end of the context
    move over, the whole and the context are encoded, and the continuation is what the whole has
    behind the context's length.

    So a token that spans the border counts as context. An empty context becomes BOS, or EOS where
    there is no BOS.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept):] + continuation
    if not context:
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            raise ValueError("an empty context needs a BOS or EOS; the tokenizer names none")
        return [first], tokenizer.encode(continuation)
    ids = data.text_ids(tokenizer, context)
    return ids, data.text_ids(tokenizer, context + continuation)[len(ids):]


@torch.no_grad()
def token_nats(model, pairs, batch_size=16, on_progress=None):
    """For each pair (context ids, continuation ids): -log p of the continuation's tokens (N,) and
    whether each is the likeliest token (N,). A pair longer than the model's positions loses its
    beginning, as in the harness.
    """
    device, limit = next(model.parameters()).device, model.config.max_position_embeddings
    rows = []  # (ids, how many at their end are scored)
    for context, continuation in pairs:
        ids = (list(context) + list(continuation))[-(limit + 1):]
        rows.append((ids, min(len(continuation), len(ids) - 1)))
    found = [None] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # memory shows at once
    for start in range(0, len(rows), batch_size):
        batch = longest_first[start:start + batch_size]
        ids, counts = zip(*(rows[i] for i in batch))
        inputs = [torch.tensor(row[:-1]) for row in ids]  # the last token predicts nothing
        inputs = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # (B, T), on the right
        states = model.hidden_states(inputs.to(device))[-1]  # (B, T, D)
        h = torch.cat([state[len(row) - 1 - n:len(row) - 1]
                       for state, row, n in zip(states, ids, counts)])  # (N, D)
        targets = torch.tensor([token for row, n in zip(ids, counts)
                                for token in row[len(row) - n:]], device=device)  # (N,)
        nats, greedy = [], []
        for piece, target in zip(h.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
            logits = model.lm_head(piece).float()  # (rows, V)
            nats.append(F.cross_entropy(logits, target, reduction="none"))
            greedy.append(logits.argmax(-1) == target)
        nats, greedy = torch.cat(nats).cpu().double(), torch.cat(greedy).cpu()  # (N,) each
        for i, *pair in zip(batch, nats.split(counts), greedy.split(counts)):
            found[i] = tuple(pair)
        if on_progress:
            on_progress(start + len(batch), len(rows))
    return found


def score(model, tokenizer, pairs, batch_size=16, on_progress=None):
    """[(log-likelihood in nats, greedy match)] of (context, continuation) texts: the sum of log p
    over the tokens of the continuation, and whether greedy decoding would have produced every one
    of them."""
    ids = [split_continuation(tokenizer, context, continuation) for context, continuation in pairs]
    for (_, tokens), (_, continuation) in zip(ids, pairs):
        if not tokens:
            raise ValueError(f"the continuation {short(continuation)} has no tokens to score")
    return [(-nats.sum().item(), bool(greedy.all()))
            for nats, greedy in token_nats(model, ids, batch_size, on_progress)]


def reply(model, tokenizer, prompts, max_new_tokens, until=(), batch_size=16, on_progress=None,
          template="plain", **sampling):
    """Generated texts after prompts (lists of ids), each ended before EOS, the template's end of a
    turn, or the first string of `until`."""
    tail = max((len(s.encode()) for s in until), default=0)  # a token has at least one byte

    def finished(ids):  # + 4: a character cut in its middle
        return any(s in tokenizer.decode(ids[-tail - 4:]) for s in until)

    rows = generate(model, prompts, max_new_tokens, data.stop_ids(tokenizer, template),
                    batch_size=batch_size, on_progress=on_progress,
                    finished=finished if until else None, **sampling)
    texts = [tokenizer.decode(row) for row in rows]
    return [text[:min((text.find(s) for s in until if s in text), default=len(text))]
            for text in texts]


def answer_nll(model, tokenizer, examples, template="plain", batch_size=16, on_progress=None):
    """-log p of the examples' answers, EOS included, under the training template: (nats, tokens) of
    each example.

    The token mean of all of them is exactly train.py's `sft` on this file: the least noisy measure
    of what a model has learned or forgotten, because every token of every answer counts, right or
    wrong.
    """
    encoded = [data.encode_example(tokenizer, example, template) for example in examples]
    cuts = [sum(label == data.IGNORE for label in labels) for _, labels in encoded]
    pairs = [(ids[:cut], ids[cut:]) for (ids, _), cut in zip(encoded, cuts)]
    return [(nats.sum().item(), len(nats))
            for nats, _ in token_nats(model, pairs, batch_size, on_progress)]


def windows(n, window, stride):
    """(begin, first scored, end) of strided windows over n tokens: every token but the very first
    is scored once, with at least window - stride tokens before it (fewer in the first window)."""
    scored, begin = 1, 0
    while scored < n:
        end = min(begin + window, n)
        yield begin, scored, end
        scored, begin = end, begin + stride


def text_nats(model, tokenizer, text, window=1024, stride=None, batch_size=4, on_progress=None):
    """-log p of every token of a text but the very first: a tensor (tokens - 1,), in nats. BOS,
    where there is one, is the very first. window is cut to the model's positions; stride None is
    half of it."""
    window = min(window, model.config.max_position_embeddings)
    stride = max(1, window // 2) if stride is None else stride
    if not 0 < stride < window:
        raise ValueError(f"stride {stride} should be between 1 and the window, {window}, less one")
    ids = data.text_ids(tokenizer, text)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has none to predict: 2 are needed")
    pairs = [(ids[a:b], ids[b:c]) for a, b, c in windows(len(ids), window, stride)]
    return torch.cat([nats for nats, _ in token_nats(model, pairs, batch_size, on_progress)])
