"""Claim: lfu_min.paper.reproduce tunes every method alike, by the rule that is written down, runs
nothing twice, and its pages say what was measured: means, paired differences, intervals."""
from concurrent.futures import Future
from functools import partial
import json
import math
import os
from pathlib import Path
import shutil
import signal
from statistics import mean, stdev
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from lfu_min.bundled import BUNDLED, CATEGORIES
from lfu_min.engine import system
from lfu_min.engine.system import ROOT
from lfu_min.files import data, jsons
from lfu_min.files.checkpoint import load_model
from lfu_min.lora import aux_lora
from lfu_min.paper import grid, jobs, measures, report, reproduce
from lfu_min.paper.experiments import EXPERIMENTS
from lfu_min.training.folder import locked
from lfu_min.training.settings import get_settings
from test_eval_robustness import run  # noqa: F401  (a fixture)

TUNED = {method: {"best": grid.settings(method)[-1], "frontier": [
    s for s in grid.settings(method) if s["lr"] in grid.RATES][-3:]} for method in grid.METHODS}


# ---- the grid and the rule

def test_every_method_has_nine_settings_at_the_same_learning_rates():
    for method in grid.METHODS:
        settings = grid.settings(method)
        assert len({json.dumps(s) for s in settings}) == 9
        assert set(grid.RATES) <= {s["lr"] for s in settings}
        if grid.METHODS[method].strength:
            assert {s["lr"] for s in settings} == set(grid.RATES)
    assert not set(grid.TUNING_SEEDS) & set(grid.SEEDS), "seeds that chose are used nowhere else"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_train_py_takes_every_setting(name):
    """No row of any experiment has a flag or value that train.py refuses."""
    for row, setting in EXPERIMENTS[name].rows(TUNED).items():
        flags = {k: v for k, v in setting.items() if k not in ("data", "examples", "stream")}
        assert get_settings(jobs.as_flags(flags)).lr == float(setting["lr"]), row


def test_hypervolume_is_the_share_of_a_fine_grid_of_points():
    points = [(30.0, 50.0), (40.0, 20.0), (10.0, 90.0), (20.0, 40.0)]  # the last adds nothing
    cells = [(x + 0.5, y + 0.5) for x in range(100) for y in range(100)]
    inside = sum(any(x < a and y < b for a, b in points) for x, y in cells)
    assert grid.hypervolume(points) == pytest.approx(inside / 1e4)
    assert grid.hypervolume(points[:3]) == grid.hypervolume(points)
    assert grid.hypervolume([]) == 0


def test_the_rule_takes_the_best_in_domain_and_the_largest_area():
    points = [({"alpha": a, "lr": lr}, x, y) for a, lr, x, y in [
        ("0.03", "1.5e-3", 10, 90), ("0.03", "3e-3", 20, 80), ("0.03", "5e-3", 30, 60),
        ("0.1", "1.5e-3", 5, 50), ("0.1", "3e-3", 31, 20), ("0.1", "5e-3", 31, 30)]]
    chosen = grid.choose({"LfU-lora": points})["LfU-lora"]
    assert chosen["best"] == {"alpha": "0.1", "lr": "5e-3"}, "in a tie, what keeps more"
    assert [s["alpha"] for s in chosen["frontier"]] == ["0.03"] * 3
    sft = [({"lr": lr}, x, y) for lr, x, y in [("7e-3", 99, 99), ("1.5e-3", 10, 90),
                                               ("3e-3", 20, 80), ("5e-3", 30, 60)]]
    chosen = grid.choose({"SFT": sft})["SFT"]
    assert chosen["best"] == {"lr": "7e-3"}
    assert [s["lr"] for s in chosen["frontier"]] == list(grid.RATES), "the shared rates alone"


# ---- examples, wordings, measures

