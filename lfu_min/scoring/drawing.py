"""The parts of every picture: colours, the figure and its files, points with whiskers, and names
beside lines and points. What is drawn with them is in pictures.py (eval.py --plot) and in
paper/figures.py.

A method has one colour and one marker everywhere. Colours are Okabe and Ito's, which colour-blind
people can tell apart; grey is the base. matplotlib is imported only to draw.
"""
from contextlib import contextmanager
from itertools import pairwise, product
from math import ceil, inf
from pathlib import Path
from statistics import fmean
import textwrap
from typing import NamedTuple

import numpy as np

PERCENT, ANY = (0, 100), (-inf, inf)  # bounds of points and whiskers
STYLES = {  # method: (colour, marker)
    "base": ("#7F7F7F", "s"), "SFT": ("#D55E00", "o"), "LfU-lora": ("#0072B2", "^"),
    "LfU-reps": ("#009E73", "D"), "LfU-inplace": ("#CC79A7", "v"), "neftune": ("#E69F00", "P"),
    "gem": ("#56B4E9", "X"), "sam": ("#000000", "*"), "prompt": ("#E69F00", "<"),
    "l1": ("#56B4E9", ">"), "l2": ("#000000", "d"), "logit_kl": ("#56B4E9", "p")}
OTHERS = (("#000000", "h"), ("#E69F00", "H"), ("#56B4E9", "8"))  # anything else, in turn
AGAIN = (("-", "full"), ("--", "none"), (":", "left"), ("-.", "right"))  # columns of one method
NARROW, WIDE = 3.3, 6.8  # inches: one column of a page, two columns
LOOK = {"font.size": 8, "lines.linewidth": 1, "lines.markersize": 3.5, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
        "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#E6E6E6",
        "grid.linewidth": 0.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "axes.labelsize": "medium", "xtick.labelsize": "medium", "ytick.labelsize": "medium",
        "legend.fontsize": "medium", "pdf.fonttype": 42}  # 42: text stays text


def look(name, method, methods):
    """How a column is drawn: by its method; an unknown one by its place among all `methods`, the
    methods of all columns. `name` is what it is called."""
    unknown = [m for m in dict.fromkeys(methods) if m not in STYLES]
    color, marker = STYLES.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]
    return dict(label=name, color=color, marker=marker, linestyle="-", fillstyle="full")


@contextmanager
def picture(path, widths, height=1.9):
    """Yields (Figure, [axes]) for panels NARROW or WIDE, two narrow ones in a row, and writes the
    figure as PNG to `path` and as PDF beside it. height: of a row, in inches."""
    import matplotlib
    from matplotlib.figure import Figure
    rows = []
    for i, width in enumerate(widths):
        if width == NARROW and rows and rows[-1][1] == ".":
            rows[-1][1] = i
        else:
            rows.append([i, i if width == WIDE else "."])
    rows = [[0]] if rows == [[0, "."]] else rows
    with matplotlib.rc_context(LOOK):
        fig = Figure((WIDE if len(rows[0]) > 1 else NARROW, height * len(rows) + 0.6), dpi=200,
                     layout="constrained")
        yield fig, list(fig.subplot_mosaic(rows).values())
        fig.savefig(path)
        # without the time: the same numbers are the same file
        fig.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None})


class Line(NamedTuple):
    """One method, or one of several settings, in a panel: a point a place."""
    look: dict  # label, color, marker, linestyle, fillstyle
    x: list
    y: list
    errors: list  # of the whiskers
    singles: list  # the y of every single seed; empty where there is one


def curves(axis, drawn, bounds=ANY, share=0.4):
    """Draw [Line, ...], side by side within this share of the distance between two places."""
    places = sorted({x for line in drawn for x in line.x})
    distance = min((b - a for a, b in pairwise(places)), default=1)
    for line, shift in zip(drawn, dodge(len(drawn), share * distance)):
        x = [place + shift for place in line.x]
        for y in line.singles:
            faint(axis, x, y, line.look, left=3)
        whiskered(axis, x, line.y, line.look, line.errors, bounds)
    if bounds == PERCENT:
        axis.set_ylim(PERCENT)


def groups(axis, drawn, names, bounds=ANY):
    """Draw [Line, ...] without lines, a group a name; x are the names' places, 0, 1, 2, ..."""
    curves(axis, [line._replace(look=line.look | {"linestyle": "none"}) for line in drawn],
           bounds, share=0.7)
    ticks(axis, names)


def zero_is_sft(axis):
    """Of differences to SFT: the line at zero, under its name. Returns its look."""
    sft = look("SFT", "SFT", ())
    axis.axhline(0, color=sft["color"], linewidth=1, zorder=1)
    axis.ticklabel_format(axis="y", scilimits=(-2, 3))
    return sft


def dodge(count, width):
    """`count` shifts around 0 that share `width`, so that whiskers stand side by side."""
    return [width * (i - (count - 1) / 2) / count for i in range(count)]


def whiskered(axis, x, y, look, errors, bounds, **others):
    """Points with whiskers that stay inside `bounds` = (low, high)."""
    drawn = axis.errorbar(x, y, yerr=cut(y, errors, bounds), elinewidth=0.8, capsize=1.5, zorder=3,
                          **look, **others)
    for artist in drawn.get_children():  # a point at 0 or 100 % is drawn whole
        artist.set_clip_on(False)


