"""The pictures of reproduce.py, with the looks of scoring/drawing.py: functions (path, {row:
[{column: number}, one a seed]}) that write the picture. They need matplotlib."""
import numpy as np

from ..scoring.drawing import (NARROW, WIDE, cut, dodge, faint, finish, look, picture, ticks,
                               whiskered, write_beside)
from ..scoring.measures import mean_sd
from ..scoring.pictures import PERCENT
from .report import interval

STYLE = {"NEFTune": "neftune", "GEM": "gem", "IM": "prompt", "SDFT": "sdft", "SAM": "sam",
         "L1": "l1", "L2": "l2", "logit KL": "logit_kl"}  # names of the paper -> of train.py
SEEDS = "Means over {n} seeds; whiskers: standard deviation over seeds, faint: single seeds."
ANY = (-1e9, 1e9)  # bounds of whiskers that may go anywhere
PAIRED = "Paired differences to SFT, seed by seed; whiskers: 95 % interval over {n} seeds."


def method_of(row):
    """"LfU-lora lr=3e-3" -> "LfU-lora"."""
    return row.split(" lr=")[0].split(" n=")[0]


def looks(by):
    """{method: look} of the rows' methods."""
    names = list(dict.fromkeys(map(method_of, by)))
    return {name: look(name, STYLE.get(name, name), [STYLE.get(n, n) for n in names])
            for name in names}


def count(by):
    return max(len(found) for found in by.values())


def of(found, column):
    """One column of a row: (mean, standard deviation, [of every seed])."""
    values = [numbers[column] for numbers in found]
    return *mean_sd(values)[:2], values


def tradeoff(path, by):
    """What is learned against what is kept; a line a method, a point a learning rate."""
    drawn, labels = looks(by), []
    few = len(drawn) <= 5  # of more, whiskers and names would cover each other
    with picture(path, [WIDE], 3.0) as (fig, [axis]):
        for name, style in drawn.items():
            points = []
            for row, found in by.items():
                if method_of(row) == name:
                    (x, dx, xs), (y, dy, ys) = of(found, "word problems"), of(found,
                                                                             "category mean")
                    points.append((x, y, dx, dy))
                    labels.append((x, y, row.partition(" ")[2], style["color"]))
                    if few and len(xs) > 1:
                        faint(axis, xs, ys, style)
            x, y, dx, dy = zip(*points)
            xerr = cut(x, dx, PERCENT) if few else None
            whiskered(axis, x, y, style, dy if few else [0.0] * len(y), PERCENT, xerr=xerr)
        axis.set(xlabel="word problems, right answers (%)", xlim=np.clip(axis.get_xlim(), *PERCENT),
                 ylabel="mean of the other categories (%)", ylim=np.clip(axis.get_ylim(), *PERCENT))
        text = SEEDS.format(n=count(by)) if few else f"Means over {count(by)} seeds."
        finish(fig, list(drawn.values()), text + " Up and to the right is better.", {axis: []})
        if few:
            write_beside(axis, labels)
    return fig


def examples(path, by):
    """Learned, and kept, over the number of examples."""
    drawn = looks(by)
    with picture(path, [NARROW, NARROW]) as (fig, axes):
        for axis, column, title in zip(axes, ("word problems", "category mean"),
                                       ("word problems (%)", "other categories (%)")):
            for (name, style), shift in zip(drawn.items(), dodge(len(drawn), 0.2)):
                rows = {int(row.split(" n=")[1]): found for row, found in by.items()
                        if method_of(row) == name}
                x = [i + shift for i in range(len(rows))]
                y, dy, ys = zip(*(of(found, column) for found in rows.values()))
                for seed in zip(*ys):
                    faint(axis, x, seed, style)
                whiskered(axis, x, y, style, dy, PERCENT)
            ticks(axis, list(map(str, rows)))
            axis.set(xlabel="examples", ylabel=title)
        finish(fig, list(drawn.values()), SEEDS.format(n=count(by)), {axis: [] for axis in axes})
    return fig


def attack(path, by):
    """Complied with, and the margin, over steps of the attack."""
    drawn = looks(by)
    with picture(path, [NARROW, NARROW]) as (fig, axes):
        for axis, metric, title in zip(axes, ("compliance", "margin"),
                                       ("complied with (%)", "margin (nats a token)")):
            for name, style in drawn.items():
                columns = [c for c in by[name][0] if c.startswith(metric)]
                x = [int(c.split()[1]) for c in columns]
                y, dy, _ = zip(*(of(by[name], c) for c in columns))
                whiskered(axis, x, y, style, dy, PERCENT if metric == "compliance" else ANY)
            axis.set(xlabel="steps on examples that comply", ylabel=title)
        finish(fig, list(drawn.values()), SEEDS.format(n=count(by)), {axis: [] for axis in axes})
    return fig


def wordings(path, by):
    """Right answers in each wording; a group a wording."""
    drawn = looks(by)
    columns = [c for c in next(iter(by.values()))[0] if "wordings" not in c]
    with picture(path, [WIDE]) as (fig, [axis]):
        for (name, style), shift in zip(drawn.items(), dodge(len(drawn), 0.7)):
            x = [i + shift for i in range(len(columns))]
            y, dy, ys = zip(*(of(by[name], c) for c in columns))
            for seed in zip(*ys):
                faint(axis, x, seed, style, left=3)
            whiskered(axis, x, y, style | {"linestyle": "none"}, dy, PERCENT)
        ticks(axis, columns)
        axis.set(ylabel="word problems (%)", ylim=PERCENT)
        finish(fig, list(drawn.values()), SEEDS.format(n=count(by)), {axis: []})
    return fig


def noise(path, by):
    """Cosine of clean and noised states by layer, as paired differences to SFT."""
    drawn = {name: style for name, style in looks(by).items() if name not in ("SFT", "base")}
    with picture(path, [NARROW], 2.4) as (fig, [axis]):
        for (name, style), shift in zip(drawn.items(), dodge(len(drawn), 0.4)):
            y, dy = zip(*(interval([ours[f"layer {l}"] - sft[f"layer {l}"] for ours, sft in
                                    zip(by[name], by["SFT"])]) for l in range(1, 7)))
            whiskered(axis, [l + shift for l in range(1, 7)], y, style, dy, ANY)
        sft = look("SFT", "SFT", ())
        axis.axhline(0, color=sft["color"], linewidth=1, zorder=1)
        axis.set(xlabel="layer", ylabel="cosine, difference to SFT")
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))
        finish(fig, [*drawn.values(), sft], PAIRED.format(n=count(by)), {axis: []})
    return fig
