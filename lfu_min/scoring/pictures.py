"""Pictures of what was measured, made for a paper: 3.3 or 6.8 inches wide, 8 pt, a PNG and a PDF
beside it. Needs matplotlib (requirements-dev.txt), which is imported only to draw.

Columns are called by their methods. Where a column is several seeds, small faint points are the
single ones. n, seeds and what the whiskers are stand below each picture. Called by eval.py --plot.
Verified in tests/test_pictures.py.
"""
from math import inf, sqrt
from pathlib import Path
from typing import NamedTuple

from ..files import jsons
from .drawing import (AGAIN, ANY, NARROW, PERCENT, WIDE, Line, curves, finish, groups, look,
                      picture, zero_is_sft)
from .runs import method, short_names
from .tables import SHARES, over_seeds


class Panel(NamedTuple):
    """What one axis shows: of what was measured as `kind`, the results of these metrics."""
    kind: str  # last word of the title under which eval.py measured it
    metrics: tuple
    ylabel: str
    xlabel: str = ""  # what the number in a task's name counts ("layer 3"); "": a group a task


DIFFERENCES = "cosine - SFT"  # robustness.add_differences
PANELS = (
    Panel("scores", tuple(SHARES), "right answers (%)"),
    Panel("scores", ("nll", "perplexity", "bits_per_byte"), "lower is better"),
    Panel("wordings", ("exact_match", "exact_match mean", "strict-match", "strict-match mean"),
          "right answers (%)"),
    Panel("noise", ("cosine",), "cosine, clean and noised", "layer"),
    Panel("noise", (DIFFERENCES,), "paired difference to SFT", "layer"),
    Panel("attack", ("compliance",), "complied with (%)",
          "steps of plain SFT on examples that comply"))


class Column(NamedTuple):
    """What one model, or one setting over its seeds, shows in a panel."""
    look: dict  # label, color, marker, linestyle, fillstyle
    results: list  # of Result; means, where there are several seeds
    singles: list  # every single seed's results; empty where there is one


def check(path):
    """Raise ValueError before anything slow starts: no matplotlib, not a .png, or not writable."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: the file name should end in .png")
    pdf = Path(path).with_suffix(".pdf")
    for written in (path, pdf):
        jsons.check_output("--plot", written)
    if pdf.exists() and not Path(path).exists():
        raise ValueError(f"--plot {path} would replace {pdf}, which is no picture of it: name "
                         "another file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None


def results(path, panels, columns):
    """Draw everything that eval.py measured, write it to `path`, and return the Figure.

    panels: {title: {run's name: results}}; the title's last word (scores, wordings, noise or
    attack) says which of PANELS show it. columns: {column: [run, ...]}, a column's runs being its
    seeds.
    """
    todo = [(panel, shown) for title, by_run in panels.items() for panel in PANELS
            if panel.kind == title.split()[-1]
            and (shown := panel_columns(by_run, panel.metrics, columns))]
    with picture(path, [NARROW if panel.xlabel else WIDE for panel, _ in todo]) as (fig, axes):
        ends = {axis: draw(axis, *one) for axis, one in zip(axes, todo)}
        finish(fig, list(column_looks(columns).values()), caption(todo, columns), ends)
    return fig


def panel_columns(by_run, metrics, columns):
    """[Column, ...] with the results of these metrics; columns that have none are left out, and so
    is layer 0, the embedding itself."""
    looks = column_looks(columns)
    found = {run: [r for r in every if r.metric in metrics and r.task != "layer 0"]
             for run, every in by_run.items()}
    return [Column(looks[name], mean, [found[run.name] for run in columns[name]
                                       if len(columns[name]) > 1])
            for name, mean in over_seeds(found, columns).items() if mean]


def draw(axis, panel, columns):
    """Draw [Column, ...] into an axis. Returns where names can stand beside lines: [(look, height),
    ...] of their right ends, [] where there are no lines."""
    scale, bounds = (100, PERCENT) if panel.metrics[0] in SHARES else (1, ANY)
    keys = list(dict.fromkeys((r.task, r.metric) for column in columns for r in column.results))
    places = {key: int(key[0].split()[1]) if panel.xlabel else i for i, key in enumerate(keys)}
    drawn = [Line(column.look, [places[r.task, r.metric] for r in column.results],
                  [scale * r.value for r in column.results],
                  [scale * r.stderr for r in column.results],
                  [[scale * r.value for r in one] for one in column.singles])
             for column in columns]
    axis.set(ylabel=panel.ylabel, xlabel=panel.xlabel)
    if not panel.xlabel:
        if bounds == ANY:
            bounds = losses(axis, drawn, [metric for _, metric in keys])
        tasks = [task for task, _ in keys]
        groups(axis, drawn, [f"{task} {metric}" if tasks.count(task) > 1 else task
                             for task, metric in keys], bounds)
        return []
    ends = [(line.look, line.y[-1]) for line in drawn]
    if DIFFERENCES in panel.metrics:  # their own standard error: over seeds where there are several
        drawn = [line._replace(errors=[e / sqrt(len(line.singles) or 1) for e in line.errors])
                 for line in drawn]
        ends.append((zero_is_sft(axis), 0))
    curves(axis, drawn, bounds)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return ends


def losses(axis, drawn, metrics):
    """Name what is lower where it is better; a logarithmic axis where values are far apart. Returns
    the bounds of whiskers."""
    names = dict.fromkeys("NLL (nats a token)" if m == "nll" else m for m in metrics)
    axis.set_ylabel(f"{' or '.join(names)},\nlower is better")
    values = [y for line in drawn for one in (line.y, *line.singles) for y in one]
    if not max(values) > 20 * min(values) > 0:
        return 0, inf
    low = min(values) / 2  # no whisker reaches the 0 of a logarithmic axis
    axis.set(yscale="log", ylim=(low, 2 * max(values)))
    return low, inf


def caption(todo, columns):
    runs = [run for members in columns.values() for run in members]
    counts = sorted({r.n for _, shown in todo for column in shown for r in column.results
                     if r.task not in ("category mean", "mean rank")
                     and not r.metric.endswith(" mean")})
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    whiskers, faint = "one standard error", ""
    if len(runs) > len(columns):
        whiskers = "standard deviation over seeds (one run: standard error)"
        faint = " Faint: single seeds."
    text = f"n = {n} a point; whiskers: {whiskers}.{faint}"
    if any(DIFFERENCES in panel.metrics for panel, _ in todo):
        text += " Differences: whiskers are their own standard error, over seeds or texts."
    seeds = sorted({str(run.settings["seed"]) for run in runs if "seed" in run.settings})
    if seeds:
        text += f" Training seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}."
    return text


def column_looks(columns):
    """{column: its look}. A column is called by its method; where two columns have the same one,
    the folder's name is added, and line and filling differ."""
    methods, short = {name: method(runs[0]) for name, runs in columns.items()}, short_names(columns)
    looks = {}
    for name, m in methods.items():
        alike = [other for other in methods if methods[other] == m]
        label = (short[name] if m == name else m if len(alike) == 1 else
                 name if name.startswith(m) else f"{m} {short[name]}")
        line, fill = AGAIN[alike.index(name) % len(AGAIN)]
        looks[name] = look(label, m, methods.values()) | dict(linestyle=line, fillstyle=fill)
    return looks