def cut(values, errors, bounds):
    """Whiskers (down, up) inside the bounds; none where there is no error (NaN)."""
    values, errors = np.array(values), np.nan_to_num(errors)
    return np.minimum(errors, values - bounds[0]), np.minimum(errors, bounds[1] - values)


def faint(axis, x, y, look, left=0):
    """Small faint points of one seed, `left` pt aside, where no whisker hides them."""
    from matplotlib.transforms import ScaledTranslation
    [line] = axis.plot(x, y, look["marker"], color=look["color"], markersize=2, alpha=0.5,
                       zorder=2.6, markeredgewidth=0, clip_on=False)
    aside = ScaledTranslation(-left / 72, 0, axis.figure.dpi_scale_trans)
    line.set_transform(axis.transData + aside)  # only now: the axis' limits count its points


def ticks(axis, names):
    """Names below groups at 0, 1, 2, ..., and a thin line between two groups."""
    axis.set_xticks(range(len(names)), [textwrap.fill(name, 14) for name in names])
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.tick_params(axis="x", length=0)
    for i in range(1, len(names)):
        axis.axvline(i - 0.5, color=LOOK["grid.color"], linewidth=0.5, zorder=0)


def finish(fig, looks, caption, ends=None):
    """The caption below, and the names: beside their lines' right ends, or, where a panel has no
    lines or no room for that, in one legend above.

    ends: {axis: [(look, height), ...]}, [] for a panel without lines; None: a legend.
    """
    from matplotlib.lines import Line2D
    width = fig.get_figwidth()
    fig.supxlabel(textwrap.fill(caption, int(20 * width)), fontsize=7, color="#444444")
    fig.draw_without_rendering()  # places the axes
    ends = ends or {}
    moves = {axis: moved_apart(axis, [y for _, y in found]) for axis, found in ends.items()}
    if moves and all(moves.values()):
        for axis, found in ends.items():
            for (one, y), move in zip(found, moves[axis]):
                axis.annotate(one["label"], (1, y), (3, move), va="center", color=one["color"],
                              xycoords=("axes fraction", "data"), textcoords="offset points",
                              annotation_clip=False)
    else:
        rows = ceil(sum(4.2 * len(one["label"]) + 32 for one in looks) / (72 * width))
        fig.legend(handles=[Line2D([], [], **one) for one in looks], loc="outside upper center",
                   ncols=ceil(len(looks) / rows), columnspacing=1.2, handlelength=1.8)


def moved_apart(axis, heights, gap=9, room=13):
    """By how many points labels at these heights must move to stand `gap` points apart, as little
    as can be; [] where one would have to move further than `room`, or there is none."""
    y = [axis.transData.transform((0, height))[1] * 72 / axis.figure.dpi for height in heights]
    order = sorted(range(len(y)), key=y.__getitem__)
    stacks = []  # labels that touch share their mean height
    for k, i in enumerate(order):
        stack = [y[i] - k * gap]
        while stacks and fmean(stacks[-1]) > fmean(stack):
            stack = stacks.pop() + stack
        stacks.append(stack)
    places = [fmean(stack) for stack in stacks for _ in stack]
    moves = [places[order.index(i)] + order.index(i) * gap - y[i] for i in range(len(y))]
    return moves if all(abs(move) < room for move in moves) else []


def write_beside(axis, labels):
    """Write each (x, y, text, colour) at the side of its point where it covers least of what is
    drawn: points, whiskers, lines and earlier labels."""
    from matplotlib.patheffects import withStroke
    axis.figure.draw_without_rendering()  # places the axis
    pt = 72 / axis.figure.dpi
    paths = [[point] for line in axis.lines for point in line.get_xydata()]
    paths += [line.get_xydata() for line in axis.lines if line.get_linestyle() != "None"]
    paths += [segment for whiskers in axis.collections for segment in whiskers.get_segments()]
    drawn = [np.linspace(a, b, 30) for path in paths for a, b in zip(path, [*path[1:], path[-1]])]
    taken = axis.transData.transform(np.concatenate(drawn)) * pt  # (N, 2): all that is drawn
    frame, grid = axis.bbox.extents * pt, np.array(list(product(np.linspace(0, 1, 12), repeat=2)))
    for x, y, text, color in labels:
        point, size = axis.transData.transform((x, y)) * pt, np.array([3.7 * len(text), 6.0])
        # right, left, above, ...: from the point to the text's lower left corner
        sides = [np.array(way) * (away + size / 2) - size / 2
                 for away in (4, 8, 12) for way in product((1, -1, 0), repeat=2) if any(way)]

        def covered(side):
            low, high = point + side - 1, point + side + size + 1
            outside = (low < frame[:2]).any() or (high > frame[2:]).any()
            return ((taken > low) & (taken < high)).all(1).sum() + 10_000 * outside

        side = min(sides, key=covered)
        taken = np.concatenate([taken, point + side + grid * size])
        axis.annotate(text, (x, y), side, textcoords="offset points", fontsize=7, color=color,
                      path_effects=[withStroke(linewidth=1.5, foreground="white")])
