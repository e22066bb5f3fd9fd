"""Generation: prompts in, the ids that follow out. Batched, with a KV cache; greedy unless a
temperature is given.

Called by training/log.py (answers before and after), training/sdft.py, cost/bench.py and
measures.py (every task that generates, --prompt and --chat). It works on ids alone: stop strings
need a tokenizer, so measures.py looks for them and says through `finished` that a row is done.
Verified in tests/test_generate.py: token for token equal to transformers' greedy generate, with
unequal prompts.
"""
import torch


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids=(), *, finished=None, temperature=0.0,
             top_p=1.0, generator=None, batch_size=32, on_progress=None):
    """The new ids after each prompt: a list of lists of ints, in the order of the prompts.

    prompts: lists of ids, not empty, of any lengths. A row ends after max_new_tokens, before an id
    of stop_ids (which is not part of the result), where finished(its new ids so far) is true, or
    where prompt and new ids together fill the model's max_position_embeddings. temperature 0 takes
    the likeliest token; above 0 it samples, with `generator` (on the model's device), among the
    fewest tokens whose probabilities reach top_p. on_progress(rows done, rows) is called whenever
    rows end. Raises ValueError for an unusable prompt, a setting out of range, or a model that
    gives NaN or inf: its likeliest token would look like an answer.
    """
    limit, V = model.config.max_position_embeddings, model.config.vocab_size
    if max_new_tokens < 0 or batch_size < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}, batch_size = {batch_size}: at least "
                         "0 and 1 are needed")
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise ValueError(f"temperature = {temperature}, top_p = {top_p}: the first must be finite "
                         "and at least 0, the second above 0 and at most 1")
    prompts = [list(prompt) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        if not prompt or min(prompt) < 0 or max(prompt) >= V:
            raise ValueError(f"prompt {i}: at least one id is needed, all of them within 0-{V - 1}")
        if len(prompt) > limit:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, the model {limit} positions")
    device, stop_ids = next(model.parameters()).device, set(stop_ids)
    results = [[] for _ in prompts]
    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    # prompts of one length together: less padding
    by_length = sorted((i for i in range(len(prompts)) if room[i]), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start:start + batch_size]  # which prompts the batch's rows are
        ids, attend, positions = left_pad([prompts[i] for i in rows], device)  # (B, T) each
        mask = None if attend.all() else prompt_mask(attend)
        cache = [None] * model.config.num_hidden_layers
        while rows:
            # the last state alone predicts
            h = model.hidden_states(ids, positions, mask, cache)[-1][:, -1]  # (B, D)
            logits = model.lm_head(h)  # (B, V)
            finite = logits.amax(-1).isfinite()  # (B,)
            if not finite.all():
                bad = rows[finite.int().argmin()]
                raise ValueError(f"prompt {bad}: the model's logits are NaN or infinite")
            tokens = choose(logits, temperature, top_p, generator)  # (B,)
            going = []
            for b, (i, token) in enumerate(zip(rows, tokens.tolist())):
                if token in stop_ids:
                    continue
                results[i].append(token)
                if len(results[i]) < room[i] and not (finished and finished(results[i])):
                    going.append(b)
            if len(going) < len(rows):  # rows that ended leave the batch
                rows = [rows[b] for b in going]
                keep = torch.tensor(going, dtype=torch.int64, device=device)
                tokens, attend, positions = tokens[keep], attend[keep], positions[keep]
                cache = [(k[keep], v[keep]) for k, v in cache]
                if on_progress:
                    on_progress(min(start + batch_size, len(by_length)) - len(rows), len(by_length))
            ids, positions = tokens[:, None], positions[:, -1:] + 1  # (B, 1)
            attend = torch.cat([attend, attend.new_ones(len(rows), 1)], dim=1)  # (B, S)
            mask = None if attend.all() else attend[:, None, None]  # (B, 1, 1, S)
    return results


def left_pad(prompts, device):
    """ids, attend (True where there is a token) and positions (counted from each row's first
    token), each (B, T).

    Left, so that the last column is every row's last token and the new ones line up behind it.
    """
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    start = torch.tensor([T - len(p) for p in prompts], device=device)
    columns = torch.arange(T, device=device)
    return ids, columns >= start[:, None], (columns - start[:, None]).clamp(min=0)


def prompt_mask(attend):
    """Mask (B, 1, T, T) for left-padded prompts: causal, padding hidden. A padding row sees itself,
    or its softmax over nothing would be NaN; no token ever looks at it."""
    T = attend.shape[1]
    square = torch.ones(T, T, dtype=torch.bool, device=attend.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=attend.device)
    return ((square & attend[:, None]) | itself)[:, None]


def choose(logits, temperature=0.0, top_p=1.0, generator=None):
    """Next tokens (B,) from logits (B, V): the likeliest, or one sampled at a temperature from the
    nucleus of top_p."""
    if temperature < 1e-5:  # float32 has no room for logits divided by it
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    # a token stays while those before it have not reached top_p, the likeliest always
    p[:, 1:] *= (p.cumsum(-1) - p)[:, 1:] < top_p
    drawn = torch.multinomial(p, 1, generator=generator)  # (B, 1): multinomial normalises
    return order.gather(-1, drawn)[:, 0]