def test_methods_draw_the_same_examples_and_seeds_draw_others(tmp_path):
    files = [reproduce.subset(tmp_path, "word_problems_train", 16, seed) for seed in (0, 1)]
    rows = [[row for _, row in jsons.read_records(file)] for file in files]
    assert len(rows[0]) == 16 and rows[0] != rows[1]
    every = [row for _, row in jsons.read_records(reproduce.TRAIN)]
    (tmp_path / "sdft.json").write_text(json.dumps(
        [dict(row, answer=f"another {i}") for i, row in enumerate(every)]))
    rewritten = data.read_examples(reproduce.subset(tmp_path, "sdft", 16, 0))
    assert [e.prompt for e in rewritten] == [row["question"] for row in rows[0]]
    assert all(e.answer.startswith("another") for e in rewritten)


def test_a_job_names_its_data_steps_and_folder(tmp_path):
    setting = {"aux": "reps", "lr": "3e-3", "examples": 32}
    flags, folder, chosen = reproduce.job(setting, 3, ("scores_test",), tmp_path)
    assert flags["seed"] == 3 and flags["max-steps"] == 160 and flags["batch-size"] == 8
    assert len(data.read_examples(flags["data"])) == 32 and "examples" not in flags
    assert folder.name == (
        "aux=reps batch-size=8 data=word_problems_train examples=32 lr=3e-3 max-steps=160 seed=3")
    other = reproduce.job(setting | {"lr": "5e-3"}, 3, (), tmp_path)
    assert other[0]["data"] == flags["data"] and other[1] != folder
    assert reproduce.job(None, 0, (), tmp_path)[0] is None


def test_a_word_problem_keeps_its_story_in_every_wording():
    for example in data.read_examples(BUNDLED / "data" / "word_problems_test.jsonl"):
        story = example.prompt[:example.prompt.index(" How many")]
        asked = {name: measures.reworded(example, name) for name in measures.WORDINGS}
        assert asked["trained"] == example
        assert len({e.prompt for e in asked.values()}) == len(asked)
        assert all(story in e.prompt and e.answer == example.answer for e in asked.values())
    with pytest.raises(ValueError, match="no word problem: 'What is 3"):
        measures.reworded(data.Example("What is 3 + 4?", "7"), "tell")


@pytest.mark.slow
def test_the_measures_of_a_run(run):
    """All measures once: columns of the tables are there, and the margin falls under attack."""
    with open(run / "log.jsonl", "w") as log:
        for step in range(1, 21):
            record = dict(sft=1 / step, consistency=0.1, consistency_share=0.5, gradient_cosine=0.3,
                          movement=[0.01, 0.02 * step])
            log.write(json.dumps(record) + "\n")
    found = {}
    for name, measure in measures.MEASURES.items():
        if name.endswith("_test") or name.startswith("worsened"):
            found |= measure(run)
    for name, experiment in EXPERIMENTS.items():
        assert set(experiment.columns) <= found.keys(), name
    assert found["train loss"] == pytest.approx((1 / 19 + 1 / 20) / 2), "the last tenth"
    assert found["first movement"] == 0.02
    assert found["margin 0"] > found["margin 20"] > found["margin 60"]
    wordings = [found[name] for name in measures.WORDINGS]
    assert found["mean over wordings"] == pytest.approx(mean(wordings))
    assert found["sd over wordings"] == pytest.approx(stdev(wordings))
    assert found["trained"] == pytest.approx(found["word problems"]), "the same questions"
    assert measures.log(None) == {}


