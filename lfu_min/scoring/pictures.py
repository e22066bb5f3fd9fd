"""Pictures of what was measured, made for a paper: 3.3 or 6.8 inches wide, 8 pt, a PNG and a PDF
beside it. Needs matplotlib (requirements-dev.txt), which is imported only to draw.

Columns are called by their methods. Where a column is several seeds, small faint points are the
single ones. n, seeds and what the whiskers are stand below each picture. Called by eval.py --plot.
Verified in tests/test_pictures.py.
"""
from math import inf, sqrt
from pathlib import Path
from typing import NamedTuple

from .drawing import AGAIN, NARROW, WIDE, dodge, faint, finish, look, picture, ticks, whiskered
from .runs import method, short_names
from .tables import check_output, over_seeds

PERCENT = (0, 100)


class Column(NamedTuple):
    """What one model, or one setting over its seeds, shows in a panel."""
    look: dict  # label, color, marker, linestyle, fillstyle
    results: list  # of Result; means, where there are several seeds
    singles: list  # every single seed's results; empty where there is one


def check(path):
    """Raise ValueError before anything slow starts: no matplotlib, not a .png, or not writable."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: the file name should end in .png")
    for written in (path, Path(path).with_suffix(".pdf")):
        check_output("--plot", written)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None


def results(path, panels, columns):
    """Draw everything that eval.py measured, write it to `path`, and return the Figure.

    panels: {title: {run's name: results}}; the title's last word (scores, wordings, noise or
    attack) says how it is drawn. columns: {column: [run, ...]}, a column's runs being its seeds.
    """
    todo = [(width, draw, shown) for title, by_run in panels.items()
            for kind, metrics, width, draw in PANELS if kind == title.split()[-1]
            and (shown := panel_columns(by_run, metrics, columns))]
    with picture(path, [width for width, _, _ in todo]) as (fig, axes):
        drawn = [draw(axis, shown) for axis, (_, draw, shown) in zip(axes, todo)]
        finish(fig, list(column_looks(columns).values()),
               caption(dict.fromkeys(note for note, _ in drawn), columns),
               {axis: ends for axis, (_, ends) in zip(axes, drawn) if ends is not None})
    return fig


def panel_columns(by_run, metrics, columns):
    """[Column, ...] with the results of these metrics; columns that have none are left out."""
    looks = column_looks(columns)
    found = {run: [r for r in every if r.metric in metrics] for run, every in by_run.items()}
    return [Column(looks[name], mean, [found[run.name] for run in columns[name]
                                       if len(columns[name]) > 1])
            for name, mean in over_seeds(found, columns).items() if mean]


def caption(notes, columns):
    runs = [run for members in columns.values() for run in members]
    text, whiskers = " ".join(notes), "one standard error"
    if len(runs) > len(columns):
        text += " Faint: single seeds."
        whiskers = "standard deviation over seeds (one run: standard error)"
    seeds = sorted({str(run.settings["seed"]) for run in runs if "seed" in run.settings})
    if seeds:
        text += f" Training seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}."
    return text.replace("{whiskers}", whiskers)


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


# ---- panels. Each draws its columns into one axis and returns what the caption says about it, and
# where names can stand beside lines: [(look, height), ...] of their right ends; [] where there are
# no lines, None where the names stand in the panel already.

def scores(axis, columns):
    axis.set(ylabel="right answers (%)", ylim=PERCENT)
    return in_groups(axis, columns, 100, PERCENT), []


def losses(axis, columns):
    metrics = sorted({r.metric for column in columns for r in column.results})
    what = "answer NLL (nats a token)" if metrics == ["nll"] else " or ".join(metrics)
    axis.set_ylabel(f"{what},\nlower is better")
    values = [r.value for column in columns for rs in (column.results, *column.singles) for r in rs]
    low = 0
    if max(values) > 20 * min(values) > 0:
        low = min(values) / 2  # no whisker reaches the 0 of a logarithmic axis
        axis.set(yscale="log", ylim=(low, 2 * max(values)))
    return in_groups(axis, columns, 1, (low, inf)), []


def in_groups(axis, columns, scale, bounds):
    """A group a measure, in it one point a column."""
    keys = list(dict.fromkeys((r.task, r.metric) for column in columns for r in column.results))
    several = len({metric for _, metric in keys}) > 1
    for column, shift in zip(columns, dodge(len(columns), 0.7)):
        x = [keys.index((r.task, r.metric)) + shift for r in column.results]
        points(axis, column, x, scale, bounds, linestyle="none")
    ticks(axis, [f"{task} {metric}" if several else task for task, metric in keys])
    counts = sorted({r.n for column in columns for r in column.results if "mean" not in r.task})
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return f"n = {n} a point; whiskers: {{whiskers}}."


def wordings(axis, columns):
    """Figure 5: a small point a wording, a large one at the mean with the deviation over them."""
    metric, n = columns[0].results[0].metric, columns[0].results[0].n
    hollow = ""
    for i, column in enumerate(columns):
        tasks = [r.task for r in column.results if r.metric == metric]
        *places, last = [i + shift for shift in dodge(len(tasks) + 2, 0.8)]
        for task, x in zip(tasks, places):
            changes = {}
            if "unseen" in task:
                hollow, changes = ", hollow where it was never trained", dict(mfc="white")
            points(axis, only(column, lambda r: (r.task, r.metric) == (task, metric)), [x], 100,
                   PERCENT, whiskers=False, **changes)
        sd = next(r.value for r in column.results if r.metric == f"{metric} sd")
        mean = only(column, lambda r: r.metric == f"{metric} mean")
        mean = mean._replace(results=[mean.results[0]._replace(stderr=sd)])
        points(axis, mean, [last], 100, PERCENT, ms=5.5)
    ticks(axis, [column.look["label"] for column in columns])
    what = "right answers" if metric == "exact_match" else metric
    axis.set(ylabel=f"{what} (%)", ylim=PERCENT)
    return (f"Small: a wording ({n} questions){hollow}; large: mean and standard deviation over "
            "wordings."), None


def cosines(axis, columns):
    """Figure 6: cosine of clean and noised states by layer; the embedding, layer 0, is left out."""
    axis.set(ylabel="cosine, clean and noised")
    return (f"{columns[0].results[0].n} texts; whiskers: {{whiskers}}.", by_layer(axis, columns))


def differences(axis, columns):
    """The same as paired differences to SFT, the zero line (robustness.add_differences), with their
    own standard error: over seeds where there are several."""
    own = [c._replace(results=[r._replace(stderr=r.stderr / sqrt(len(c.singles) or 1))
                               for r in c.results]) for c in columns]
    sft = look("SFT", "SFT", ())
    axis.axhline(0, color=sft["color"], linewidth=1, zorder=1)
    axis.set(ylabel="paired difference to SFT")
    axis.ticklabel_format(axis="y", scilimits=(-2, 3))
    over = "seeds (one run: texts)" if any(column.singles for column in columns) else "texts"
    return (f"Differences: whiskers are their own standard error, over {over}.",
            [*by_layer(axis, own), (sft, 0)])


def by_layer(axis, columns):
    columns = [only(column, lambda r: r.task != "layer 0") for column in columns]
    for column, shift in zip(columns, dodge(len(columns), 0.4)):
        points(axis, column, [int(r.task.split()[1]) + shift for r in column.results])
    axis.set(xlabel="layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return [(column.look, column.results[-1].value) for column in columns]


def attack(axis, columns):
    """Figure 3: held-out requests complied with, over steps of adversarial fine-tuning."""
    steps = [int(r.task.split()[1]) for r in columns[0].results]
    closest = min((b - a for a, b in zip(steps, steps[1:])), default=1)
    for column, shift in zip(columns, dodge(len(columns), 0.5 * closest)):
        points(axis, column, [step + shift for step in steps], 100, PERCENT)
    axis.set(xlabel="steps of plain SFT on examples that comply", ylabel="complied with (%)",
             ylim=PERCENT)
    return (f"{columns[0].results[0].n} held-out requests; whiskers: {{whiskers}}.",
            [(column.look, 100 * column.results[-1].value) for column in columns])


SHARES = ("exact_match", "strict-match", "flexible-extract", "acc", "acc_norm")
WORDED = [m + end for m in ("exact_match", "strict-match") for end in ("", " mean", " sd")]
PANELS = (  # kind, metrics, width, how it is drawn
    ("scores", SHARES, WIDE, scores),
    ("scores", ("nll", "perplexity", "bits_per_byte"), WIDE, losses),
    ("wordings", WORDED, WIDE, wordings),
    ("noise", ("cosine",), NARROW, cosines),
    ("noise", ("cosine - SFT",), NARROW, differences),
    ("attack", ("compliance",), NARROW, attack))


def only(column, wanted):
    """The column with the results for which wanted(result) is true."""
    return column._replace(results=[r for r in column.results if wanted(r)],
                           singles=[[r for r in one if wanted(r)] for one in column.singles])


def points(axis, column, x, scale=1, bounds=(-inf, inf), whiskers=True, **changes):
    """A column's results at x, with whiskers, and its single seeds' beside them."""
    for one in column.singles:
        faint(axis, x, [scale * r.value for r in one], column.look, left=3)
    whiskered(axis, x, [scale * r.value for r in column.results], column.look | changes,
              [scale * r.stderr * whiskers for r in column.results], bounds)
