"""Many runs of train.py over a grid of settings and seeds, scored on the bundled world: one table,
mean and spread.

    python -m lfu_min.paper.sweep --out runs/sweep aux=none,lora,reps lr=1e-3,2e-3 seed=0,1,2

Each word is a flag of train.py (without the dashes) and its values; all combinations are run; `+`
begins another grid for the same table. A combination that has its scores_<split>.json already is
not run again, so an interrupted sweep goes on where it stopped. Settings are chosen on --split
validation; --split test is for the numbers one reports.
"""
import argparse
from functools import partial
from itertools import product
from pathlib import Path

from ..engine import system
from ..files import jsons
from ..scoring import categories
from ..scoring.measures import mean_sd
from ..training.settings import get_settings
from . import measures
from .jobs import all_measured, as_flags, train_script

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
        if name in ("model", "data", "template", "out", "resume", "verify", "help"):
            raise ValueError(f"{word!r}: a sweep is of new runs on the bundled world, {name} has no"
                             " part in it")
        if name in grid:
            raise ValueError(f"{word!r}: {name} stands there twice; write {name}="
                             f"{','.join([*grid[name], values])}")
        grid[name] = values.split(",")
    settings = [dict(zip(grid, values)) for values in product(*grid.values())]
    for setting in settings:
        try:
            get_settings(as_flags(setting))
        except (ValueError, SystemExit) as error:  # --help exits
            raise ValueError(f"{title(setting)}: {error}") from None
    return settings


def title(setting, without=()):
    return " ".join(f"{k}={v}" for k, v in setting.items() if k not in without) or "all defaults"


def show(by):
    """Print the table: one line per setting (its seeds together), mean and standard deviation over
    seeds."""
    width = max(map(len, by))
    print(" " * width + "  seeds" + "".join(f"{column:>16}"
                                            for column in (*COLUMNS, "nll in", "nll others")))
    for name, found in by.items():
        cells = [[row[column] for row in found]
                 for column in (*COLUMNS, f"{categories.IN_DOMAIN} nll", "others nll")]
        line = f"{name:{width}}  {len(found):5d}"
        for i, values in enumerate(cells):
            mean, sd, n = mean_sd(values)
            digits = 1 if i < len(COLUMNS) else 2  # per cent, then nats a token
            line += f"{mean:.{digits}f}{f' +-{sd:.{digits}f}' if n > 1 else ''}".rjust(16)
        print(line)


def run_all(s, settings):
    """Train and score every setting, s.jobs at one time: {setting without its seed: [{column:
    value}, one a seed]}, the base first."""
    own = {f"scores_{s.split}": partial(measures.scores, split=s.split)}
    todo = {"base": (None, s.out / "base", own)} | {
        title(setting): (setting, s.out / title(setting).replace("/", "_"), own)
        for setting in settings}
    found, by = all_measured(todo, s.jobs), {}
    by["base"] = [found["base"]]
    for setting in settings:
        by.setdefault(title(setting, without=("seed",)), []).append(found[title(setting)])
    return by


def main(argv=None):
    """Run the sweep; returns {setting: list of {column: value}, one a seed}."""
    p = system.Parser(prog="python -m lfu_min.paper.sweep", description=__doc__.split("\n\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("grid", nargs="+", metavar="FLAG=VALUES",
                   help="a flag of train.py and its values, separated by commas")
    p.add_argument("--out", type=Path, required=True,
                   help="folder of the sweep: one folder a combination")
    p.add_argument("--split", choices=("validation", "test", "unseen"), default="validation")
    p.add_argument("--jobs", type=int, default=2,
                   help="runs at one time, each in a process of its own")
    p.add_argument("--json", help="write the table's numbers here")
    s = p.parse_args(argv)
    system.check_positive(s, ("jobs",))
    if s.json:
        jsons.check_output("--json", s.json)
    train_script()
    settings = {title(setting): setting for setting in parse_grid(s.grid)}  # each once
    by = run_all(s, list(settings.values()))
    show(by)
    if s.json:
        jsons.write_json(s.json, {"split": s.split, "grid": s.grid, "rows": by})
    return by


if __name__ == "__main__":
    system.command_line(main)
