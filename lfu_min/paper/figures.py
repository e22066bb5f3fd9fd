"""The pictures of reproduce.py, drawn with scoring/drawing.py: functions (path, {row: [{column:
number}, one a seed]}) that write the picture. They need matplotlib."""
import numpy as np

from ..scoring.drawing import (ANY, NARROW, PERCENT, WIDE, Line, curves, cut, faint, finish, groups,
                               look, picture, ticks, whiskered, write_beside, zero_is_sft)
from ..scoring.measures import mean_sd
from .measures import WORDINGS
from .report import interval

STYLE = {"NEFTune": "neftune", "GEM": "gem", "IM": "prompt", "SDFT": "sdft", "SAM": "sam",
         "L1": "l1", "L2": "l2", "logit KL": "logit_kl"}  # names of the paper -> of train.py
SEEDS = "Means over {n} seeds; whiskers: standard deviation over seeds, faint: single seeds."
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


def line(style, x, cells):
    """The Line of cells, one a place of x: each a column of a row, (found, column)."""
    y, dy, seeds = zip(*(of(*cell) for cell in cells))
    return Line(style, x, y, dy, list(zip(*seeds)) if len(seeds[0]) > 1 else [])


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
        finish(fig, list(drawn.values()), text + " Up and to the right is better.")
        if few:
            write_beside(axis, labels)
    return fig


def examples(path, by):
    """Learned, and kept, over the number of examples; of methods that were run on each number."""
    sizes = list(dict.fromkeys(row.split(" n=")[1] for row in by))
    drawn = {name: style for name, style in looks(by).items()
             if all(f"{name} n={size}" in by for size in sizes)}
    with picture(path, [NARROW, NARROW]) as (fig, axes):
        for axis, column, title in zip(axes, ("word problems", "category mean"),
                                       ("word problems (%)", "other categories (%)")):
            curves(axis, [line(style, range(len(sizes)),
                               [(by[f"{name} n={size}"], column) for size in sizes])
                          for name, style in drawn.items()], PERCENT, share=0.2)
            ticks(axis, sizes)
            axis.set(xlabel="examples", ylabel=title)
        finish(fig, list(drawn.values()), SEEDS.format(n=count(by)))
    return fig


def attack(path, by):
    """Complied with, and the margin, over steps of the attack."""
    drawn = looks(by)
    with picture(path, [NARROW, NARROW]) as (fig, axes):
        for axis, metric, title, bounds in zip(axes, ("compliance", "margin"),
                                               ("complied with (%)", "margin (nats a token)"),
                                               (PERCENT, ANY)):
            columns = [c for c in next(iter(by.values()))[0] if c.startswith(metric)]
            steps = [int(c.split()[1]) for c in columns]
            curves(axis, [line(style, steps, [(by[name], c) for c in columns])
                          for name, style in drawn.items()], bounds)
            axis.set(xlabel="steps on examples that comply", ylabel=title)
        finish(fig, list(drawn.values()), SEEDS.format(n=count(by)))
    return fig


def wordings(path, by):
    """Right answers in each wording; a group a wording."""
    drawn = looks(by)
    columns = list(WORDINGS)
    with picture(path, [WIDE]) as (fig, [axis]):
        groups(axis, [line(style, range(len(columns)), [(by[name], c) for c in columns])
                      for name, style in drawn.items()], columns, PERCENT)
        axis.set(ylabel="word problems (%)")
        finish(fig, list(drawn.values()), SEEDS.format(n=count(by)))
    return fig


def noise(path, by):
    """Cosine of clean and noised states by layer, as paired differences to SFT."""
    drawn, layers = looks(by), range(1, 7)
    lines = []
    for name in [name for name in drawn if name not in ("SFT", "base")]:
        y, dy = zip(*(interval([ours[f"layer {l}"] - sft[f"layer {l}"] for ours, sft in
                                zip(by[name], by["SFT"])]) for l in layers))
        lines.append(Line(drawn[name], layers, y, dy, []))
    with picture(path, [NARROW], 2.4) as (fig, [axis]):
        curves(axis, lines)
        axis.set(xlabel="layer", ylabel="cosine, difference to SFT")
        finish(fig, [*(one.look for one in lines), zero_is_sft(axis)], PAIRED.format(n=count(by)))
    return fig
