"""Many runs of train.py over a grid of settings and seeds, scored on the bundled world: one table,
mean and spread.

    python -m lfu_min.paper.sweep --out runs/sweep aux=none,lora,reps lr=1e-3,2e-3 seed=0,1,2

Each word is a flag of train.py (without the dashes) and its values; all combinations are run; `+`
begins another grid for the same table. A combination that has its scores_<split>.json already is
not run again, so an interrupted sweep goes on where it stopped. Settings are chosen on --split
validation; --split test is for the numbers one reports. This is where RESULTS.md's tables come
from.
"""
import argparse
from concurrent.futures import ProcessPoolExecutor
import contextlib
import itertools
import json
import multiprocessing
from pathlib import Path
import statistics
import sys
import time

import torch

from ..scoring import categories, pictures, tasks

from ..bundled import BUNDLED
from ..engine import system
from ..files.adapter import load_adapter
from ..files.checkpoint import load_model
from ..files.tokenizer import load_tokenizer

COLUMNS = (categories.IN_DOMAIN, *categories.CATEGORIES, "category mean")


def parse_grid(words):
    """["lr=1e-3,2e-3", "seed=0,1"] -> [{"lr": "1e-3", "seed": "0"}, ...], all combinations; "+"
    begins another grid."""
    if "+" in words:
        at = words.index("+")
        return parse_grid(words[:at]) + parse_grid(words[at + 1:])
    if not words:
        raise ValueError("'+' stands between two grids, like aux=none seed=0 + aux=lora seed=0")
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ValueError(f"{word!r}: write a flag of train.py and its values, like lr=1e-3,2e-3")
        if name in ("model", "data", "template", "out"):
            raise ValueError(f"{word!r}: runs are scored on the bundled world, so {name} cannot "
                             "vary")
        grid[name] = values.split(",")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def scores(run, split, threads, base=BUNDLED):
    """{column: value} of a run folder (None: the base): exact match in per cent, and the answers'
    NLL in nats a token."""
    torch.set_num_threads(threads)
    full = run is not None and (run / "config.json").is_file()  # --tune full saves a whole model
    model, tokenizer = load_model(run if full else base, dtype=torch.float32), load_tokenizer(base)
    if run is not None and (run / "adapter_config.json").is_file():
        load_adapter(model, run)
    results, _ = categories.measure(model, tokenizer,
                                    tasks.Options(max_new_tokens=80, batch_size=64), split)
    exact = {r.task: 100 * r.value for r in results if r.metric == "exact_match"}
    nll = {f"{r.task} nll": r.value for r in results if r.metric == "nll"}
    return {**exact, **nll}


def one(setting, folder, split, threads):
    """Train one combination and score it, unless its scores are there. Returns {column: value}."""
    torch.set_num_threads(threads)
    file = folder / f"scores_{split}.json"
    if not file.is_file():
        if not (folder / "trained").is_file():
            sys.path.insert(0, str(system.ROOT))
            import train
            for old in folder.glob("run/*"):  # left by an interrupted run
                old.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            flags = [part for name, value in setting.items() for part in (f"--{name}", value)]
            with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
                train.main([*flags, "--out", str(folder / "run")])
            (folder / "trained").touch()
        system.write_json(file, scores(folder / "run", split, threads))
    return json.loads(file.read_text())


def show(by):
    """Print the table: one line per setting (its seeds together), mean and standard deviation over
    seeds."""
    width = max(len(name) for name in by)
    print(f"{'':{width}}  seeds" + "".join(f"{column:>16}"
                                           for column in (*COLUMNS, "nll in", "nll others")))
    for name, found in by.items():
        cells = []
        for column in COLUMNS:
            cells.append([r[column] for r in found])
        cells.append([r[f"{categories.IN_DOMAIN} nll"] for r in found])
        cells.append([statistics.mean(r[f"{c} nll"] for c in categories.CATEGORIES) for r in found])
        text = []
        for i, values in enumerate(cells):
            digits = 1 if i < len(COLUMNS) else 2  # per cent, then nats a token
            spread = f" +-{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            text.append(f"{statistics.mean(values):.{digits}f}{spread}")
        print(f"{name:{width}}  {len(found):5d}" + "".join(f"{cell:>16}" for cell in text))


def main(argv=None):
    """Run the sweep; returns {setting: list of {column: value}, one a seed}."""
    p = argparse.ArgumentParser(prog="python -m lfu_min.paper.sweep",
                                description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("grid", nargs="+", metavar="FLAG=VALUES",
                   help="a flag of train.py and its values, separated by commas")
    p.add_argument("--out", type=Path, required=True,
                   help="folder of the sweep: one folder a combination")
    p.add_argument("--split", choices=("validation", "test", "unseen"), default="validation")
    p.add_argument("--jobs", type=int, default=2,
                   help="runs at one time, each in a process of its own")
    p.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    p.add_argument("--json", type=Path, help="write the table's numbers here")
    p.add_argument("--plot", metavar="FILE.png",
                   help="learned against kept, a point a setting (needs matplotlib)")
    s = p.parse_args(argv)
    if s.plot:
        pictures.check(s.plot)
    settings = parse_grid(s.grid)
    started, rows = time.time(), []
    with ProcessPoolExecutor(s.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        base = pool.submit(scores, None, s.split, s.threads)
        folders = [s.out / " ".join(f"{k}={v}" for k, v in setting.items()).replace("/", "_")
                   for setting in settings]
        pending = [pool.submit(one, setting, folder, s.split, s.threads)
                   for setting, folder in zip(settings, folders)]
        for i, (setting, job) in enumerate(zip(settings, pending), 1):
            rows.append((setting, job.result()))
            eta = (time.time() - started) / i * (len(settings) - i)
            print(f"{i}/{len(settings)}  {setting}  ETA {system.duration(eta)}", file=sys.stderr,
                  flush=True)
        by = {"base": [base.result()]}
    for setting, found in rows:
        by.setdefault(" ".join(f"{k}={v}" for k, v in setting.items() if k != "seed")
                      or "all defaults", []).append(found)
    show(by)
    if s.json:
        system.write_json(s.json, {"split": s.split, "grid": s.grid, "rows": by})
    if s.plot:
        pictures.tradeoff(s.plot, by, f"{s.split} split")
    return by


if __name__ == "__main__":
    system.command_line(main)
