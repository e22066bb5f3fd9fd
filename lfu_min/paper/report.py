"""Pages of docs/results: tables in Markdown, paired differences with their intervals."""
import math

from ..scoring.measures import mean_sd
from . import grid

# Student's t, 97.5 %, by degrees of freedom: 95 % intervals of a mean over few seeds.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
       2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)

WATCH = ("train loss", "consistency_share", "gradient_cosine", "movement", "first movement")
SAME_RATE = "same-rate-SFT"  # the row of SFT at the learning rate of LfU's best setting


def interval(differences):
    """(mean, half width of its 95 % interval) of paired differences, one a seed; a single one has
    no interval (NaN). Student's t, so they are taken to be normal."""
    m, sd, n = mean_sd(differences)
    return m, T95[min(n - 1, len(T95) - 1)] * sd / math.sqrt(n)


def difference(values, digits):
    """"+1.5 ± 0.4*" of paired differences; the star where the interval leaves out zero. Without an
    interval (one seed, or the same difference in all) there is no star."""
    m, half = interval(values)
    wide = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{m:+.{digits}f}{wide}" + "*" * (abs(m) > half > 0)


def table(header, rows):
    """A Markdown table of cells."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def words(setting):
    return ", ".join(f"{k} {v}" for k, v in setting.items() if k not in ("aux", "method", "data"))


def tuning(found, chosen, machines):
    """The page of `tune`: every setting's two numbers, and what the rule chose."""
    lines = []
    for method, points in found.items():
        best, frontier = chosen[method]["best"], chosen[method]["frontier"]
        for setting, x, y in points:
            note = ["best"] * (setting == best) + ["frontier"] * (setting in frontier)
            lines.append([method, words(setting), f"{x:.1f}", f"{y:.1f}", ", ".join(note)])
    return "\n".join([
        "# tune: nine settings a method, on the validation split", "",
        f"Means over seeds {', '.join(map(str, grid.TUNING_SEEDS))}; {grid.EXAMPLES} word "
        f"problems, {grid.EPOCHS} epochs of {grid.BATCH}. Grid and rule: `paper/grid.py: choose`.",
        *command("python -m lfu_min.paper.reproduce tune", machines), "",
        table(["method", "setting", "word problems (%)", "other categories (%)", "chosen"], lines),
        "", "At an edge of the grid, so that a better value may lie outside: " +
        "; ".join(edges(chosen)) + ".", ""])


def edges(chosen):
    """["SFT lr 7e-3", ...]: what was chosen and is the smallest or largest value of the grid."""
    found = []
    for name, method in grid.METHODS.items():
        best, frontier = chosen[name]["best"], grid.strength(name, chosen[name]["frontier"][0])
        rates = grid.RATES if method.strength else grid.NINE_RATES
        if best["lr"] in (rates[0], rates[-1]):
            found.append(f"{name} lr {best['lr']}")
        ends = {method.values[0], method.values[-1]} if method.strength else set()
        for value in dict.fromkeys((grid.strength(name, best), frontier)):
            if value in ends:
                found.append(f"{name} {method.strength} {value}")
    return found


def alphas(lines, target, machines):
    """The page of `rule`."""
    return "\n".join([
        "# rule: alpha by the movement of the states", "",
        f"The first step should move the states by {100 * target:.2f} %, which is what LfU-lora's "
        "best alpha does, in the layer that moves most (root mean square of h' - h over that of "
        "h). For every other kind the rule predicts the alpha whose movement is nearest. Largest: "
        "by the area under its three learning rates, `paper/grid.py: hypervolume`. Means over "
        f"learning rates and seeds {', '.join(map(str, grid.TUNING_SEEDS))}, validation split; "
        "share and cosine are medians of a run.",
        *command("python -m lfu_min.paper.reproduce rule", machines), "",
        table(["method", "alpha", "first movement (%)", "share", "cosine", "area", ""], lines), ""])


def command(line, machines):
    return ["", "```bash", line, "```", "", "Measured on " + "; and on ".join(machines) + "."]


