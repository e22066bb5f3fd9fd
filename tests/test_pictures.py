"""Claim: pictures are fit for a paper. 3.3 or 6.8 inches wide, as PNG and PDF; a method has one
colour and one marker in all of them; nothing of a percentage leaves 0-100; single seeds stand
behind their mean; and what is drawn are the numbers that were given, paired differences included.
Looks into matplotlib's objects; skipped without matplotlib.
"""
import math
import random

import pytest

from lfu_min.paper import figures as paper
from lfu_min.scoring import drawing, pictures, robustness
from lfu_min.scoring.measures import Result, mean_sd
from lfu_min.scoring.runs import Run

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-dev.txt)")
from matplotlib import image
from matplotlib.colors import to_hex

pytestmark = pytest.mark.slow

AUX = {"SFT": "none", "LfU-lora": "lora", "LfU-reps": "reps", "LfU-inplace": "inplace"}
FIVE = ("base", *AUX)
KINDS = ("scores", "wordings", "noise", "attack")


def five_methods(seeds=(0, 1, 2)):
    def run(aux, seed):
        name = f"runs/{aux}-{seed}"
        return Run(name, name, dict(aux=aux, lam=5.0, seed=seed))
    return {"base": [Run("base")]} | {name: [run(aux, seed) for seed in seeds]
                                      for name, aux in AUX.items()}


def measured(kind, columns):
    """{run's name: results} at random, shares often at 0 or 1 with an error that goes beyond."""
    draw, found = random.Random(0), {}
    for run in (run for runs in columns.values() for run in runs):
        def some(task, metric, low=0.0, high=1.0):
            value = min(1, max(0, draw.uniform(low - 0.2, high + 0.2)))
            return Result(task, metric, value, 0.3, 50)
        if kind == "scores":
            tasks = ("word problems", "math", "category mean")
            found[run.name] = [some(task, "exact_match") for task in tasks]
            found[run.name] += [Result(task, "nll", draw.choice((1e-3, 4.0)), 5.0, 50)
                                for task in tasks[:2]]
        elif kind == "wordings":
            every = [some(f"wording {i}" + " (unseen)" * (i > 1), "exact_match") for i in range(4)]
            found[run.name] = every + robustness.spread(every)
        elif kind == "attack":
            found[run.name] = [some(f"attack, {step} steps", "compliance") for step in (0, 1, 5)]
        else:
            found[run.name] = [Result(f"layer {l}", "cosine", draw.uniform(0.98, 1), 1e-4, 50)
                               for l in range(4)]
    return found


def test_the_caption_counts_examples_whatever_their_file_is_called():
    results = [Result("nll mean_a", "nll", 1.0, 0.1, 7), Result("category mean", "nll", 1, 1, 480),
               Result("a", "exact_match mean", 1.0, 0.1, 3)]
    columns = {"base": [Run("base")]}
    shown = [pictures.Column({}, results, [])]
    assert "n = 7 a point" in pictures.caption([(pictures.PANELS[0], shown)], columns)


def draw(kind, folder, columns):
    return pictures.results(folder / f"{kind}.png", {kind: measured(kind, columns)}, columns)


def swept():
    """Scores of reproduce.py, many close together."""
    draw = random.Random(1)
    names = ["SFT lr=1e-3", "SFT lr=2e-3", "LfU-lora lr=1e-3", "LfU-lora lr=2e-3",
             "LfU-inplace lr=1e-3", "LfU-reps lr=1e-3"]
    by = {"base": [{"word problems": 0.0, "category mean": 99.0}]}
    by |= {name: [{"word problems": draw.uniform(70, 100), "category mean": draw.uniform(0, 60)}
                  for _ in range(3)] for name in names}
    return by


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def figures(folder):
    """{kind: Figure} of five methods and three seeds, written to folder/<kind>.png."""
    found = {kind: draw(kind, folder, five_methods()) for kind in KINDS}
    return found | {"fig1": paper.tradeoff(folder / "fig1.png", swept())}


def means(axis, color):
    """The large points of one colour: (x, y) of every line whose points are not faint."""
    return [line.get_xydata().tolist() for line in axis.lines
            if line.get_marker() not in ("None", "_", "|") and line.get_alpha() is None
            and to_hex(line.get_color()) == color.lower()]


