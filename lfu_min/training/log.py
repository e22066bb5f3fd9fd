"""What train.py tells: a few lines before the run, a record of every step for log.jsonl and a line
of it on the screen, and answers before and after.

docs/training.md, "The log", says what each field means.
"""
import json
import os
from pathlib import Path
import platform
import random
import time

import torch

from ..bundled import BUNDLED, CATEGORIES
from ..engine import distributed, system
from ..engine.passes import trained
from ..files import data, jsons
from ..methods import AUXILIARIES
from ..scoring.generate import generate
from .settings import method_settings

NUMBERS = ("loss", "sft", "consistency", "ascent_norm", "sft_grad_norm", "consistency_grad_norm",
           "gradient_cosine")
FAR = 0.3  # a relative movement of the states of which the screen warns


def describe(s, model, examples, dropped, tokenizer, device):
    """Print what is about to run, and one example as the model will see it."""
    counts = [sum(p.numel() for p in params) for params in (trained(model), model.parameters())]
    moved = 0
    if s.aux != "none":
        with AUXILIARIES[s.aux](model, torch.Generator()) as th_aux:
            moved = sum(t.numel() for t in th_aux)
    lfu = f"lambda {s.lam:g}  alpha {s.alpha:g}  layers {s.layers}  " if s.aux != "none" else ""
    variants = "".join(f"{name} {value}  " for name, value, usual in
                       (("move", s.move, "ascent"), ("compare", s.compare, "mse"))
                       if lfu and value != usual)
    tokens = s.per_step * sum(len(ids) for ids, _ in examples) / len(examples)
    method = f"aux {s.aux}  "
    if s.method not in ("lfu", "sft"):
        method, lfu = f"method {s.method}  ", "".join(
            f"{name} {value:g}  " for name, value in method_settings(s, 1).items())
    print(f"lfu_min  {method}{lfu}{variants}tune {s.tune}  device {device}  dtype {s.dtype}  "
          f"python {platform.python_version()}  torch {torch.__version__}")
    print(f"model    {short(s.model)}: parameters {counts[0]:,} trainable, "
          f"{counts[1] - counts[0]:,} frozen, {moved:,} auxiliary (moved by the ascent)")
    print(f"data     {short(s.data)}: {len(examples)} examples kept, {dropped} dropped "
          f"(longer than {s.max_len} tokens)")
    if dropped > len(examples):
        print(f"warning  most examples are dropped: a larger --max-len keeps more of them "
              f"(the model has {model.config.max_position_embeddings} positions)")
    print(f"steps    {s.steps} of {s.per_step} examples (about {tokens:.0f} tokens), "
          f"peak lr {s.lr:g}, seed {s.seed}")
    ids, labels = examples[random.Random(s.seed).randrange(len(examples))]
    prompt, reply = (tokenizer.decode([i for i, label in zip(ids, labels)
                                       if (label == -100) == masked]) for masked in (True, False))
    print("example  (supervised part in >>> <<<)\n"
          + system.on_screen(f"{prompt}>>>{reply}<<<\n"), flush=True)


def encoding():
    """An on_progress for data.load_dataset; of torchrun's processes the first one's alone."""
    return system.progress("encoding the data") if os.environ.get("RANK", "0") == "0" else None


def short(path):
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def summarise(step, results, s, plan, layers, device, **fields):
    """One log record from all processes' results: sums where l_SFT is divided by the whole step's
    tokens, means over micro-batches elsewhere. layers: how many are compared. What plain SFT does
    not have is 0."""
    totals = torch.zeros(len(NUMBERS) + 1, device=device)
    by_layer = torch.zeros(2, layers, device=device)  # terms of the consistency, movement
    totals[-1] = plan.tokens
    zero = torch.zeros((), device=device)
    for r in results:
        r = {"loss": r["sft"] + s.lam / plan.count * r.get("consistency", zero), **r}
        totals[:-1] += torch.stack([r.get(name, zero) for name in NUMBERS])
        for sums, name in zip(by_layer, ("consistency_per_layer", "movement")):
            own = r.get(name, sums[:0])
            sums[:len(own)] += own
    distributed.add_up([totals, by_layer])
    *numbers, tokens = totals.tolist()
    loss, sft, consistency, ascent_norm, of_sft, of_consistency, cosine = numbers
    consistency /= plan.count
    terms, movement = (by_layer / plan.count).tolist()
    counts = [len(r["consistency_per_layer"]) for r in results if "consistency_per_layer" in r]
    terms = terms[:max(counts, default=layers)]  # a distance may have a single one
    known = any("sft_grad_norm" in r for r in results)  # not of gem, l1 and l2
    return dict(step=step, loss=loss, sft=sft,
                consistency=consistency, ascent_norm=ascent_norm / plan.count, **fields,
                tokens=int(tokens), sft_grad_norm=of_sft if known else None,
                consistency_grad_norm=of_consistency,
                consistency_share=of_consistency / max(of_sft + of_consistency, 1e-30),
                gradient_cosine=cosine / plan.count, consistency_per_layer=terms,
                movement=movement)


