"""Many runs of train.py over a grid of settings and seeds, scored on the bundled world: one table,
mean and spread.

    python -m lfu_min.paper.sweep --out runs/sweep aux=none,lora,reps lr=1e-3,2e-3 seed=0,1,2

Each word is a flag of train.py (without the dashes) and its values; all combinations are run; `+`
begins another grid for the same table. A combination that has its scores_<split>.json already is
not run again, so an interrupted sweep goes on where it stopped. Settings are chosen on --split
validation; --split test is for the numbers one reports.
"""
import argparse
from concurrent.futures import ProcessPoolExecutor
import contextlib
import importlib.util
from itertools import product
import multiprocessing
from pathlib import Path
import shutil
import sys
import time

import torch

from ..bundled import BUNDLED
from ..engine import system
from ..files import jsons
from ..files.tokenizer import load_tokenizer
from ..scoring import categories, pictures, tables, tasks
from ..scoring.measures import mean_sd
from ..scoring.runs import Run, each_model
from ..training.settings import get_settings

COLUMNS = (categories.IN_DOMAIN, *categories.CATEGORIES, "category mean")  # exact match, per cent


def parse_grid(words):
    """["lr=1e-3,2e-3", "seed=0,1"] -> [{"lr": "1e-3", "seed": "0"}, ...], all combinations; "+"
    begins another grid. ValueError names a word that is no grid, or a setting train.py refuses."""
    if "+" in words:
        at = words.index("+")
        return parse_grid(words[:at]) + parse_grid(words[at + 1:])
    if not words:
        raise ValueError("'+' stands between two grids, like aux=none seed=0 + aux=lora seed=0")
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ValueError(f"{word!r}: write a flag and its values, like lr=1e-3,2e-3")
        if name in ("model", "data", "template", "out"):
            raise ValueError(f"{word!r}: a sweep is of the bundled world, {name} cannot vary")
        grid[name] = values.split(",")
    settings = [dict(zip(grid, values)) for values in product(*grid.values())]
    for setting in settings:
        try:
            get_settings(flags(setting))
        except (ValueError, SystemExit) as error:  # --help exits
            raise ValueError(f"{title(setting)}: {error}") from None
    return settings


def flags(setting):
    """{"lr": "1e-3"} -> ["--lr", "1e-3"]"""
    return [part for name, value in setting.items() for part in (f"--{name}", value)]


def title(setting, without=()):
    return " ".join(f"{k}={v}" for k, v in setting.items() if k not in without) or "all defaults"


def train_script():
    """train.py as a module: it lies in the repository, beside the package."""
    path = system.ROOT / "train.py"
    if not path.is_file():
        raise ValueError(f"{path} is missing: a sweep needs the repository, not the package alone")
    spec = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(run, split, threads):
    """{column: value} of a run folder (None: the base): exact match in per cent, and the answers'
    NLL in nats a token."""
    torch.set_num_threads(threads)
    # next alone: a second one would take the adapter off again
    _, model = next(each_model(BUNDLED, [Run(str(run), run)], "cpu", torch.float32))
    options = tasks.Options(max_new_tokens=80, batch_size=64)
    results, _ = categories.measure(model, load_tokenizer(BUNDLED), options, split)
    exact = {r.task: 100 * r.value for r in results if r.metric == "exact_match"}
    return exact | {f"{r.task} nll": r.value for r in results if r.metric == "nll"}


def one(setting, folder, split, threads):
    """Train one combination and score it, unless its scores are there. Returns {column: value}."""
    torch.set_num_threads(threads)
    file, run = folder / f"scores_{split}.json", folder / "run"
    if file.is_file():
        return jsons.read_json(file)
    if not (folder / "trained").is_file():
        for old in run.glob("*"):  # left by an interrupted run
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
            train_script().main([*flags(setting), "--out", str(run)])
        (folder / "trained").touch()
    found = scores(run, split, threads)
    jsons.write_json(file, found)
    return found


def show(by):
    """Print the table: one line per setting (its seeds together), mean and standard deviation over
    seeds."""
    width = max(map(len, by))
    print(" " * width + "  seeds" + "".join(f"{column:>16}"
                                            for column in (*COLUMNS, "nll in", "nll others")))
    for name, found in by.items():
        others = [mean_sd([row[f"{c} nll"] for c in categories.CATEGORIES])[0] for row in found]
        cells = [*([row[column] for row in found] for column in COLUMNS),
                 [row[f"{categories.IN_DOMAIN} nll"] for row in found], others]
        line = f"{name:{width}}  {len(found):5d}"
        for i, values in enumerate(cells):
            mean, sd, n = mean_sd(values)
            digits = 1 if i < len(COLUMNS) else 2  # per cent, then nats a token
            line += f"{mean:.{digits}f}{f' +-{sd:.{digits}f}' if n > 1 else ''}".rjust(16)
        print(line)


def run_all(s, settings):
    """Train and score every setting, s.jobs at one time: {setting without its seed: [{column:
    value}, one a seed]}, the base first."""
    started, by = time.time(), {}
    with ProcessPoolExecutor(s.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        base = pool.submit(scores, None, s.split, s.threads)
        pending = [pool.submit(one, setting, s.out / title(setting).replace("/", "_"), s.split,
                               s.threads) for setting in settings]
        by["base"] = [base.result()]
        for i, (setting, job) in enumerate(zip(settings, pending), 1):
            by.setdefault(title(setting, without=("seed",)), []).append(job.result())
            eta = system.duration((time.time() - started) / i * (len(settings) - i))
            print(f"{i}/{len(settings)}  {setting}  ETA {eta}", file=sys.stderr, flush=True)
    return by


def main(argv=None):
    """Run the sweep; returns {setting: list of {column: value}, one a seed}."""
    p = system.Parser(prog="python -m lfu_min.paper.sweep", description=__doc__.split("\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("grid", nargs="+", metavar="FLAG=VALUES",
                   help="a flag of train.py and its values, separated by commas")
    p.add_argument("--out", type=Path, required=True,
                   help="folder of the sweep: one folder a combination")
    p.add_argument("--split", choices=("validation", "test", "unseen"), default="validation")
    p.add_argument("--jobs", type=int, default=2,
                   help="runs at one time, each in a process of its own")
    p.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    p.add_argument("--json", help="write the table's numbers here")
    p.add_argument("--plot", metavar="FILE.png",
                   help="learned against kept, a point a setting, and FILE.pdf (needs matplotlib)")
    s = p.parse_args(argv)
    if s.plot:
        pictures.check(s.plot)
    if s.json:
        tables.check_output("--json", s.json)
    train_script()
    settings = {title(setting): setting for setting in parse_grid(s.grid)}  # each once
    by = run_all(s, list(settings.values()))
    show(by)
    if s.json:
        jsons.write_json(s.json, {"split": s.split, "grid": s.grid, "rows": by})
    if s.plot:
        pictures.tradeoff(s.plot, by, f"{s.split} split")
    return by


if __name__ == "__main__":
    system.command_line(main)
