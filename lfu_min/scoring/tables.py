"""What was measured, as text: one table, seeds put together, and what was learned and forgotten in
words.

Called by eval.py, which prints what these functions return, and by pictures.py.
"""
import math

from ..bundled import CATEGORIES
from ..engine.system import on_screen
from .categories import IN_DOMAIN, mean_of
from .measures import mean_result, mean_sd
from .runs import method, short_names

SHARES = {"exact_match", "strict-match", "flexible-extract", "acc", "acc_norm", "compliance",
          "not refused", "coherent"}


def over_seeds(by_run, columns):
    """{column: results} from {run: results} and {column: [run, ...]}: value and stderr are mean
    and sample standard deviation over the column's runs (one run: as they were)."""
    table = {}
    for column, runs in columns.items():
        table[column] = []
        for same in zip(*(by_run[run.name] for run in runs), strict=True):
            mean, sd, n = mean_sd([r.value for r in same])
            table[column].append(same[0]._replace(value=mean, stderr=sd) if n > 1 else same[0])
    return table


def shown(r):
    """'12.5 ± 1.1' in points for shares, plain numbers for the rest."""
    share = r.metric.removesuffix(" mean").removesuffix(" sd") in SHARES
    scale, digits = (100, 1) if share else (1, {"cosine": 4, "cosine - SFT": 6}.get(r.metric, 3))
    error = "" if math.isnan(r.stderr) else f" ± {scale * r.stderr:.{digits}f}"
    return f"{scale * r.value:.{digits}f}{error}"


def text(table, columns=None):
    """One line a measure, one column a model: value ± standard error, and n.

    table: {column: results}; columns: what over_seeds was given, where it put seeds together.
    """
    names, lines = short_names(table), {}
    for column, results in table.items():
        for r in results:
            lines.setdefault((r.task, r.metric), {})[column] = r
    cells = [["task", "metric", *names.values(), "n"]]
    for measure, row in lines.items():
        cells.append([*measure, *(shown(row[c]) if c in row else "-" for c in names),
                      str(next(iter(row.values())).n)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    told = ["  ".join(cell.ljust(w) if c < 2 else cell.rjust(w)
                      for c, (cell, w) in enumerate(zip(row, widths))) for row in cells]
    meaning, seeds = "standard error over the n examples", []
    if columns:
        meaning = f"standard deviation over seeds (one seed: {meaning})"
        seeds = ["seeds: " + "; ".join(
            f"{column} {', '.join(str(run.settings.get('seed')) for run in runs)}"
            for column, runs in columns.items() if column != "base")]
    return on_screen("\n".join(
        [*told, f"value ± {meaning}; shares in %, nll in nats a token", *seeds]))


def verdict(examples, runs):
    """Figure 1 in words: what each run learned and forgot, differences taken question by question.

    examples: {run: {task: rows with "match"}} of categories.measure; runs: the base first.
    """
    def right(names, task):  # the share of these runs that is right, a question
        rows = zip(*(examples[name][task] for name in names), strict=True)
        return [sum(row["match"] for row in same) / len(names) for same in rows]

    def gain(new, old, tasks):
        return mean_of([mean_result(t, "gain", [100.0 * (a - b) for a, b in zip(
            right(new, t), right(old, t), strict=True)]) for t in tasks])

    def told(learned, kept):
        return (f"{IN_DOMAIN} {learned.value:+.1f} ± {learned.stderr:.1f} points, other "
                f"categories {kept.value:+.1f} ± {kept.stderr:.1f}")

    lines, found = [], {"SFT": [], "LfU": []}
    for run in runs[1:]:
        found.setdefault(method(run).split("-")[0], []).append(run.name)
        lines.append(f"{run.name} ({method(run)}): " + told(
            gain([run.name], ["base"], [IN_DOMAIN]), gain([run.name], ["base"], CATEGORIES)))
    if found["SFT"] and found["LfU"]:
        learned, kept = (gain(found["LfU"], found["SFT"], tasks)
                         for tasks in ([IN_DOMAIN], CATEGORIES))
        lines.append(
            f"LfU against SFT, means over {len(found['LfU'])} and {len(found['SFT'])} runs: "
            f"{told(learned, kept)} (errors over questions, not over seeds): "
            + in_words(learned, kept))
    return on_screen("\n".join(lines))


def in_words(learned, kept):
    """What two differences of LfU to SFT mean; within two standard errors they mean nothing."""
    if abs(kept.value) <= 2 * kept.stderr:
        return "too small a difference to say whether LfU forgets less."
    if kept.value < 0:
        return "LfU forgets MORE here."
    if abs(learned.value) <= 2 * learned.stderr:
        return "LfU forgets less; whether it learns less cannot be said."
    return ("LfU forgets less, and learns more." if learned.value > 0 else
            "LfU forgets less, but learns less too: which is better depends on the exchange.")