def write(out, record):
    """Add the record of a step to out/log.jsonl. Raises ValueError: full disk, folder gone."""
    file = Path(out) / "log.jsonl"
    try:
        with open(file, "a", encoding="utf-8") as lines:
            print(json.dumps(jsons.finite(record)), file=lines)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror}; step {record['step']} is "
                         f"not logged (python train.py --resume {out})") from None


def read(run, steps):
    """The records of the first `steps` steps in run/log.jsonl, and the lines they stand in. Raises
    ValueError unless they are all there, in order; what follows them is not looked at."""
    file = Path(run) / "log.jsonl"
    lines = jsons.read_bytes(file).split(b"\n")[:-1][:steps] if steps else []
    records = []
    for number, line in enumerate(lines, 1):
        record = jsons.parse_json(line.decode("utf-8", "replace"), file, number)
        good = isinstance(record, dict) and isinstance(record.get("ms"), (int, float))
        if not good or record.get("step") != number:
            raise ValueError(f"{file}, line {number}: the record of step {number} should stand "
                             "here")
        records.append(record)
    if len(records) < steps:
        raise ValueError(f"{file} ends with step {len(records)}; step {steps} should be in it")
    return records, lines


def cut(run, steps):
    """Leave only the first `steps` steps in run/log.jsonl: what an interrupted run logged after
    its checkpoint is dropped, half a line too. Returns their records. ValueErrors: read's."""
    records, lines = read(run, steps)
    with jsons.written_aside(Path(run) / "log.jsonl") as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))
    return records


def step_line(r, steps, started):
    """The record r in one line, in the first step also a warning where alpha is too large;
    `started`: when training began, for the time that is left."""
    eta = (time.time() - started) / r["step"] * (steps - r["step"])
    lfu = (f"cons {r['consistency']:.2e}  share {r['consistency_share']:4.0%}  "
           f"ascent |g| {r['ascent_norm']:8.3f}  ") if r["ascent_norm"] else ""
    return (f"step {r['step']:>{len(str(steps))}}/{steps}  loss {r['loss']:7.4f}  "
            f"sft {r['sft']:7.4f}  {lfu}grad {r['grad_norm']:7.3f}  lr {r['lr']:.1e}  "
            f"{r['ms']:6.0f} ms  {r['tokens'] / r['ms'] * 1000:7.0f} tok/s  "
            f"ETA {system.duration(eta)}" + warning(r))


def warning(r):
    """A line of its own if the first step's ascent moved some layer's states by more than FAR of
    their size; "" otherwise."""
    far = max(r["movement"], default=0.0)
    if r["step"] > 1 or far <= FAR:
        return ""
    return (f"\nwarning: the ascent moves a layer's states by {far:.0%} of their size, which is "
            "another model and not a worse one; try a smaller --alpha")


def questions(s):
    """To show before and after: on the bundled model a word problem and one question of each
    category, all of them from validation splits; else the first one of the data."""
    if Path(s.model) != BUNDLED:
        return [next(data.each_example(s.data)).prompt]
    names = ("word_problems", *CATEGORIES)
    return [data.read_examples(BUNDLED / "data" / f"{name}_validation.jsonl")[0].prompt
            for name in names]


def shown(question):
    """A prompt as text: a question, or the messages of a conversation, one a line."""
    if not isinstance(question, str):
        question = "\n          ".join(f"{m['role']}: {m['content']}" for m in question)
    return system.on_screen(question)


def answers(model, tokenizer, asked, template):
    """One line of greedy answer a question."""
    prompts = [data.prompt_ids(tokenizer, question, template) for question in asked]
    room = model.config.max_position_embeddings
    prompts = [ids[:room] for ids in prompts]
    replies = generate(model, prompts, max_new_tokens=80,
                       stop_ids=data.stop_ids(tokenizer, template))
    return [system.on_screen(" / ".join(tokenizer.decode(reply).strip().splitlines()))
            for reply in replies]