def faint(axis, color):
    return [line for line in axis.lines if line.get_alpha() is not None
            and to_hex(line.get_color()) == color.lower()]


def looks(fig):
    """{(colour, marker)} of all points, large and faint."""
    return {(to_hex(line.get_color()), line.get_marker()) for axis in fig.axes
            for line in axis.lines if line.get_marker() not in ("None", "_", "|")}


# ---- the file, the look

@pytest.mark.slow
@pytest.mark.parametrize("kind, width", [("scores", 6.8), ("wordings", 6.8), ("attack", 3.3),
                                         ("noise", 3.3), ("fig1", 6.8)])
def test_width_font_and_both_files(kind, width, figures, folder):
    fig = figures[kind]
    assert fig.get_figwidth() == width
    png = image.imread(folder / f"{kind}.png")
    assert png.shape[1] == 200 * width
    pdf = (folder / f"{kind}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/CreationDate" not in pdf, "the same at any time"
    for axis in fig.axes:
        assert axis.xaxis.label.get_size() == axis.yaxis.label.get_size() == 8
        for text in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            assert text.get_size() == 8
        assert all(7 <= text.get_size() <= 8 for text in axis.texts)
    assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"], "no traces"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "fig1"])
def test_nothing_is_cut_off_at_the_margin(kind, figures, folder):
    """A white margin on every side; text that leaves the picture would blacken it."""
    png = image.imread(folder / f"{kind}.png")[..., :3]
    for side in (png[:2], png[-2:], png[:, :2], png[:, -2:]):
        assert side.min() == 1


def test_a_method_looks_the_same_in_every_picture(figures):
    styles = {name: (color.lower(), marker) for name, (color, marker) in drawing.STYLES.items()}
    expected = {styles[name] for name in FIVE}
    assert len(expected) == len({color for color, _ in expected}) == 5
    assert len({marker for _, marker in styles.values()}) == len(styles), "in grey print too"
    for fig in figures.values():
        assert looks(fig) == expected
    assert drawing.STYLES["base"][0][1:3] == drawing.STYLES["base"][0][3:5], "grey"


def test_a_methods_look_does_not_depend_on_which_others_are_there(tmp_path):
    columns = five_methods((0,))
    del columns["SFT"], columns["base"]
    fig = draw("attack", tmp_path, columns)
    assert looks(fig) == {(drawing.STYLES[name][0].lower(), drawing.STYLES[name][1])
                          for name in columns}


def test_columns_are_called_by_method_and_by_folder_only_where_that_is_not_enough():
    def run(name, **settings):
        return [Run(name, name, settings)]
    names = lambda columns: [look["label"] for look in pictures.column_looks(columns).values()]
    assert names({"base": [Run("base")], "runs/a": run("runs/a", aux="lora", lam=0),
                  "runs/b": run("runs/b", aux="reps", lam=5.0), "x/peft": run("x/peft"),
                  "runs/c": run("runs/c", method="sam", aux="none")}) == [
        "base", "SFT", "LfU-reps", "peft", "sam"]
    two = {"runs/a": run("runs/a", aux="lora"), "runs/b": run("runs/b", aux="lora")}
    assert names(two) == ["LfU-lora a", "LfU-lora b"]
    a, b = pictures.column_looks(two).values()
    assert a["color"] == b["color"] and a["linestyle"] != b["linestyle"]
    assert a["fillstyle"] != b["fillstyle"], "points without lines differ too"
    seeds = {"SFT": run("s", aux="none"), "LfU-lora alpha 0.1": run("a", aux="lora"),
             "LfU-lora alpha 0.3": run("b", aux="lora")}
    assert names(seeds) == list(seeds)


# ---- the numbers

@pytest.mark.parametrize("kind", ["scores", "wordings", "attack", "fig1"])
def test_percentages_stay_inside_0_and_100(kind, figures):
    axis = figures[kind].axes[0]
    assert 0 <= axis.get_ylim()[0] < axis.get_ylim()[1] <= 100
    ends = [y for bars in axis.collections for bar in bars.get_segments() for _, y in bar]
    assert len(ends) > 8 and 0 <= min(ends) and max(ends) <= 100
    if kind == "fig1":
        assert 0 <= axis.get_xlim()[0] < axis.get_xlim()[1] <= 100
        across = [x for bars in axis.collections for bar in bars.get_segments() for x, _ in bar]
        assert 0 <= min(across) and max(across) <= 100


def test_no_whisker_reaches_the_zero_of_a_logarithmic_axis(figures):
    axis = figures["scores"].axes[1]
    assert axis.get_yscale() == "log"
    ends = [y for bars in axis.collections for bar in bars.get_segments() for _, y in bar]
    assert min(ends) > 0.99 * axis.get_ylim()[0]


def test_means_whiskers_and_single_seeds_are_the_numbers_given(figures):
    columns = five_methods()
    given, axis = measured("attack", columns), figures["attack"].axes[0]
    for name, runs in columns.items():
        color = drawing.STYLES[name][0]
        [points] = means(axis, color)
        at_five = [100 * given[run.name][2].value for run in runs]
        assert points[2][1] == pytest.approx(mean_sd(at_five)[0])
        singles = faint(axis, color)
        assert len(singles) == (3 if name != "base" else 0), "one seed alone is no faint point"
        assert sorted(line.get_ydata()[2] for line in singles) == pytest.approx(
            sorted(at_five) if singles else [])
        assert all(line.get_markersize() < 3 for line in singles)
    lora = [100 * given[run.name][1].value for run in columns["LfU-lora"]]
    mean, sd, _ = mean_sd(lora)
    bars = [bar for bars in axis.collections for bar in bars.get_segments()
            if to_hex(bars.get_color()[0]) == drawing.STYLES["LfU-lora"][0].lower()]
    assert [y for _, y in bars[1]] == pytest.approx([max(0, mean - sd), min(100, mean + sd)])


@pytest.mark.parametrize("kind", ["scores", "attack", "noise"])
def test_whiskers_of_different_methods_stand_side_by_side(kind, figures):
    axis = figures[kind].axes[0]
    places = [[round(point[0], 6) for point in means(axis, drawing.STYLES[name][0])[0]]
              for name in FIVE]
    assert len({x for row in places for x in row}) == sum(map(len, places))
    for row in zip(*places):  # of one group: around it, closer than to the next one
        assert max(row) - min(row) < 0.8 and abs(sum(row) / 5 - round(sum(row) / 5)) < 1e-4


# ---- noise: paired differences

def noise_with_differences(seeds):
    """Layers 0-2, two examples; every run meets the same noise, and LfU is a little better."""
    columns = {name: runs for name, runs in five_methods(seeds).items()
               if name in ("base", "SFT", "LfU-lora")}
    runs = [run for members in columns.values() for run in members]
    gains = {0: (0.001, 0.003), 1: (0.002, 0.006), 2: (0.006, 0.006)}  # of the examples, by seed
    by_run, examples = {}, {}
    for run in runs:
        seed = run.settings.get("seed", 0)
        rows = [[0.95 + 0.01 * i + 0.005 * seed + (gains[seed][i] if "lora" in run.name else 0)] * 3
                for i in range(2)]
        examples[run.name] = {"noise": [dict(cosine=row) for row in rows]}
        by_run[run.name] = robustness.cosines(zip(*rows))
    robustness.add_differences(by_run, examples, runs)
    return by_run, columns


def difference_panel(seeds, path):
    by_run, columns = noise_with_differences(seeds)
    fig = pictures.results(path / "noise.png", {"noise": by_run}, columns)
    assert fig.get_figwidth() == 6.8 and len(fig.axes) == 2
    return fig.axes[1], drawing.STYLES["LfU-lora"][0]


@pytest.mark.slow
def test_the_paired_difference_over_examples_has_its_own_error(tmp_path):
    axis, color = difference_panel((0,), tmp_path)
    [points] = means(axis, color)
    assert [x for x, _ in points] == pytest.approx([1, 2]), "layer 0 is left out"
    assert [y for _, y in points] == pytest.approx([0.002, 0.002])  # of 0.001 and 0.003
    [bars] = axis.collections  # LfU-lora's alone: neither base nor SFT
    error = 0.001  # sd 0.002 / sqrt 2, over sqrt 2; the curves' own is 0.005 and more
    assert [y for _, y in bars.get_segments()[0]] == pytest.approx([0.002 - error, 0.002 + error])
    assert not faint(axis, color)


@pytest.mark.slow
def test_the_paired_difference_over_seeds_has_its_own_error(tmp_path):
    axis, color = difference_panel((0, 1, 2), tmp_path)
    [points] = means(axis, color)
    assert points[0][1] == pytest.approx(0.004)  # of 0.002, 0.004 and 0.006
    error = 0.002 / math.sqrt(3)  # the seeds' own levels are 0.005 apart
    low, high = (y for _, y in axis.collections[0].get_segments()[0])
    assert (low, high) == pytest.approx((0.004 - error, 0.004 + error))
    assert sorted(line.get_ydata()[0] for line in faint(axis, color)) == pytest.approx(
        [0.002, 0.004, 0.006])


@pytest.mark.slow
def test_zero_is_a_line_that_is_called_sft(tmp_path):
    axis, _ = difference_panel((0, 1), tmp_path)
    zero = [line for line in axis.lines if len(line.get_ydata()) == 2 and not any(line.get_ydata())]
    assert [to_hex(line.get_color()) for line in zero] == [drawing.STYLES["SFT"][0].lower()]
    assert sorted(text.get_text() for text in axis.texts) == ["LfU-lora", "SFT"]


# ---- names

@pytest.mark.slow
def test_names_beside_lines_keep_their_distance_or_become_a_legend(tmp_path):
    """Four noise curves: names at the right ends, pushed apart; attack curves that all end at 100
    %: a legend."""
    by_run, columns = noise_with_differences((0,))
    fig = pictures.results(tmp_path / "noise.png", {"noise": by_run}, columns)
    axis = fig.axes[0]
    assert not fig.legends and {t.get_text() for t in axis.texts} == set(columns)
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert all(low.y1 - 0.35 * low.height <= high.y0 for low, high in zip(boxes, boxes[1:]))
    columns = five_methods()
    same = {run.name: [Result(f"attack, {s} steps", "compliance", s / 9, 0.1, 9) for s in (0, 9)]
            for runs in columns.values() for run in runs}
    fig = pictures.results(tmp_path / "attack.png", {"attack": same}, columns)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == list(columns)
    assert not fig.axes[0].texts


def test_labels_that_want_one_place_are_stacked_around_it():
    fig = matplotlib.figure.Figure((1, 1), dpi=72)
    axis = fig.add_axes((0, 0, 1, 1), ylim=(0, 72))  # one unit is one point
    assert drawing.moved_apart(axis, [30, 30, 30]) == pytest.approx([-9, 0, 9])
    assert drawing.moved_apart(axis, [30, 10, 36]) == pytest.approx([-1.5, 0, 1.5])
    assert drawing.moved_apart(axis, [30] * 5) == [], "too far from their lines"
    assert drawing.moved_apart(axis, []) == []


# ---- the trade-off of a sweep

def test_the_tradeoff_shows_means_seeds_the_base_and_learning_rates(figures):
    fig, by = figures["fig1"], swept()
    [axis] = fig.axes
    assert means(axis, drawing.STYLES["base"][0]) == [[[0.0, 99.0]]]
    [line] = means(axis, drawing.STYLES["SFT"][0])
    given = sorted([mean_sd([row[column] for row in by[f"SFT lr={lr}"]])[0]
                    for column in ("word problems", "category mean")] for lr in ("1e-3", "2e-3"))
    assert line == [pytest.approx(point) for point in given]
    assert sum(len(one.get_xdata()) for one in faint(axis, drawing.STYLES["SFT"][0])) == 6
    assert sorted(text.get_text() for text in axis.texts if text.get_text()) == (
        4 * ["lr=1e-3"] + 2 * ["lr=2e-3"])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "base", "SFT", "LfU-lora", "LfU-inplace", "LfU-reps"]


def test_labels_of_points_do_not_cover_each_other(figures):
    [axis] = figures["fig1"].axes
    boxes = [text.get_window_extent().shrunk(0.95, 0.6) for text in axis.texts if text.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