def test_worsened_is_its_definition(monkeypatch):
    """By torch's own functions, on the base: B moved along the gradient of the word problems, the
    mean over auxiliary LoRAs, the layer that moves most, the mean over the other categories."""
    monkeypatch.setattr(measures, "QUESTIONS", 3)
    monkeypatch.setattr(measures, "DRAWS", 2)
    found = measures.worsened(None)
    model, tokenizer = measures.loaded(None)

    def look(name):
        examples = [data.encode_example(tokenizer, e) for e in data.read_examples(
            BUNDLED / "data" / f"{name}_validation.jsonl")[:3]]
        sums, rows = [], []
        for ids, labels in examples:
            states = model.hidden_states(torch.tensor([ids]))
            logits, targets = model.lm_head(states[-1])[0, :-1], torch.tensor(labels[1:])
            sums.append(F.cross_entropy(logits, targets, reduction="sum"))
            rows.append([h[0, :-1][targets != -100] for h in states[1:]])
        count = sum(map(len, (row[0] for row in rows)))
        return sum(sums) / count, [torch.cat(layer) for layer in zip(*rows)]
    expected = {}
    for draw in range(2):
        with aux_lora(model, torch.Generator().manual_seed(draw)) as th_aux:
            before = {name: look(name) for name in ("word_problems", *CATEGORIES)}
            g = torch.autograd.grad(before["word_problems"][0], th_aux)
            norm = sum((x ** 2).sum() for x in g) ** 0.5
            with torch.no_grad():
                for tensor, x in zip(th_aux, g):
                    tensor += 0.1 * x / norm
                for name, (loss, h) in before.items():
                    after, h_aux = look(name)
                    moved = max(((b - a) ** 2).sum() / (a ** 2).sum() for a, b in zip(h, h_aux))
                    own = "own" if name == "word_problems" else "other"
                    expected.setdefault(f"{own} movement", []).append(moved.item() ** 0.5)
                    expected.setdefault(f"{own} loss rise", []).append((after - loss).item())
    assert found.keys() == expected.keys() and len(expected["other movement"]) == 8
    assert found == {name: pytest.approx(mean(values), rel=1e-3, abs=1e-6)
                     for name, values in expected.items()}


# ---- pages

def test_the_interval_is_students():
    differences = [1.0, 2.0, 4.0, 3.0, 5.0]
    m, half = report.interval(differences)
    assert m == 3.0 and half == pytest.approx(2.776 * stdev(differences) / math.sqrt(5))
    assert math.isnan(report.interval([1.0])[1])
    # the table itself: the integral of the density of t over +-T95 is 0.95
    for df in range(1, len(report.T95)):
        x = torch.linspace(0, report.T95[df], 200_001, dtype=torch.float64)
        log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
        density = torch.exp(log_c - (df + 1) / 2 * torch.log1p(x ** 2 / df))
        assert 2 * torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=1e-4), df


def numbers(experiment, row, seed):
    """Made-up numbers: SFT has 10 + seed everywhere, others 1.5 more, but for a little, and all
    layers, wordings and steps that a figure draws."""
    value = 10 + seed + (0 if row.startswith("SFT") else 1.5 + 1e-6 * seed)
    extra = [f"{metric} {step}" for metric in ("compliance", "margin")
             for step in measures.ATTACK_STEPS] if "attack_test" in experiment.measures else []
    return {column: value for column in (*experiment.columns, *extra)}


