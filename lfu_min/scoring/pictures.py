"""Pictures of what eval.py measured and train.py logged, one panel a question. Needs matplotlib
(requirements-dev.txt).

Colours are Okabe and Ito's, which colour-blind people can tell apart; every run also has its own
marker, line style and hatching, so that a picture survives a grey printer. n and seeds stand in the
caption below.
"""
from itertools import cycle
import json
from pathlib import Path
from statistics import mean, stdev
import textwrap

# grey: the base
COLOURS = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES, HATCHES = "osD^vPX*", ("-", "--", "-.",
                                       ":"), ("", "//", "..", "xx", "\\\\", "++", "oo", "--")


def check(path):
    """Raise ValueError before anything slow starts: no matplotlib, not a .png, or no folder to
    write to."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: the file name should end in .png")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: the folder {Path(path).parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib (it is in "
                         "requirements-dev.txt)") from None


def figure(panels):
    import matplotlib
    matplotlib.use("Agg")  # no window: also without a display
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                            "hatch.linewidth": 0.5})
    fig, axes = pyplot.subplots(1, panels, figsize=(max(7, 5.5 * panels), 5.2), squeeze=False)
    return fig, list(axes[0])


def finish(fig, axes, path, caption):
    """One legend above all panels, the caption below, and the file."""
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), int(fig.get_figwidth() * 11 / (8 + max(map(len, labels), default=1)))))
    rows = -(-len(labels) // columns)
    lines = textwrap.wrap(caption, int(fig.get_figwidth() * 13))
    height = fig.get_figheight()
    fig.tight_layout(rect=(0, 0.03 + 0.18 * len(lines) / height, 1,
                           0.98 - (0.12 + 0.22 * rows) / height))
    fig.legend(handles, labels, loc="upper center", ncol=columns, frameon=False)
    fig.text(0.5, 0.02, "\n".join(lines), ha="center", va="bottom", fontsize=9, color="#444444")
    fig.savefig(path, dpi=130)
    import matplotlib.pyplot
    matplotlib.pyplot.close(fig)


def style(i):
    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[i % len(LINES)])


def results(path, by_run, subjects, whiskers="one standard error"):
    """One panel for each thing that was measured: bars, spread over wordings, curves over layers,
    curves over attack steps. by_run: {run: results}; whiskers: what `stderr` is, for the
    caption."""
    kinds = {"layer": layers, "attack": attack, "wording": wordings}
    panels = {}  # drawing function -> {run: its results}
    for run, found in by_run.items():
        for r in found:
            word = r.task.split(" ")[0].rstrip(",")
            draw = kinds.get(word, wordings if "over wordings" in r.task or "," in r.task else
                             bars if r.metric in BARS else losses if r.metric in LOSSES else None)
            if draw:
                panels.setdefault(draw, {}).setdefault(run, []).append(r)
    fig, axes = figure(len(panels))
    notes, name = [], short_names(by_run)
    for axis, (draw, found) in zip(axes, panels.items()):
        notes.append(draw(axis, {name[run]: rs
                                 for run, rs in found.items()}).replace("{whiskers}", whiskers))
    seeds = sorted({str(s.settings["seed"]) for s in subjects if "seed" in s.settings})
    notes.append(f"Training seed{'s' if len(seeds) > 1 else ''}: {', '.join(seeds)}." if seeds
                 else "")
    finish(fig, axes, path, " ".join(filter(None, notes)))


def short_names(runs):
    """{run: its folder's name, or the whole path where two folders have the same name}."""
    names = [Path(run).name for run in runs]
    return {run: run if names.count(name) > 1 else name for run, name in zip(runs, names)}


BARS = ("exact_match", "strict-match", "flexible-extract", "acc", "acc_norm")
LOSSES = ("nll", "perplexity", "bits_per_byte")


def whisker(r):
    return 0 if r.stderr != r.stderr else r.stderr  # no standard error (n = 1): no whisker


def grouped(axis, by_run, scale, single_metric):
    """Bars with whiskers of one standard error: a group a task, a bar a run."""
    groups = list(dict.fromkeys((r.task, r.metric) for found in by_run.values() for r in found))
    width = 0.8 / len(by_run)
    for i, (run, found) in enumerate(by_run.items()):
        at = {(r.task, r.metric): r for r in found}
        present = [(x, at[g]) for x, g in enumerate(groups) if g in at]
        axis.bar([x + (i - (len(by_run) - 1) / 2) * width for x, _ in present],
                 [scale * r.value for _, r in present],
                 width, yerr=[scale * whisker(r) for _, r in present], capsize=2,
                 error_kw=dict(lw=1), label=run,
                 color=COLOURS[i % len(COLOURS)], hatch=HATCHES[i % len(HATCHES)],
                 edgecolor="white")
    labels = [task.replace(" ", "\n") + ("" if single_metric else f"\n{metric}")
              for task, metric in groups]
    axis.set_xticks(range(len(groups)), labels, rotation=0 if len(groups) < 7 else 30, fontsize=9)
    counts = sorted({r.n for found in by_run.values() for r in found})
    return f"n = {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} a bar, whiskers: {{whiskers}}."


def bars(axis, by_run):
    axis.set_ylabel("right answers (%)")
    axis.set_ylim(0, 100)
    metrics = {r.metric for found in by_run.values() for r in found}
    return grouped(axis, by_run, 100, len(metrics) == 1)


def losses(axis, by_run):
    metrics = {r.metric for found in by_run.values() for r in found}
    axis.set_ylabel("answer NLL (nats a token), lower is better" if metrics == {"nll"}
                    else "lower is better")
    grouped(axis, by_run, 1, len(metrics) == 1)
    values = [r.value for found in by_run.values() for r in found if r.value > 0]
    if max(values) > 20 * min(values):
        axis.set_yscale("log")
        axis.set_ylim(min(values) / 2, max(values) * 2)
    return ""


def wordings(axis, by_run):
    """Figure 5: a dot a wording, a bar from mean - sd to mean + sd."""
    metric = next(iter(by_run.values()))[0].metric
    for i, (run, found) in enumerate(by_run.items()):
        points = [r for r in found if r.metric == metric and "over wordings" not in r.task]
        mean = next(r for r in found if r.metric == f"{metric} mean")
        sd = next(r for r in found if r.metric == f"{metric} sd")
        look = style(i)
        for r in points:
            k = points.index(r) - (len(points) - 1) / 2
            filled = "unseen" not in r.task
            axis.plot(i + 0.05 * k - 0.15, 100 * r.value, look["marker"], color=look["color"], ms=6,
                      mfc=look["color"] if filled else "white")
        axis.errorbar(i + 0.25, 100 * mean.value, yerr=100 * sd.value, fmt=look["marker"],
                      color=look["color"],
                      capsize=5, lw=2, ms=8, label=f"{run}: {100 * mean.value:.1f}, sd "
                                                   f"{100 * sd.value:.1f}")
    axis.set_xticks(range(len(by_run)), [textwrap.fill(run, 14) for run in by_run])
    axis.set_xlim(-0.6, len(by_run) - 0.4)
    low, high = axis.get_ylim()
    axis.set_ylim(max(-3, low - 2), min(103, high + 2))
    axis.set_ylabel("right answers (%)" if metric == "exact_match" else f"{metric} (%)")
    hollow = ", hollow where it was never trained" if any("unseen" in r.task
                                                          for r in points) else ""
    return (f"Small marks: one wording each ({points[0].n} questions){hollow}; large mark: mean "
            "and standard deviation "
            f"over {mean.n} wordings.")


def layers(axis, by_run):
    """Figure 6: cosine similarity of clean and noised states, layer by layer; the embedding (layer
    0) is left out."""
    for i, (run, found) in enumerate(by_run.items()):
        found = [r for r in found if r.task != "layer 0"]
        axis.errorbar(range(1, len(found) + 1), [r.value for r in found],
                      yerr=[whisker(r) for r in found], ms=5, lw=1.5, capsize=2, label=run,
                      **style(i))
    axis.set_xlabel("layer (the last after the final norm)")
    axis.set_ylabel("cosine similarity, clean and noised")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return f"{found[0].n} texts, whiskers: {{whiskers}}."


def attack(axis, by_run):
    """Figure 3: share of held-out requests that are complied with, over steps of adversarial
    fine-tuning."""
    for i, (run, found) in enumerate(by_run.items()):
        found = [r for r in found if r.metric == "compliance"]
        steps = [int(r.task.split()[1]) for r in found]
        axis.errorbar(steps, [100 * r.value for r in found], yerr=[100 * whisker(r) for r in found],
                      ms=6, lw=1.5, capsize=3, label=run, **style(i))
    axis.set_xlabel("steps of plain SFT on examples that comply")
    axis.set_ylabel("complied and coherent (%)")
    axis.set_ylim(-3, 103)
    return f"{found[0].n} held-out requests, whiskers: {{whiskers}}."


def tradeoff(path, by, what):
    """What is learned against what is kept, from sweep.py: {setting: [{column: per cent}, one a
    seed]}. Settings of one `aux` share a line, in the order of what they learned: up and to the
    right is better."""
    fig, (axis,) = figure(1)
    lines = {}  # aux -> (label, mean and sd of x, mean and sd of y)
    for setting, found in by.items():
        words = dict(word.split("=") for word in setting.split() if "=" in word)
        aux = words.pop("aux", None)
        if aux:
            spread = [(mean(v), stdev(v) if len(v) > 1 else 0)
                      for v in ([r[column] for r in found]
                                for column in ("word problems", "category mean"))]
            lines.setdefault(aux, []).append((" ".join(f"{k} {v}" for k, v in words.items()),
                                              *spread))
    names = dict(none="SFT", lora="LfU, LoRA", reps="LfU, RepS", inplace="LfU, in place")
    for i, (aux, points) in enumerate(lines.items()):
        points.sort(key=lambda p: p[1])
        x, y = ([p[k] for p in points] for k in (1, 2))
        axis.errorbar([v for v, _ in x], [v for v, _ in y], xerr=[e for _, e in x],
                      yerr=[e for _, e in y], ms=7, lw=1.3,
                      capsize=2, elinewidth=0.8, label=names.get(aux, aux), **style(i))
        for label, (px, _), (py, _) in points:
            dx, dy, side = ((6, 6, "left"), (-6, -13, "right"), (6, 6, "left"),
                            (6, -13, "left"))[i % 4]
            axis.annotate(label, (px, py), xytext=(dx, dy), textcoords="offset points", ha=side,
                          fontsize=8,
                          color=style(i)["color"])
    axis.set_xlabel("word problems, right answers (%)")
    axis.set_ylabel("mean of the other four categories (%)")
    seeds = sorted({len(found) for setting, found in by.items() if setting != "base"})
    finish(fig, [axis], path, f"{what}; a point is the mean of {' or '.join(map(str, seeds))} "
                              "seeds, whiskers: standard "
           "deviation over seeds. Up and to the right is better.")


def curves(path, subjects):
    """SFT loss and consistency loss of runs over optimizer steps, from their log.jsonl."""
    logs, name = {}, short_names([subject.name for subject in subjects])
    for subject in subjects:
        file = subject.folder / "log.jsonl"
        if not file.is_file():
            raise ValueError(f"{file} is missing: without it there are no curves to draw")
        logs[name[subject.name]] = [json.loads(line)
                                    for line in file.read_text(encoding="utf-8").splitlines()]
    consistent = {run: log for run, log in logs.items()
                  if any(row["consistency"] > 0 for row in log)}
    fig, axes = figure(1 + bool(consistent))
    for i, (run, log) in enumerate(logs.items(), 1):
        mark = dict(style(i), markevery=max(1, len(log) // 8), ms=5, lw=1.3)
        axes[0].plot([row["step"] for row in log], [row["sft"] for row in log], label=run, **mark)
        if run in consistent:
            raw = [row["consistency"] for row in log]
            smooth = [sum(raw[max(0, k - 4):k + 5]) / len(raw[max(0, k - 4):k + 5])
                      for k in range(len(raw))]
            axes[1].plot([row["step"] for row in log], raw, color=mark["color"], lw=0.7, alpha=0.4)
            axes[1].plot([row["step"] for row in log], smooth, label=run, **mark)
    for axis, what in zip(axes, ("SFT loss (nats a token)",
                                 "consistency loss (Eq 5, before lambda)")):
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(what)
        axis.set_yscale("log")
    seeds = sorted({str(s.settings.get("seed", "?")) for s in subjects})
    lengths = " or ".join(map(str, sorted({len(log) for log in logs.values()})))
    finish(fig, axes, path,
           f"One run a curve, {lengths} steps, seed{'s' if len(seeds) > 1 else ''} "
           f"{', '.join(seeds)}. "
           "Consistency: thin every step, thick the mean over nine. Logarithmic axes.")
