"""`python -m lfu_min.world`: makes lfu_min/bundled from nothing but a seed.

Writes the data files, pretrains a small Llama on the world's questions, and exports it as a Hugging
Face folder, all under --out. The same command given again goes on at the last checkpoint, and ends
with the same weights as a run that was not interrupted: every batch is a function of the seed and
its number.
"""
import argparse
from pathlib import Path
from pickle import UnpicklingError
import shutil
import time

import torch

from . import files, pretrain, vocabulary
from ..bundled import BUNDLED, CATEGORIES
from ..engine.system import Parser, check_positive, command_line
from ..files.checkpoint import load_model, random_model
from ..files.data import read_examples
from ..files.jsons import check_file, read_records, written_aside
from ..files.tokenizer import load_tokenizer
from ..model import LlamaConfig
from ..scoring import tasks

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
OPTIONS = tasks.Options(max_new_tokens=48)


def parse_args(argv):
    parser = Parser(prog="python -m lfu_min.world", description="Pretrain the bundled model.",
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
    parser.add_argument("--save-every", type=int, default=500,
                        help="steps between checkpoints, exports and validations")
    parser.add_argument("--data-only", action="store_true", help="write the data files and stop")
    args = parser.parse_args(argv)
    check_positive(args, ("steps", "lr", "threads", "save_every"))
    for name in TOKENIZER if args.tokenizer else ():
        check_file(Path(args.tokenizer) / name)
    return args


def choose_tokenizer(source, folder):
    """Put the tokenizer's two files into `folder`: those of the folder `source`, or new ones."""
    if (folder / "tokenizer.json").exists():
        return
    if not source:
        return vocabulary.build_tokenizer(folder, pretrain.MODEL["vocab_size"])
    for name in TOKENIZER:
        shutil.copyfile(Path(source) / name, folder / name)


def scores(model, tokenizer, bundled, split, say):
    """Exact match in percent by category, and a line for each that says it by kind of question."""
    result = {}
    for category in CATEGORIES:
        file = bundled / "data" / f"{category}_{split}.jsonl"
        _, rows = tasks.exact(model, tokenizer, read_examples(file), OPTIONS)
        by_kind = {}
        for row, (_, record) in zip(rows, read_records(file)):
            by_kind.setdefault(record["kind"], []).append(row["match"])
        result[category] = percent([row["match"] for row in rows])
        say(f"  {split:<11}{category:<12}{result[category]:6.1f} %   "
            + "  ".join(f"{kind} {percent(hits):.0f}" for kind, hits in by_kind.items()))
    return result


def percent(hits):
    return 100 * sum(hits) / len(hits)


def save_checkpoint(file, model, optimizer, **at):
    with written_aside(file) as temporary:
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), **at),
                   temporary)


def load_checkpoint(file, model, optimizer, run):
    """Fill model and optimizer from the last checkpoint, if there is one -> where the run was.
    ValueError if it cannot be read, or is of another run than the settings `run`.

    step: steps made; pool: pools of batches begun; left: batches that the last one has left;
    spent: seconds of training.
    """
    if not file.exists():
        return dict(step=0, pool=0, left=0, spent=0.0)
    try:
        state = torch.load(file, weights_only=True)
        theirs = state.pop("run")
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    except (RuntimeError, UnpicklingError, EOFError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged, or of an earlier version: remove it to begin anew"
                         ) from None
    if theirs != run:
        raise ValueError(f"{file} is of a run with {theirs}, not {run}: give those again, or "
                         "another --out")
    return state


def train(args, model, tokenizer, bundled, say):
    """The optimizer steps that are left, with validations, exports and checkpoints -> the seconds
    that all steps took."""
    checkpoint, optimizer = args.out / "checkpoint.pt", pretrain.make_optimizer(model)
    run = {name: vars(args)[name] for name in ("steps", "lr", "seed")}
    at = load_checkpoint(checkpoint, model, optimizer, run)
    first, pool, losses, begun = at["step"], at["pool"], [], time.time()
    waiting = []
    if first:
        say(f"resumed at step {first}")
    if at["left"]:
        waiting = pretrain.batches(tokenizer, args.seed, pool - 1)[-at["left"]:]
    for step in range(first + 1, args.steps + 1):
        if not waiting:
            waiting, pool = pretrain.batches(tokenizer, args.seed, pool), pool + 1
        lr = pretrain.learning_rate(step - 1, args.steps, args.lr)
        losses.append(pretrain.train_step(model, optimizer, waiting.pop(0), lr))
        if step % 50 == 0:
            ms = 1000 * (time.time() - begun) / (step - first)
            say(f"step {step:6d}/{args.steps}  loss {sum(losses) / len(losses):.4f}  lr {lr:.1e}  "
                f"{ms:.0f} ms/step  ETA {ms * (args.steps - step) / 6e4:.1f} min")
            losses.clear()
        if step % args.save_every == 0 or step == args.steps:
            pretrain.export(model, bundled)
            scores(model, tokenizer, bundled, "validation", say)
            save_checkpoint(checkpoint, model, optimizer, run=run, step=step, pool=pool,
                            left=len(waiting), spent=at["spent"] + time.time() - begun)
    return at["spent"] + time.time() - begun


def main(argv=None):
    """Everything that --out has not yet -> {split: {category: percent}} of the exported model,
    or None with --data-only."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    bundled = args.out / "bundled"
    files.write_files(bundled / "data")
    if args.data_only:
        return None
    choose_tokenizer(args.tokenizer, bundled)
    tokenizer = load_tokenizer(bundled)
    with open(args.out / "log.txt", "a", encoding="utf-8") as log:
        def say(text):
            print(text, flush=True)
            print(text, file=log, flush=True)

        model = random_model(LlamaConfig(**pretrain.MODEL), seed=args.seed)
        say(f"{sum(p.numel() for p in model.parameters()):,} parameters, torch "
            f"{torch.__version__}, {vars(args)}")
        seconds = train(args, model, tokenizer, bundled, say)
        say(f"done after {seconds / 60:.1f} minutes: {bundled}")
        model = load_model(bundled, dtype=torch.float32)  # what was exported, rounded to bfloat16
        return {split: scores(model, tokenizer, bundled, split, say)
                for split in ("test", "unseen")}


if __name__ == "__main__":
    command_line(main)