def reference(row, by, other="SFT"):
    """The row that `row` is compared with, seed by seed: the other method's with the same lr=...
    (n=..., stream=...) behind its name, else the one without; None for SFT, the base, and a row
    itself."""
    if row == "base" or row.startswith("SFT"):
        return None
    same = " ".join([other, *(word for word in row.split(" ") if "=" in word)])
    return next((name for name in (same, other) if name in by and name != row), None)


def pairs(by, beside=()):
    """[(title, row, the row it is compared with)]: all with SFT, with SFT at LfU's own learning
    rate where that was run, and with the rows of `beside`."""
    found = [(row, row, reference(row, by)) for row in by]
    for other in (SAME_RATE, *beside):
        found += [(f"{row}, to {other}", row, reference(row, by, other)) for row in by]
    return [pair for pair in found if pair[2]]


def digits(column):
    if any(word in column for word in ("layer", "movement")):
        return 4
    return 3 if any(word in column for word in ("nll", "loss", "margin", "cosine", "share",
                                                "bits")) else 1


def cell(found, column):
    """Mean ± standard deviation over seeds."""
    values = [row[column] for row in found if column in row]
    if not values or (column in WATCH and not any(values)):  # SFT has no consistency
        return "-"
    m, sd, n = mean_sd(values)
    return f"{m:.{digits(column)}f}" + (f" ± {sd:.{digits(column)}f}" if n > 1 else "")


def page(name, experiment, by, seeds, settings, figure, line, machines):
    """A page of docs/results: the command `line`, mean and standard deviation over seeds, and the
    paired differences to SFT with their 95 % intervals; * where an interval leaves out zero.
    settings: {row: flags of train.py}."""
    columns = experiment.columns
    means = [[row, *(cell(found, c) for c in columns)] for row, found in by.items()]
    columns = [c for c in columns if c not in WATCH]  # SFT has no such numbers
    differences = []
    for title, row, other in pairs(by, experiment.beside):
        cells = [title]
        for column in columns:
            both = [a[column] - b[column] for a, b in zip(by[row], by[other])
                    if column in a and column in b]
            cells.append(difference(both, digits(column)) if both else "-")
        differences.append(cells)
    title, _, more = experiment.shows.partition(". ")
    lines = [f"# {name}: {title}", *["", f"{more}."] * bool(more), *command(line, machines),
             "", f"Seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds. What "
             "the columns are: [words](../results.md#words).", "",
             table(["", *experiment.columns], means), "",
             "Paired difference to SFT, or to what is named, seed by seed, ± half its 95 % "
             "interval; * where the interval leaves out zero:", "",
             table(["", *columns], differences), ""]
    if any(" lr=" in row for row in by):
        lines += areas(by)
    lines += ["Settings, beside the defaults:", "",
              *(f"- {row}: " + ", ".join(f"{k} {v}" for k, v in setting.items())
                for row, setting in settings.items()), ""]
    if figure:
        lines += [f"![{title}]({figure.name})", ""]
    return "\n".join(lines)


def areas(by):
    """Lines on the area under each method's points, seed by seed: grid.hypervolume."""
    names = list(dict.fromkeys(row.split(" lr=")[0] for row in by if " lr=" in row))
    seeds = range(min(len(found) for row, found in by.items() if " lr=" in row))
    volumes = {name: [grid.hypervolume([(found[i]["word problems"], found[i]["category mean"])
                                        for row, found in by.items()
                                        if row.split(" lr=")[0] == name]) for i in seeds]
               for name in names}
    rows = []
    for name, values in volumes.items():
        m, sd, n = mean_sd(values)
        rows.append([name, f"{m:.3f}" + (f" ± {sd:.3f}" if n > 1 else ""), ""])
        if name != "SFT" and "SFT" in volumes:
            rows[-1][2] = difference([a - b for a, b in zip(values, volumes["SFT"])], 3)
    return ["Area under the points of each method (word problems x other categories, of 1), mean "
            "± standard deviation, and its paired difference to SFT's:", "",
            table(["", "area", "difference"], rows), ""]
