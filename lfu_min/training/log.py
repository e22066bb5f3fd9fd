"""What train.py tells: a few lines before the run, a record of every step for log.jsonl, and the
line on the screen.

README, "The log", says what each field means.
"""
import os
from pathlib import Path
import random

import torch

from ..engine import distributed, system
from ..lfu import auxiliary


def describe(s, model, params, examples, dropped, tokenizer, steps, per_step, device):
    """Print what is about to run, and one example as the model will see it."""
    trainable, everything = sum(p.numel()
                                for p in params), sum(p.numel() for p in model.parameters())
    moved = 0
    if s.aux != "none":
        with auxiliary(s.aux, model, params, torch.Generator()) as th_aux:
            moved = sum(t.numel() for t in th_aux)
    tokens = sum(len(ids) for ids, _ in examples) / len(examples)
    versions = system.environment()["versions"]
    print(f"lfu_min  aux {s.aux}  lambda {s.lam:g}  alpha {s.alpha:g}  layers {s.layers}  tune "
          f"{s.tune}  "
          f"device {device}  dtype {s.dtype}  python {versions['python']}  torch "
          f"{versions['torch']}")
    shown = lambda path: os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
    print(f"model    {shown(s.model)}: parameters {trainable:,} trainable, "
          f"{everything - trainable:,} frozen, {moved:,} auxiliary "
          "(moved by the ascent)")
    print(f"data     {shown(s.data)}: {len(examples)} examples kept, {dropped} dropped (longer "
          f"than {s.max_len} tokens)")
    print(f"steps    {steps} of {per_step} examples (about {tokens * per_step:.0f} tokens), peak "
          f"lr {s.lr:g}, seed {s.seed}")
    ids, labels = examples[random.Random(s.seed).randrange(len(examples))]
    prompt, reply = (tokenizer.decode([i for i, label in zip(ids, labels)
                                       if (label == -100) == masked])
                     for masked in (True, False))
    print(f"example  (supervised part in >>> <<<)\n{prompt}>>>{reply}<<<\n")


def summarise(results, lam, micro_batches, tokens, compared, device, **fields):
    """One log record from all processes' results: sums where lfu_backward divides by the whole
    step, means elsewhere."""
    names = ("sft", "consistency", "ascent_norm", "sft_grad_norm", "consistency_grad_norm")
    totals, layers = torch.zeros(len(names) + 1,
                                 device=device), torch.zeros(compared, device=device)
    totals[-1] = tokens
    for r in results:
        totals[:-1] += torch.stack([r[name] for name in names])
        layers += r["consistency_per_layer"]
    distributed.add_up([totals, layers])
    total = dict(zip(names, totals.tolist()))
    consistency = total["consistency"] / micro_batches
    of_sft, of_consistency = total["sft_grad_norm"], total["consistency_grad_norm"]
    return dict(step=fields.pop("step"), loss=total["sft"] + lam * consistency, sft=total["sft"],
                consistency=consistency,
                ascent_norm=total["ascent_norm"] / micro_batches, **fields, tokens=int(totals[-1]),
                sft_grad_norm=of_sft, consistency_grad_norm=of_consistency,
                consistency_share=of_consistency / max(of_sft + of_consistency, 1e-30),
                consistency_per_layer=(layers / micro_batches).tolist())


def step_line(r, steps, eta):
    per_second = r["tokens"] / r["ms"] * 1000
    return (f"step {r['step']:>{len(str(steps))}}/{steps}  loss {r['loss']:7.4f}  sft "
            f"{r['sft']:7.4f}  "
            f"cons {r['consistency']:.2e}  share {r['consistency_share']:4.0%}  ascent |g| "
            f"{r['ascent_norm']:8.3f}  "
            f"grad {r['grad_norm']:7.3f}  lr {r['lr']:.1e}  {r['ms']:6.0f} ms  {per_second:7.0f} "
            "tok/s  "
            f"ETA {system.duration(eta)}")