def faked(monkeypatch, experiment):
    def found(todo, *arguments, **others):
        return {key: numbers(experiment, "base" if key == "base" else key[0],
                             0 if key == "base" else key[1]) for key in todo}
    monkeypatch.setattr(reproduce.jobs, "all_measured", found)
    monkeypatch.setattr(reproduce.jobs, "machines", lambda todo, record: ["a loom"])
    monkeypatch.setattr(reproduce, "tuned", lambda: TUNED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_page_has_means_and_paired_differences(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    experiment = EXPERIMENTS[name]
    faked(monkeypatch, experiment)
    where = ["--runs", str(tmp_path), "--out", str(tmp_path)]
    two = reproduce.main([name, "--seeds", "0,1", *where])[name]
    assert f"reproduce {name} --seeds 0,1\n" in two and "Seeds 0, 1;" in two
    text = reproduce.main([name, *where])[name]
    assert (tmp_path / f"{name}.md").read_text() == text
    assert f"python -m lfu_min.paper.reproduce {name}\n" in text and "on a loom.\n" in text
    first = report.digits(experiment.columns[0])
    lfu = [line for line in text.splitlines() if line.startswith("| LfU-lora")]
    assert f"| {11.5 + mean(experiment.seeds):.{first}f} ± " in lfu[0], "mean of 11.5, 12.5, ..."
    assert all(f"\n- {row}: {next(iter(setting))} " in text
               for row, setting in experiment.rows(TUNED).items()), "the settings"
    pair = next(line for line in lfu if "| +" in line)
    assert f"| {1.5:+.{first}f} ± {0:.{first}f}*" in pair, "the same difference in every seed"
    assert (tmp_path / f"{name}.png").is_file() == bool(experiment.figure)


def test_a_row_is_compared_with_sft_on_its_own_examples():
    by = dict.fromkeys(("base", "SFT n=16", "LfU-lora n=16", "SFT n=32", "LfU-lora n=32"))
    assert report.reference("LfU-lora n=32", by) == "SFT n=32"
    assert report.reference("SFT n=32", by) is None and report.reference("base", by) is None
    assert report.reference("alpha 0.3", {"SFT": []}) == "SFT"
    assert report.reference("logit KL n=32", by) == "SFT n=32", "a name of two words"
    by = dict.fromkeys(("SFT n=16", "LfU-reps n=16", "same-rate-SFT n=16", "LfU-reps n=64"))
    assert report.pairs(by) == [
        ("LfU-reps n=16", "LfU-reps n=16", "SFT n=16"),
        ("same-rate-SFT n=16", "same-rate-SFT n=16", "SFT n=16"),
        ("LfU-reps n=16, to same-rate-SFT", "LfU-reps n=16", "same-rate-SFT n=16")]
    assert report.pairs({"SFT": 0, "LfU": 0, "random": 0}, ("LfU",)) == [
        ("LfU", "LfU", "SFT"), ("random", "random", "SFT"), ("random, to LfU", "random", "LfU")]
    assert report.reference("LfU stream=bf16", {"LfU": 0, "LfU stream=bf16": 0}, "LfU") == "LfU"


def test_a_difference_without_an_interval_has_no_star():
    assert report.difference([1.0, 2.0, 3.0], 1) == "+2.0 ± 2.5"
    assert report.difference([1.5, 2.0, 2.5], 1) == "+2.0 ± 1.2*"
    assert report.difference([-1.0, -1.0], 1) == "-1.0 ± 0.0", "equal by chance is not certain"
    assert report.difference([2.0], 1) == "+2.0"
    by = {f"{method} lr={lr}": [{"word problems": 50.0, "category mean": 50.0}]
          for method in ("SFT", "LfU-lora") for lr in (1, 2)}
    assert "nan" not in "\n".join(report.areas(by)), "of one seed"


def test_what_sft_has_not_is_no_zero_on_the_page():
    numbers = {"consistency_share": 0.0, "word problems": 0.0}
    assert report.cell([numbers], "consistency_share") == "-"
    assert report.cell([numbers], "word problems") == "0.0"
    assert report.cell([{"first movement": 0.00042}], "first movement") == "0.0004"


def test_tune_writes_what_the_rule_chose(tmp_path, monkeypatch):
    def found(todo, *arguments, **others):
        assert len(todo) == 9 * len(grid.METHODS) * len(grid.TUNING_SEEDS)
        return {((method, i), seed): {"word problems": i + seed, "category mean": 50.0}
                for (method, i), seed in todo}
    monkeypatch.setattr(reproduce.jobs, "all_measured", found)
    monkeypatch.setattr(reproduce, "TUNED", tmp_path / "tuned.json")
    every = [row for _, row in jsons.read_records(reproduce.TRAIN)]
    (tmp_path / "sdft.json").write_text(json.dumps(every))  # to make it takes a while
    text = reproduce.main(["tune", "--runs", str(tmp_path), "--out", str(tmp_path)])["tune"]
    chosen = json.loads((tmp_path / "tuned.json").read_text())
    assert chosen == {method: {"best": grid.settings(method)[-1],
                               "frontier": reproduce.tuned()[method]["frontier"]}
                      for method in grid.METHODS}
    assert text.count("best") >= len(grid.METHODS)


def test_the_page_of_tune_names_what_was_chosen_at_an_edge():
    middle = {name: {"best": settings[4], "frontier": [settings[4]]} for name in grid.METHODS
              for settings in [grid.settings(name)]}
    assert report.edges(middle) == []
    settings = grid.settings("SAM")  # by rho, then by learning rate
    assert report.edges(middle | {"SAM": {"best": settings[8], "frontier": settings[:3]}}) == [
        "SAM lr 5e-3", "SAM rho 0.2", "SAM rho 0.02"]
    assert report.edges(middle | {"SFT": {"best": {"lr": "7e-3"}, "frontier": [{"lr": "1.5e-3"}]}}
                        ) == ["SFT lr 7e-3"]


def test_the_rule_takes_the_alpha_that_moves_as_much(tmp_path, monkeypatch):
    assert grid.nearest(0.02, {"a": 0.009, "b": 0.05, "c": 0.041}) == "c", "nearest as a ratio"
    scale = {"LfU-lora": 1.0, "LfU-reps": 0.1, "LfU-inplace": 10.0}

    def found(todo, *arguments, **others):
        return {((method, i), seed): {
            "word problems": 50.0 if i // 3 == 1 else 40.0, "category mean": 50.0,
            "first movement": scale[method] * float(grid.settings(method)[i]["alpha"]) / 10,
            "consistency_share": 0.5, "gradient_cosine": 0.25} for (method, i), seed in todo}
    monkeypatch.setattr(reproduce.jobs, "all_measured", found)
    text = reproduce.main(["rule", "--runs", str(tmp_path), "--out", str(tmp_path)])["rule"]
    assert "by 1.00 %" in text
    assert "| LfU-lora | 0.1 | 1.00 | 0.50 | 0.25 | 0.250 | largest, predicted |" in text
    assert "| LfU-reps | 1 | 1.00 | 0.50 | 0.25 | 0.200 | predicted |" in text
    assert "| LfU-inplace | 0.03 | 3.00 | 0.50 | 0.25 | 0.200 | predicted |" in text


def test_table2_is_the_real_models_page_from_the_record(tmp_path, capsys):
    """Nothing is run for it, and no model or data is asked for."""
    with pytest.raises(ValueError, match="measured.jsonl has runs of no model: name one"):
        reproduce.main(["table2", "--out", str(tmp_path)])
    shutil.copy(ROOT / "docs" / "results" / jobs.RECORD, tmp_path)
    text = reproduce.main(["table2", "--out", str(tmp_path)])["table2"]
    assert capsys.readouterr().out.count(text) == 1
    assert (tmp_path / "real_dolly.md").read_text() == text
    committed = (ROOT / "docs" / "results" / "real_dolly.md").read_text()
    assert text == committed and "| LfU-lora |" in text


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'table9': choose from tune, rule, table2, fig1"):
        reproduce.main(["tune", "table9", "--out", str(tmp_path / "new")])
    for wrong in ("a,b", "0,", "1,1", "-1"):
        with pytest.raises(ValueError, match="--seeds.* should be different whole numbers"):
            reproduce.main(["fig1", f"--seeds={wrong}", "--out", str(tmp_path / "new")])
    with pytest.raises(ValueError, match="--jobs 0 should be a positive number"):
        reproduce.main(["fig1", "--jobs", "0", "--out", str(tmp_path / "new")])
    with pytest.raises(ValueError, match=r"tune and rule have seeds of their own, \(100, 101\)"):
        reproduce.main(["fig1", "rule", "--seeds", "0,1", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(reproduce, "TUNED", tmp_path / "tuned.json")
    with pytest.raises(ValueError, match="reproduce tune comes first"):
        reproduce.main(["table1", "--out", str(tmp_path), "--runs", str(tmp_path)])


@pytest.fixture
def script(tmp_path, monkeypatch):
    """train.py's place: a list of the flags that it was called with."""
    trained = []

    class Script:
        def main(flags):
            trained.append(flags)
            Path(flags[flags.index("--out") + 1]).mkdir()
    monkeypatch.setattr(jobs, "train_script", lambda: Script)
    return trained


def constant(run, name):
    return {name: 1.0}


def two_measures():
    return ({name: partial(constant, name=name)} for name in ("a", "b"))


def test_a_setting_may_be_measured_more_without_training_again(tmp_path, script):
    one, two = two_measures()
    jobs.measured({"lr": 1}, tmp_path, one)
    found = jobs.measured({"lr": 1}, tmp_path, one | two)
    assert {name: row["numbers"] for name, row in found.items()} == {"a": {"a": 1.0},
                                                                    "b": {"b": 1.0}}
    assert len(script) == 1


def test_a_stream_in_bfloat16_is_rounded_in_training(tmp_path):
    """Behind every block, forward and backward; train.py's own stream is float32."""
    batch = {"max-steps": 1, "batch-size": 2, "aux": "none"}
    losses = []
    for name, more in (("own", {}), ("rounded", {"stream": "bf16"})):
        run = jobs.trained(batch | more, tmp_path / name)
        losses.append(json.loads((run / "log.jsonl").read_text())["sft"])
    assert 0 < abs(losses[0] - losses[1]) < 0.1
    model, ids = load_model(BUNDLED), torch.arange(8)[None]
    own, behind = model.hidden_states(ids), []
    model.model.layers[0].register_forward_hook(lambda block, x, h: behind.append(h))
    hooks = jobs.round_stream(model, torch.bfloat16)
    states = model.hidden_states(ids)
    for a, b in zip(own[1:-1], states[1:-1]):
        assert torch.equal(b, b.bfloat16().float()) and not torch.equal(a, a.bfloat16().float())
        assert torch.allclose(a, b, rtol=0.1, atol=0.1)
    grad, = torch.autograd.grad(states[-1].square().sum(), behind)
    assert grad.any() and torch.equal(grad, grad.bfloat16().float())
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(own, model.hidden_states(ids)))


def killed(run):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="the process of a run was killed.*give the command again"):
        jobs.all_measured({"a": (None, tmp_path / "a", {"m": killed})}, 1)


class InThisProcess:
    """ProcessPoolExecutor's place."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future


def test_what_is_recorded_is_not_run_again(tmp_path, script, monkeypatch):
    """And a run that two rows share is made once."""
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", InThisProcess)
    (one, two), record = two_measures(), tmp_path / "out" / "measured.jsonl"
    todo = {"usual": ({"lr": 1}, tmp_path / "lr=1", one), "again": ({"lr": 1}, tmp_path / "lr=1",
                                                                    two),
            "other": ({"lr": 2}, tmp_path / "lr=2", one)}
    assert len(jobs.missing(todo, record)) == 2
    assert jobs.estimate(jobs.missing(todo, record), record, 2) == (
        "how long they take is not known yet")
    expected = {"usual": {"a": 1.0}, "again": {"b": 1.0}, "other": {"a": 1.0}}
    assert jobs.all_measured(todo, 2, record=record) == expected
    assert len(script) == 2
    rows = [row for _, row in jsons.read_records(record)]
    assert sorted((row["run"], row["measure"]) for row in rows) == [
        ("lr=1", "a"), ("lr=1", "b"), ("lr=2", "a")]
    assert all(row["numbers"] == {row["measure"]: 1.0} for row in rows)
    assert jobs.machines(todo, record) == [system.machine()] and "cores" in system.machine()
    for folder in ("lr=1", "lr=2"):
        shutil.rmtree(tmp_path / folder)
    assert jobs.all_measured(todo, 2, record=record) == expected and len(script) == 2
    assert len(list(jsons.read_records(record))) == 3, "and nothing is noted twice"
    record.write_text("".join(json.dumps(row | {"seconds": 90}) + "\n" for row in rows))
    more = {"third": ({"lr": 3}, tmp_path / "lr=3", one | {"b": None})}
    assert jobs.estimate(jobs.missing(more, record), record, 2) == "about 1 min 30 s"
    more["third"][2]["never seen"] = None  # as long as others take
    assert jobs.estimate(jobs.missing(more, record), record, 2) == "about 2 min 15 s"


def diverges(run):
    raise ValueError("step 3: the loss is not finite")


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", InThisProcess)
    record = tmp_path / "measured.jsonl"
    todo = {name: (None, tmp_path / name, {"m": measure}) for name, measure in (
        ("a", lambda run: {"x": 1.0}), ("b", diverges), ("c", lambda run: {"x": 3.0}))}
    with pytest.raises(ValueError, match="1 of 3 runs failed, the others are kept; b: step 3: the"):
        jobs.all_measured(todo, 1, record=record)
    assert sorted(run for run, _ in jobs.recorded(record)) == ["a", "c"]
    assert [line.split()[1:3] for line in capsys.readouterr().err.splitlines()
            if "FAILED" in line] == [["b", "FAILED"]]
    del todo["b"]
    assert jobs.all_measured(todo, 1, record=record) == {"a": {"x": 1.0}, "c": {"x": 3.0}}


@pytest.mark.parametrize("change", [{"run": None}, {"run": ["a"]}, {"seconds": "3"},
                                    {"numbers": None}, {"numbers": {"a": "1"}}])
def test_a_damaged_line_of_the_record_is_named(change, tmp_path):
    line = {"run": "a", "measure": "b", "numbers": {"c": 1.0}, "seconds": 3, "machine": "a loom"}
    record = tmp_path / "measured.jsonl"
    record.write_text(json.dumps(line) + "\n")
    assert jobs.recorded(record)["a", "b"]["numbers"] == {"c": 1.0}
    record.write_text(json.dumps(line | {"numbers": {"c": None, "d": 2.0}}) + "\n")
    todo = {"row": (None, tmp_path / "a", {"b": None})}
    assert jobs.all_measured(todo, 1, record=record) == {"row": {"d": 2.0}}, "not finite: left out"
    record.write_text(json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    with pytest.raises(ValueError, match="measured.jsonl, line 2: a line of the record has a run"):
        jobs.recorded(record)


def test_a_run_that_another_process_makes_is_left_alone(tmp_path, script):
    with locked(tmp_path), pytest.raises(ValueError, match="is in use"):
        jobs.trained({"lr": 1}, tmp_path)
    assert not script


@pytest.mark.slow
@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_every_run_with_a_checkpoint_and_starts_no_other(sent, status, tmp_path):
    """SIGTERM to the main process, Ctrl-C to all of them. Two at one time and more to come: both
    end soon (they hold the standard error that communicate() reads to its end), no other begins."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lfu_min.paper.reproduce", "fig1", "--seeds", "0", "--jobs", "2",
         "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    steps = lambda: sorted((tmp_path / "runs").glob("*/run/log.jsonl"))
    until = time.time() + 120
    while sum(file.stat().st_size > 0 for file in steps()) < 2 and time.time() < until:
        time.sleep(0.1)  # before a step is done there is nothing to keep
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == status
    assert len(steps()) == 2 and not list((tmp_path / "runs").glob("*/trained"))
    assert all(list(file.parent.glob("checkpoints/step-*")) for file in steps())
