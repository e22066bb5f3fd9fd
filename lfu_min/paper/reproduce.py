"""The paper's tables and figures in miniature:  python -m lfu_min.paper.reproduce table1

Each name trains what is not trained yet (grid.py says what, tuned.json with which settings),
measures it, and writes docs/results/NAME.md and its figure. An interrupted call goes on where it
stopped when it is given again; runs that several names share are made once.

    python -m lfu_min.paper.reproduce --list
    python -m lfu_min.paper.reproduce tune fig1 table1 --jobs 2
"""
import argparse
from functools import partial
from pathlib import Path
import random
from statistics import fmean as mean
import time

import torch

from ..bundled import BUNDLED
from ..engine import system
from ..files import data, jsons
from ..files.checkpoint import load_model
from ..files.tokenizer import load_tokenizer
from ..training import sdft
from . import experiments, grid, jobs, measures, real, report

OUT = Path("docs/results")
TUNED = Path(__file__).with_name("tuned.json")
TRAIN = BUNDLED / "data" / "word_problems_train.jsonl"


def rows_of(source, folder):
    """The records that examples are drawn from: the word problems, "sdft" (their answers written
    anew by the model, made once in `folder`), or another file of the bundled data."""
    if source != "sdft":
        return [row for _, row in jsons.read_records(BUNDLED / "data" / f"{source}.jsonl")]
    file = folder / "sdft.json"
    if not file.is_file():
        examples, kept = sdft.rewrite(load_model(BUNDLED, dtype=torch.float32),
                                      load_tokenizer(BUNDLED), data.read_examples(TRAIN))
        print(f"sdft: {kept} of {len(examples)} answers are the model's own", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        jsons.write_json(file, [{"question": e.prompt, "answer": e.answer} for e in examples])
    return [row for _, row in jsons.read_records(file)]


def subset(folder, source, examples, seed):
    """The file of `examples` records drawn by the seed; written unless it is there. All methods
    draw the same questions."""
    file = folder / "data" / f"{source}-{examples}-{seed}.jsonl"
    if file.is_file():
        return file
    rows = rows_of(source, folder)
    chosen = random.Random(f"{examples} {seed}").sample(range(len(rows)), examples)
    return jobs.data_file(file, [rows[i] for i in chosen])


def job(setting, seed, names, folder):
    """(flags, folder, measures) of jobs.py for one setting and seed; setting None: the base."""
    chosen = {name: measures.MEASURES[name] for name in names}
    if setting is None:
        return None, folder / "base", chosen
    flags = dict(setting)
    source = flags.pop("data", "word_problems_train")
    examples = flags.pop("examples", grid.EXAMPLES)
    steps = grid.EXAMPLES * grid.EPOCHS // grid.BATCH
    flags = {"max-steps": steps, "batch-size": grid.BATCH} | flags
    words = sorted((flags | {"data": source, "examples": examples}).items())
    name = " ".join(f"{k}={v}" for k, v in words) + f" seed={seed}"
    file = subset(folder, source, examples, seed)
    return flags | {"seed": seed, "data": file}, folder / name, chosen


def run(experiment, s):
    """({row's name: [{column: number}, one a seed]}, the machines they are from) of an
    experiment."""
    rows, seeds = experiment.rows(tuned()), s.seeds or experiment.seeds
    base = {"base": job(None, 0, experiment.measures, s.runs)} if experiment.base else {}
    todo = base | {(name, seed): job(setting, seed, experiment.measures, s.runs)
                   for seed in seeds for name, setting in rows.items()}
    record = s.out / jobs.RECORD
    jobs.announce(todo, record, s.jobs)
    found = jobs.all_measured(todo, s.jobs, record=record)
    by = {"base": [found["base"]]} if base else {}
    by |= {name: [found[name, seed] for seed in seeds] for name in rows}
    return by, jobs.machines(todo, record)


def tuned():
    """{method: {"best": setting, "frontier": [settings]}} that `tune` chose."""
    return jsons.read_json(TUNED) if TUNED.is_file() else {}


def tune(s):
    """Run the whole grid on the validation split and write tuned.json and its page."""
    rows = {(method, i): setting for method in grid.METHODS
            for i, setting in enumerate(grid.settings(method))}
    experiment = experiments.Experiment("", lambda _: rows, ("scores_validation",), (),
                                        seeds=grid.TUNING_SEEDS, base=False)
    by, machines = run(experiment, s)
    found = {method: [] for method in grid.METHODS}
    for (method, i), setting in rows.items():
        x, y = (mean([row[column] for row in by[method, i]])
                for column in ("word problems", "category mean"))
        found[method].append((setting, x, y))
    chosen = grid.choose(found)
    jsons.write_json(TUNED, chosen)
    return report.tuning(found, chosen, machines)


def rule(s):
    """Does the movement of the states that suits `lora` choose alpha for the other kinds? From the
    runs of `tune`; nothing is trained that it has not."""
    rows = {(method, i): setting for method in grid.LFU
            for i, setting in enumerate(grid.settings(method))}
    experiment = experiments.Experiment("", lambda _: rows, ("scores_validation", "log_validation"),
                                        (), seeds=grid.TUNING_SEEDS, base=False)
    (by, machines), found = run(experiment, s), {}
    for (method, i), setting in rows.items():
        found.setdefault(method, {}).setdefault(setting["alpha"], []).append(by[method, i])
    lines, target = [], None
    for method, alphas in found.items():
        areas = {alpha: grid.hypervolume([(mean_of(one, "word problems"),
                                           mean_of(one, "category mean")) for one in of_rates])
                 for alpha, of_rates in alphas.items()}
        moved = {alpha: mean_of(sum(of_rates, []), "first movement")
                 for alpha, of_rates in alphas.items()}
        best = max(areas, key=areas.get)
        target = target or moved[best]  # lora's
        predicted = grid.nearest(target, moved)
        for alpha, of_rates in alphas.items():
            watched = [f"{mean_of(sum(of_rates, []), column):.2f}"
                       for column in ("consistency_share", "gradient_cosine")]
            note = ["largest"] * (alpha == best) + ["predicted"] * (alpha == predicted)
            lines.append([method, alpha, f"{100 * moved[alpha]:.2f}", *watched,
                          f"{areas[alpha]:.3f}", ", ".join(note)])
    return report.alphas(lines, target, machines)


def mean_of(found, column):
    return mean([row[column] for row in found])


def main(argv=None):
    """Reproduce the names that are asked for; returns {name: text of its page}."""
    p = system.Parser(prog="python -m lfu_min.paper.reproduce", description=__doc__.split("\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    p.add_argument("--list", action="store_true", help="say what there is")
    p.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="where runs are kept")
    p.add_argument("--out", type=Path, default=OUT, help="where NAME.md and NAME.png are written")
    p.add_argument("--jobs", type=int, default=2, help="runs at one time")
    p.add_argument("--seeds", type=jobs.seeds,
                   help="training seeds; %(default)s: those of the experiment")
    s = p.parse_args(argv)
    system.check_positive(s, ("jobs",))
    every = {"tune": tune, "rule": rule, "table2": table2} | {
        name: partial(page, name) for name in experiments.EXPERIMENTS}
    shows = {name: one.shows for name, one in experiments.EXPERIMENTS.items()} | {
        "tune": "nine settings a method on the validation split; tuned.json",
        "table2": "another data set, Dolly, on a real model: what is recorded of paper.real's runs",
        "rule": "alpha of each kind by the movement of the states, from the runs of tune"}
    if s.list or not s.names:
        for name in every:
            print(f"{name:10} {shows[name]}")
        return {}
    for name in s.names:
        if name not in every:
            raise ValueError(f"{name!r}: choose from {', '.join(every)}")
    if s.seeds and {"tune", "rule"} & set(s.names):
        raise ValueError(f"--seeds: tune and rule have seeds of their own, {grid.TUNING_SEEDS}, "
                         "that nothing else uses")
    jobs.train_script()
    s.out.mkdir(parents=True, exist_ok=True)
    texts = {}
    for name in s.names:
        started = time.time()
        texts[name] = every[name](s)
        file = s.out / ("real_dolly.md" if name == "table2" else f"{name}.md")
        jsons.write_text(file, texts[name])
        print(f"{texts[name]}\nwrote {file}  "
              f"({system.duration(time.time() - started)})", flush=True)
    return texts


def table2(s):
    """The invented world has one data set; real.py's page of another one, from the record. To run
    what it lacks: python -m lfu_min.paper.real dolly --model DIR --files DIR."""
    seeds = ["--seeds", ",".join(map(str, s.seeds))] if s.seeds else []
    return real.page(["dolly", "--recorded", "--out", str(s.out), *seeds])[1]


def page(name, s):
    """The text of an experiment's page; its figure is written beside it."""
    experiment = experiments.EXPERIMENTS[name]
    if not tuned():
        raise ValueError("tuned.json is missing: reproduce tune comes first")
    by, machines = run(experiment, s)
    figure = None
    if experiment.figure:
        figure = s.out / f"{name}.png"
        experiment.figure(figure, by)
    seeds = f" --seeds {','.join(map(str, s.seeds))}" if s.seeds else ""
    return report.page(name, experiment, by, s.seeds or experiment.seeds,
                       experiment.rows(tuned()), figure,
                       f"python -m lfu_min.paper.reproduce {name}{seeds}", machines)


if __name__ == "__main__":
    system.command_line(main)
