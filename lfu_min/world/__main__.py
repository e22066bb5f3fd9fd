"""`python -m lfu_min.world`: makes lfu_min/bundled from nothing but a seed.

Writes the data files, pretrains a small Llama on the world's questions, and exports it as a Hugging
Face folder, all under --out. The same command given again goes on at the last checkpoint, and ends
with the same weights as a run that was not interrupted: every batch is a function of the seed and
its number.
"""
import argparse
import json
import os
from pathlib import Path
import shutil
import sys
import time

import torch

from ..files.checkpoint import load_model, random_model
from ..model import LlamaConfig
from ..files.tokenizer import load_tokenizer
from . import files, pretrain, vocabulary
from ..bundled import BUNDLED, CATEGORIES


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m lfu_min.world",
                                     description="Pretrain the bundled model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/world"),
                        help="folder for checkpoint.pt, log.txt and the result, bundled/")
    parser.add_argument("--tokenizer", default=str(BUNDLED),
                        help="folder of the tokenizer to use; '': train a new one")
    parser.add_argument("--steps", type=int, default=7000,
                        help="optimizer steps, each about 2000 tokens")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0,
                        help="of weights and batches; the world stays the same")
    parser.add_argument("--threads", type=int, default=1,
                        help="CPU threads; another number rounds differently")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--eval-every", type=int, default=500,
                        help="steps between validations and exports")
    parser.add_argument("--stop-at", type=int, default=0,
                        help="stop after this step, to go on later; 0: do not")
    parser.add_argument("--data-only", action="store_true", help="write the data files and stop")
    parser.add_argument("--no-test", action="store_true",
                        help="skip the table of test scores at the end")
    args = parser.parse_args(argv)
    for name in ("steps", "lr", "threads", "save_every", "eval_every"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be "
                             "positive")
    return args


def read_rows(bundled, name):
    return [json.loads(line) for line in (bundled / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def scores(model, tokenizer, bundled, split, say):
    """Exact match in percent by category, and a line for each that says it by kind of question."""
    result = {}
    for category in CATEGORIES:
        rows = read_rows(bundled, f"{category}_{split}")
        hits = pretrain.exact_match(model, tokenizer, rows)
        result[category] = 100 * sum(hits) / len(hits)
        kinds = {}
        for row, hit in zip(rows, hits):
            kinds.setdefault(row["kind"], []).append(hit)
        by_kind = "  ".join(f"{kind} {100 * sum(h) / len(h):.0f}" for kind, h in kinds.items())
        say(f"  {split:<11}{category:<12}{result[category]:6.1f} %   {by_kind}")
    return result


def run(args):
    torch.set_num_threads(args.threads)
    bundled = args.out / "bundled"
    files.write_files(bundled / "data")
    if args.data_only:
        return None
    if not (bundled / "tokenizer.json").exists():
        if args.tokenizer:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(Path(args.tokenizer) / name, bundled / name)
        else:
            vocabulary.build_tokenizer(bundled, pretrain.MODEL["vocab_size"])
    tokenizer = load_tokenizer(bundled)
    log = open(args.out / "log.txt", "a", encoding="utf-8")

    def say(text):
        print(text, flush=True)
        print(text, file=log, flush=True)

    model = random_model(LlamaConfig(**pretrain.MODEL), seed=args.seed)
    optimizer = pretrain.make_optimizer(model)
    step, pool, waiting, spent, losses = 0, 0, [], 0.0, []
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, pool, spent = state["step"], state["pool"], state["spent"]
        if state["left"]:  # what this pool had left when the checkpoint was written
            waiting = pretrain.batches(tokenizer, args.seed, pool - 1)[-state["left"]:]
        say(f"resumed at step {step}")
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, torch {torch.__version__}, "
        f"{vars(args)}")
    start, first = time.time() - spent, step
    begun = time.time()
    while step < args.steps:
        if not waiting:
            waiting, pool = pretrain.batches(tokenizer, args.seed, pool), pool + 1
        lr = pretrain.learning_rate(step, args.steps, args.lr)
        losses.append(pretrain.train_step(model, optimizer, waiting.pop(0), lr))
        step += 1
        if step % 50 == 0:
            ms = 1000 * (time.time() - begun) / (step - first)
            say(f"step {step:6d}/{args.steps}  loss {sum(losses) / len(losses):.4f}  lr {lr:.1e}  "
                f"{ms:.0f} ms/step  "
                f"ETA {ms * (args.steps - step) / 6e4:.1f} min")
            losses.clear()
        if step % args.eval_every == 0:
            pretrain.export(model, bundled)
            scores(model, tokenizer, bundled, "validation", say)
        if step % args.save_every == 0 or step in (args.steps, args.stop_at):
            # a crash while writing leaves the old checkpoint whole
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                            pool=pool,
                            left=len(waiting), spent=time.time() - start), temporary)
            os.replace(temporary, checkpoint)
        if step == args.stop_at:
            return None
    pretrain.export(model, bundled)
    say(f"done after {(time.time() - start) / 60:.1f} minutes: {bundled}")
    if args.no_test:
        return None
    model = load_model(bundled, dtype=torch.float32)  # score what was exported, rounded to bfloat16
    return {split: scores(model, tokenizer, bundled, split, say) for split in ("test", "unseen")}


def main(argv=None):
    try:
        return run(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
