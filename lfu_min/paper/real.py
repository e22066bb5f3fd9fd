"""LfU and its rivals on a real model and real files:

    python -m lfu_min.paper.real gsm8k --model DIR --files DIR

Fine-tunes on 200 examples of one data set (GSM8K or Dolly), then asks what was learned (nats a
token of held-out answers) and what else was kept: PIQA, Wikipedia text, the other data set. Writes
docs/results/real_NAME.md. An interrupted call goes on where it stopped when it is given again.

Files, in --files: gsm8k_train.jsonl, gsm8k_test.jsonl, dolly_3k.json, piqa_valid.jsonl,
piqa_valid_labels.lst, wikipedia_30.txt (another model or selection takes the same names).
"""
import argparse
from functools import partial
from pathlib import Path
import random

import torch

from ..engine import system
from ..files import data, jsons
from ..files.tokenizer import load_tokenizer
from ..scoring import tasks
from ..scoring.measures import mean_result
from ..scoring.runs import Run, each_model
from . import jobs, measures, report
from .experiments import Experiment

EXAMPLES, STEPS, BATCH, MAX_LEN = 200, 100, 4, 512  # two epochs
HELD_OUT, SOLVED, CHOICES, LINES = 300, 50, 400, 4  # of the measures; Wikipedia: articles
RATES = ("2e-4", "5e-4", "1e-3")  # of SFT; the others take the middle one
METHODS = {"SFT": {"aux": "none"}, "NEFTune": {"method": "neftune"}, "SAM": {"method": "sam"},
           "LfU-lora": {"aux": "lora"}, "LfU-reps": {"aux": "reps"}, "LfU-inplace":
           {"aux": "inplace"}}
ROWS = {name: flags | {"lr": RATES[1]} for name, flags in METHODS.items()} | {
    f"SFT at {lr}": {"aux": "none", "lr": lr} for lr in (RATES[0], RATES[2])}
COLUMNS = ("learned nll", "right", "piqa acc", "piqa margin", "wikipedia bits", "other nll",
           "ms a step", "consistency_share", "gradient_cosine", "first movement")
NAMES = {"gsm8k": "200 GSM8K problems; the other set is Dolly",
         "dolly": "200 instructions of Dolly; the other set is GSM8K"}


def split(name, files):
    """(examples to train from, held-out ones) of a data set, as records."""
    if name == "gsm8k":
        return [[row for _, row in jsons.read_records(files / f"gsm8k_{part}.jsonl")]
                for part in ("train", "test")]
    rows = [row for _, row in jsons.read_records(files / "dolly_3k.json")]
    random.Random(0).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def scores(run, model, name, files, held_out):
    """What a run learned and kept, {column: number}; run None: the model itself. Shares in per
    cent, losses in nats a token, the margin in nats a question. held_out: {data set: file}."""
    _, trained = next(each_model(model, [Run(str(run), run)], "cpu", torch.float32))
    tokenizer, options = load_tokenizer(model), tasks.Options(batch_size=8)

    def nll(other):
        docs = data.read_examples(held_out[other])[:HELD_OUT]
        return tasks.nll(trained, tokenizer, docs, options)[0][0].value
    other, = NAMES.keys() - {name}
    solved, _ = tasks.gsm8k(trained, tokenizer, tasks.read_gsm8k(files / "gsm8k_test.jsonl"),
                            options, count=SOLVED)
    piqa = tasks.read_piqa(files / "piqa_valid.jsonl", files / "piqa_valid_labels.lst")
    accuracy, rows = tasks.choice(trained, tokenizer, piqa, options, "piqa", CHOICES)
    margins = [(1 - 2 * row["gold"]) * (row["loglikelihoods"][0] - row["loglikelihoods"][1])
               for row in rows]
    text = tasks.read_lines(files / "wikipedia_30.txt")
    bits = tasks.perplexity(trained, tokenizer, text, options, count=LINES)[0][1]
    return {"learned nll": nll(name), "other nll": nll(other),
            "right": 100 * solved[1].value, "piqa acc": 100 * accuracy[0].value,
            "piqa margin": mean_result("piqa", "margin", margins).value,
            "wikipedia bits": bits.value}


def job(setting, seed, name, s):
    """(flags, folder, measures) of jobs.py for one setting and seed; setting None: the model."""
    held_out = {each: jobs.data_file(s.runs / "data" / f"{each}-held-out.jsonl",
                                     split(each, s.files)[1]) for each in NAMES}
    measure = {"scores": partial(scores, model=s.model, name=name, files=s.files,
                                 held_out=held_out)}
    if setting is None:
        return None, s.runs / f"{name} base", measure
    rows = split(name, s.files)[0]
    chosen = random.Random(seed).sample(rows, EXAMPLES)
    file = jobs.data_file(s.runs / "data" / f"{name}-{seed}.jsonl", chosen)
    folder = " ".join([name, *(f"{k}={v}" for k, v in setting.items()), f"seed={seed}"])
    return ({"model": s.model, "data": file, "max-steps": STEPS, "batch-size": BATCH,
             "accumulate": 1, "max-len": MAX_LEN, "save-every": 20, "seed": seed}
            | setting, s.runs / folder, measure | {"log": partial(measures.log, split=None)})


def main(argv=None):
    """Run what is missing of a name and write its page; returns its text."""
    p = system.Parser(prog="python -m lfu_min.paper.real", description=__doc__.split("\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("name", choices=NAMES, help="what is learned")
    p.add_argument("--model", required=True, help="Hugging Face folder")
    p.add_argument("--files", type=Path, required=True, help="folder of the data files")
    p.add_argument("--runs", type=Path, default=Path("runs/real"), help="where runs are kept")
    p.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    p.add_argument("--jobs", type=int, default=2, help="runs at one time")
    p.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    p.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")],
                   default="0,1,2", help="training seeds")
    s = p.parse_args(argv)
    s.runs = s.runs / Path(s.model).resolve().name  # one model's runs do not stand for another's
    todo = {("base", 0): job(None, 0, s.name, s)} | {
        (row, seed): job(setting, seed, s.name, s) for seed in s.seeds
        for row, setting in ROWS.items()}
    found = jobs.all_measured(todo, s.jobs, s.threads, name=str)
    by = {"base": [found["base", 0]]} | {row: [found[row, seed] for seed in s.seeds]
                                         for row in ROWS}
    experiment = Experiment(NAMES[s.name], None, (), COLUMNS)
    command = f"python -m lfu_min.paper.real {s.name} --model {Path(s.model).name} --files data"
    text = report.page(f"real_{s.name}", experiment, by, s.seeds, None, command)
    s.out.mkdir(parents=True, exist_ok=True)
    (s.out / f"real_{s.name}.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    system.command_line(main)
