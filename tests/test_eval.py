"""Claim: eval.py measures what it says, writes JSON from which every number can be recomputed,
draws its pictures, and answers bad input with one line and exit status 2 before anything slow
starts. Runs the script's main() on the bundled model with a few examples; how good the model is
does not matter here.
"""
import gc
import importlib.util
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest

from lfu_min.bundled import BUNDLED
from lfu_min.engine.system import ROOT
from lfu_min.files import hashes, jsons
from lfu_min.scoring import categories, runs as models, tables, tasks
from lfu_min.scoring.measures import Result
from lfu_min.scoring.runs import Run
from test_eval_robustness import contents, run  # noqa: F401  (run is a fixture)

sys.path.insert(0, str(ROOT))
import eval as script

PROBLEMS = BUNDLED / "data" / "word_problems_test.jsonl"


def recomputed(outputs, metric):
    values = {"exact_match": lambda o: o["match"], "compliance": lambda o: o["complied"],
              "not refused": lambda o: not o["refused"], "coherent": lambda o: o["coherent"]}
    if metric == "nll":
        return sum(o["nats"] for o in outputs) / sum(o["tokens"] for o in outputs)
    return sum(map(values[metric], outputs)) / len(outputs)


def picture(folder):
    """The flags that ask for a picture, where matplotlib (requirements-dev.txt) is installed."""
    return ["--plot", str(folder / "out.png")] if importlib.util.find_spec("matplotlib") else []


def drawn(folder):
    return not picture(folder) or all((folder / f"out.{kind}").stat().st_size > 8_000
                                      for kind in ("png", "pdf"))


def a_run_like(run, folder, **changes):
    """A copy of a run folder with other settings."""
    shutil.copytree(run, folder)
    settings = json.loads((run / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.slow
def test_the_bundled_table_and_a_run_beside_its_base(run, tmp_path, capsys):
    files = contents(run)
    flat = script.main([str(run), "--limit", "3", "--max-new-tokens", "12", "--batch-size", "64",
                        "--json", str(tmp_path / "out.json"), *picture(tmp_path)])
    out = json.loads((tmp_path / "out.json").read_text())
    assert len(out["results"]) == len(flat)
    assert set(out["results"][0]) == {"run", "task", "metric", "value", "stderr", "n"}
    assert {r["run"] for r in flat} == {"base", str(run)}
    assert {r["task"] for r in flat} == {"word problems", *categories.CATEGORIES, "category mean",
                                         "mean rank"}
    outputs = {(e["run"], e["task"]): e["outputs"] for e in out["examples"]}
    for r in out["results"]:
        if (r["run"], r["task"]) in outputs:
            expected = recomputed(outputs[r["run"], r["task"]], r["metric"])
            assert r["value"] == pytest.approx(expected) and r["n"] == 3
    assert [r["stderr"] for r in out["results"] if r["metric"] == "rank"] == [None, None]
    shown = capsys.readouterr().out
    assert "word problems" in shown and "(LfU-lora): word problems" in shown and "±" in shown
    assert drawn(tmp_path)
    assert contents(run) == files, "the run's files stay as they were"


def test_category_mean_and_ranks_by_hand():
    exact = lambda **values: [Result(task, "exact_match", v, 0.1, 10) for task, v in values.items()]
    by_run = {"a": exact(math=0.9, knowledge=0.5, reasoning=0.2, helpfulness=0.1),
              "b": exact(math=0.8, knowledge=0.5, reasoning=0.3, helpfulness=0.1),
              "c": exact(math=0.7, knowledge=0.6, reasoning=0.1, helpfulness=0.1)}
    mean = categories.mean_of(by_run["a"])
    assert mean == ("category mean", "exact_match", pytest.approx(1.7 / 4), 0.05, 40)
    categories.add_ranks(by_run)
    # math 1 2 3, knowledge 2.5 2.5 1, reasoning 2 1 3, helpfulness 2 2 2
    assert [by_run[k][-1].value for k in "abc"] == [7.5 / 4, 7.5 / 4, 9 / 4]


def test_the_verdict_by_hand():
    """Two questions a category: base right in both; SFT keeps none, LfU one of two in math."""
    none, one, both = ([dict(match=i < right) for i in range(2)] for right in range(3))
    cats = dict.fromkeys(categories.CATEGORIES, none)
    examples = {"base": dict.fromkeys(cats, both) | {"word problems": none},
                "s": cats | {"word problems": both},
                "l": cats | {"word problems": one, "math": one}}
    runs = [Run("base"), Run("s", "s", dict(aux="none")), Run("l", "l", dict(aux="reps", lam=5.0))]
    told = tables.verdict(examples, runs).splitlines()
    assert told == [
        "s (SFT): word problems +100.0 ± 0.0 points, other categories -100.0 ± 0.0",
        "l (LfU-reps): word problems +50.0 ± 50.0 points, other categories -87.5 ± 12.5",
        "LfU against SFT, means over 1 and 1 runs: word problems -50.0 ± 50.0 points, other "
        "categories +12.5 ± 12.5 (errors over questions, not over seeds): too small a difference "
        "to say whether LfU forgets less."]


@pytest.mark.parametrize("learned, kept, words", [
    ((1.0, 2.0), (9.0, 2.0), "LfU forgets less; whether it learns less cannot be said."),
    ((-5.0, 2.0), (9.0, 2.0), "LfU forgets less, but learns less too: which"),
    ((5.0, 2.0), (9.0, 2.0), "LfU forgets less, and learns more."),
    ((1.0, 2.0), (3.0, 2.0), "too small a difference"), ((1.0, 2.0), (-3.0, 2.0), "too small"),
    ((9.0, 2.0), (-9.0, 2.0), "LfU forgets MORE here.")])
def test_no_difference_within_two_errors_is_told_as_one(learned, kept, words):
    results = [Result("t", "gain", *pair, 100) for pair in (learned, kept)]
    assert tables.in_words(*results).startswith(words)


def test_the_verdict_pairs_the_means_of_runs_by_question():
    """Two runs of each. SFT's answer one of two questions in turns, so does one of LfU's, the other
    has both: means of a question 1/2 and 1/2 beside 1 and 1/2."""
    cats = dict.fromkeys(categories.CATEGORIES, [dict(match=True)] * 2)
    turns = [[dict(match=i == j) for j in range(2)] for i in range(2)]
    examples = {"base": cats | {"word problems": turns[0]}} | {
        f"{m}{i}": cats | {"word problems": turns[i]} for m in "sl" for i in range(2)}
    examples["l1"]["word problems"] = [dict(match=True)] * 2
    runs = [Run("base")] + [Run(f"{m}{i}", "f", dict(aux=aux, lam=5.0))
                            for m, aux in (("s", "none"), ("l", "reps")) for i in range(2)]
    last = tables.verdict(examples, runs).splitlines()[-1]
    assert "means over 2 and 2 runs: word problems +25.0 ± 25.0 points" in last


def test_digits_are_as_many_as_tell_numbers_apart():
    shown = lambda metric, value, error: tables.shown(Result("t", metric, value, error, 9))
    assert shown("acc", 0.12345, 0.02) == "12.3 ± 2.0"
    assert shown("exact_match sd", 0.12345, math.nan) == "12.3"
    assert shown("nll", 0.12345, 0.02) == "0.123 ± 0.020"
    assert shown("cosine", 0.99123, 1e-4) == "0.9912 ± 0.0001"
    assert shown("cosine - SFT", 1.234e-4, 2e-6) == "0.000123 ± 0.000002"


# ---- over seeds

def subject(name, **settings):
    own = dict(aux="lora", lam=5.0, lr=1e-3, alpha=0.1, git_commit=name)
    return Run(name, name, own | settings)


def test_runs_that_differ_in_the_seed_alone_become_one_by_hand():
    runs = [Run("base"), subject("a", seed=1), subject("b", seed=2),
            subject("c", seed=1, aux="none"), subject("d", seed=1, alpha=0.3),
            subject("e", seed=3, lam=0)]  # SFT, as c: its lam has no part
    values = dict(base=0.1, a=0.2, b=0.4, c=0.7, d=0.6, e=0.9)
    by_run = {name: [Result("math", "exact_match", v, 0.01, 50)] for name, v in values.items()}
    columns = models.by_seed(runs)
    assert {name: [run.name for run in members] for name, members in columns.items()} == {
        "base": ["base"], "LfU-lora alpha 0.1": ["a", "b"], "SFT": ["c", "e"],
        "LfU-lora alpha 0.3": ["d"]}
    merged = tables.over_seeds(by_run, columns)
    assert tables.text(merged, columns).splitlines()[-1] == (
        "seeds: LfU-lora alpha 0.1 1, 2; SFT 1, 3; LfU-lora alpha 0.3 1")
    (r,), (alone,) = merged["LfU-lora alpha 0.1"], merged["LfU-lora alpha 0.3"]
    # sd of 0.2 and 0.4
    assert r.value == pytest.approx(0.3) and r.stderr == pytest.approx(0.02 ** 0.5)
    assert (alone.value, alone.stderr, alone.n) == (0.6, 0.01, 50)
    assert by_run["a"] == [Result("math", "exact_match", 0.2, 0.01, 50)]


def test_runs_of_other_numbers_of_processes_are_not_one_setting():
    """With N processes a step has N times the examples. What measures only does not matter."""
    runs = [subject("a", seed=1, processes=1), subject("b", seed=2, processes=2),
            subject("c", seed=3, processes=1, eval_data="x", eval_data_sha256="y")]
    assert {name: [run.name for run in members] for name, members in models.by_seed(
        runs).items()} == {"LfU-lora processes 1": ["a", "c"], "LfU-lora processes 2": ["b"]}


def test_one_seed_is_not_counted_twice(run, tmp_path):
    again = a_run_like(run, tmp_path / "again", git_commit="another")
    with pytest.raises(ValueError, match="again are one setting with one seed, 7"):
        script.main([str(run), str(again), "--over-seeds"])
    assert list(models.by_seed([subject("a", seed=1), subject("b", seed=1, lr=2e-3)])) == [
        "LfU-lora lr 0.001", "LfU-lora lr 0.002"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--attack", "--attack-steps", "0,2"], ["--wording"]],
                         ids=" ".join)
def test_over_seeds_prints_and_draws_means(run, flags, tmp_path, capsys):
    again = a_run_like(run, tmp_path / "again", seed=8)
    flat = script.main([str(run), str(again), *flags, "--over-seeds", "--limit", "3",
                        "--max-new-tokens", "8", *picture(tmp_path)])
    assert {r["run"] for r in flat} == {"base", "LfU-lora"}
    same = [r for r in flat if r["run"] == "LfU-lora" and r["metric"] != "rank"]
    # twice the same weights: no spread
    assert all(r["sd"] == pytest.approx(0, abs=1e-12) and "stderr" not in r for r in same)
    assert all("stderr" in r for r in flat if r["run"] == "base"), "one run: over its examples"
    assert "seeds: LfU-lora 7, 8" in capsys.readouterr().out and drawn(tmp_path)


# ---- other measures

@pytest.mark.slow
@pytest.mark.parametrize("flag, tasks_", [
    (["--noise"], [f"layer {l}" for l in range(7)]),
    (["--wording"], ["wording 0", "wording 6 (unseen)", "over wordings"]),
    (["--attack", "--attack-steps", "0,2"], ["attack, 0 steps", "attack, 2 steps"])])
def test_robustness_flags_on_the_bundled_world(run, flag, tasks_, tmp_path):
    flat = script.main([str(run), *flag, "--limit", "4", "--max-new-tokens", "8", "--batch-size",
                        "64", "--json", str(tmp_path / "out.json"), *picture(tmp_path)])
    assert set(tasks_) <= {r["task"] for r in flat}
    assert {r["run"] for r in flat} == {"base", str(run)} and drawn(tmp_path)
    if flag == ["--noise"]:
        layer0 = [r["value"] for r in flat if r["task"] == "layer 0"]
        assert layer0[0] == layer0[1], "every run meets the same noise"


@pytest.mark.slow
def test_a_task_beside_a_robustness_flag_is_measured_too(tmp_path):
    problems = str(BUNDLED / "data" / "word_problems_test.jsonl")

    def labels(*flags):
        return [step.label for step in script.plan(script.get_settings(list(flags)), True)]
    assert labels("--noise", "--task", f"nll={problems}") == ["noise", "nll"]
    assert labels("--wording", "--task", f"gsm8k={problems}", "--task", f"nll={problems}") == [
        "gsm8k wordings", "nll"], "gsm8k in every wording, which takes the place of its scores"
    assert labels() == ["bundled world"]


def test_tasks_on_files_and_the_limit_that_is_said(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Ann has the key.\nBen has the box.\nWhat is 3 + 4?\n")
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows))
    (tmp_path / "lambada.jsonl").write_text('{"text": "Ann has the key"}\n')
    files = dict(gsm8k="many.jsonl", perplexity="text.txt", nll="many.jsonl",
                 lambada="lambada.jsonl")
    flags = [f"--task={kind}={tmp_path / file}" for kind, file in files.items()]
    flat = script.main([*flags, "--max-new-tokens", "1", "--batch-size", "200"])
    shown = capsys.readouterr().out
    n = {(r["task"], r["metric"]): r["n"] for r in flat}
    assert n["gsm8k", "strict-match"] == 200 and "the first 200 of 400" in shown
    assert n["nll", "nll"] == 400 and n["lambada", "acc"] == 1
    assert n["perplexity", "bits_per_byte"] > 10
    one_line = script.main(["--task", f"perplexity={tmp_path / 'text.txt'}", "--limit", "1"])
    assert one_line[0]["n"] < n["perplexity", "bits_per_byte"] / 2


def test_files_of_one_name_are_two_columns_of_the_results(tmp_path):
    for folder, text in (("a", "Ann has the key"), ("b", "Ben has the red box")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.jsonl").write_text(json.dumps(dict(text=text)) + "\n")
    files = [f"{tmp_path}/{folder}/text.jsonl" for folder in "ab"]
    flags = [f"--task={kind}={file}" for kind, file in (
        ("lambada", files[0]), ("lambada", files[1]), ("lambada", files[1]),
        ("perplexity", files[0]))]
    flat = script.main([*flags, "--json", str(tmp_path / "out.json")])
    labels = [f"lambada {file}" for file in files]
    assert [r["task"] for r in flat if r["metric"] == "acc"] == labels
    assert {r["task"] for r in flat} == {*labels, "perplexity"}
    outputs = json.loads((tmp_path / "out.json").read_text())["examples"]
    assert [e["outputs"][0]["target"] for e in outputs[:2]] == ["key", "box"]


def test_every_run_is_asked_under_its_own_template(run, tmp_path, capsys, monkeypatch):
    other = a_run_like(run, tmp_path / "other", template="alpaca")
    seen = []
    encode = script.data.prompt_ids
    monkeypatch.setattr(script.data, "prompt_ids", lambda tokenizer, prompt, template="plain":
                        seen.append(template) or encode(tokenizer, prompt, template))

    def templates(*flags):
        seen.clear()
        script.main([*flags, f"--task=exact={PROBLEMS}", "--limit", "1", "--max-new-tokens", "1"])
        return seen

    assert templates(str(run), str(other)) == ["plain", "plain", "alpaca"]
    assert "template alpaca, plain" in capsys.readouterr().out
    assert templates(str(other), str(run)) == ["alpaca", "alpaca", "plain"]
    assert templates(str(run), str(other), "--template", "alpaca") == ["alpaca"] * 3
    assert templates() == ["plain"]


@pytest.mark.parametrize("flags, words", [
    ([], "bundled world: prompt [01]: the model's logits"),
    (["--noise"], "noise: layer 6, example 1: cosine is nan"),
    (["--task", f"nll={PROBLEMS}"], "nll: nll, example 1: nll is nan"),
    (["--task", f"gsm8k={PROBLEMS}"], "gsm8k: prompt [01]: the model's logits")])
def test_a_model_that_gives_nan_gets_no_scores(run, flags, words, monkeypatch):
    def overflowing(model, folder, load=models.load_adapter):
        load(model, folder).model.layers[5].mlp.down_proj.lora_B.data[0] = float("nan")
        return model
    monkeypatch.setattr(models, "load_adapter", overflowing)
    with pytest.raises(ValueError, match=f"^{run}, {words}"):
        script.main([str(run), *flags, "--limit", "2", "--max-new-tokens", "2"])


def test_an_adapter_that_does_not_fit_is_found_before_anything_is_measured(run, tmp_path, capsys):
    broken = a_run_like(run, tmp_path / "broken")
    file = broken / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(r=3)))
    with pytest.raises(ValueError, match="broken does not fit the model: .* has shape"):
        script.main([str(run), str(broken), "--limit", "2"])
    assert "not finished" not in capsys.readouterr().out, "nothing was measured"


def test_answers_side_by_side(run, capsys, monkeypatch):
    shown = script.main([str(run), "--prompt", "What is 3 + 4?", "--max-new-tokens", "5",
                         "--temperature", "0"])
    assert shown[0][0] == "What is 3 + 4?" and set(shown[0][1]) == {"base", str(run)}
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \nWhat is 3 + 4?\n\nWhat is 3 + 4?"))
    capsys.readouterr()
    script.main([str(run), "--chat", "--max-new-tokens", "5", "--temperature", "0"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) % 2 == 0 and lines[:len(lines) // 2] == lines[len(lines) // 2:]  # both asked
    assert [line.split()[0] for line in lines if line[2:3].strip()][:2] == ["base", str(run)]
    assert lines[0].strip().split(None, 1)[1:] == ([shown[0][1]["base"].splitlines()[0]]
                                                   if shown[0][1]["base"] else [])


def test_no_answer_reaches_the_terminal_as_an_escape(run, capsys, monkeypatch):
    monkeypatch.setattr(script, "reply", lambda *args, **kwargs: ["\x1b[2J\rgone"])
    script.main([str(run), "--prompt", "Hello"])
    assert capsys.readouterr().out.count(r"\x1b[2J\x0dgone") == 2


def test_no_name_out_of_a_file_reaches_the_terminal_as_an_escape():
    """Of a wording, and of a method in settings.json."""
    table = {"base": [Result("gsm8k, \x1b[2J", "acc", 1, 0, 9)]}
    assert r"gsm8k, \x1b[2J  acc" in tables.text(table)
    rows = dict.fromkeys(("word problems", *categories.CATEGORIES), [dict(match=True)] * 2)
    runs = [Run("base"), Run("a", "a", dict(method="\x1b[2J"))]
    assert r"a (\x1b[2J): word" in tables.verdict({"base": rows, "a": rows}, runs)


# ---- what is finished survives

@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, SystemExit(143), ValueError("no numbers")],
                         ids=str)
def test_what_is_done_is_printed_and_written_whatever_ends_it(run, tmp_path, capsys, monkeypatch,
                                                              ended_by):
    """Two tasks, two models: it ends in the second model's second task."""
    honest, calls = tasks.measure, []

    def measure(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise ended_by
        return honest(*args, **kwargs)
    monkeypatch.setattr(tasks, "measure", measure)
    (tmp_path / "lambada.jsonl").write_text('{"text": "Ann has the key"}\n')
    flags = [f"--task=nll={PROBLEMS}", f"--task=lambada={tmp_path / 'lambada.jsonl'}", "--limit",
             "2", "--json", str(tmp_path / "out.json")]
    with pytest.raises((KeyboardInterrupt, SystemExit, ValueError)):
        script.main([str(run), *flags])
    shown = capsys.readouterr().out.split("not finished; so far:\n")[1].splitlines()
    cells = {tuple(line.split()[:2]): line.split()[2:] for line in shown}
    assert "-" not in cells["nll", "nll"] and "-" in cells["lambada", "acc"]
    out = json.loads((tmp_path / "out.json").read_text())
    assert not out["finished"] and [(r["run"], r["metric"]) for r in out["results"]] == [
        ("base", "nll"), ("base", "acc"), ("base", "perplexity"), (str(run), "nll")]
    assert [len(e["outputs"]) for e in out["examples"]] == [2, 1, 2]
    script.main([str(run), *flags])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["finished"] and len(out["results"]) == 6


@pytest.mark.slow
def test_sigterm_ends_the_script_with_what_is_done(tmp_path):
    """The first of two tasks takes a moment, the second one much longer."""
    many = tmp_path / "many.jsonl"
    many.write_text(PROBLEMS.read_text() * 50)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), f"--task=nll={PROBLEMS}", f"--task=exact={many}",
         "--limit", "9000", "--json", str(tmp_path / "out.json")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not (tmp_path / "out.json").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "not finished; so far:" in out, err
    assert "Traceback" not in err
    assert not json.loads((tmp_path / "out.json").read_text())["finished"]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.slow
def test_one_full_tuned_run_after_the_other_is_in_memory(run, tmp_path, monkeypatch):
    """When a model is loaded, the one before it is gone; the base stays."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        shutil.copytree(BUNDLED, folder)
    honest, alive = models.load_model, weakref.WeakSet()

    def load_model(*args):
        gc.collect()
        counts.append(len(alive))
        alive.add(model := honest(*args))
        return model
    monkeypatch.setattr(models, "load_model", load_model)
    counts = []
    script.main([*map(str, folders), "--model", str(BUNDLED), f"--task=nll={PROBLEMS}",
                 "--limit", "1"])
    assert counts == [0, 1, 1, 1]


def test_two_runs_of_one_name_are_told_apart():
    assert models.short_names(["a/x", "b/x", "c/y"]) == {"a/x": "a/x", "b/x": "b/x", "c/y": "y"}


# ---- what is refused

@pytest.mark.parametrize("arguments, words", [
    (["no/such/run"], "no/such/run is not a folder"),
    (["{tmp}"], "neither adapter_config.json nor config.json"),
    (["--model", "{tmp}"], "config.json is missing"),
    (["--task", "gsm9k=x"], "NAME one of"),
    (["--task", "gsm8k"], "NAME=FILE"),
    (["--task", "gsm8k={tmp}/none.jsonl"], "none.jsonl cannot be read"),
    (["--task", "piqa={tmp}/bad.jsonl"], "bad.jsonl, line 2"),
    (["--task", "perplexity={tmp}/latin.txt"], "0xe9"),
    (["--task", "exact={problems}", "--few-shot", "-1"], "few-shot -1"),
    (["--task", "exact={problems}", "--few-shot", "2"], "exact asks as in training"),
    (["--task", "gsm8k={problems}", "--few-shot-data", "{problems}"], "without --few-shot"),
    (["--few-shot", "2"], "--few-shot has no part without --task"),
    (["--wordings", "{problems}"], "--wordings has no part without --task"),
    (["--task", "gsm8k={problems}", "--wordings", "{problems}"], "without --wording;"),
    (["--noise-data", "{problems}"], "--noise-data has no part without --noise"),
    (["--attack-data", "{problems}"], "--attack-data has no part without --attack"),
    (["--attack-lr", "1"], "--attack-lr has no part without --attack"),
    (["base"], "name that run ./base"), (["--plot", "{tmp}/mine.png"], "is no picture of it"),
    (["--task", "gsm8k={problems},labels"], "leave labels out"),
    (["--task", "gsm8k={problems}", "--few-shot", "200"], "few-shot 200"),
    (["--limit", "0"], "--limit 0"),
    (["--limit", "x"], "--limit"),
    (["--seed", "9" * 30], "--seed 9"), (["--seed", "-1"], "--seed -1 should be"),
    (["--stride", "2000", "--task", "perplexity={problems}"], "stride 2000"),
    (["--attack", "--attack-steps", "0,x"], "--attack-steps"),
    (["--attack", "--attack-data", "{problems}"], "TRAIN,TEST"),
    (["--prompt", "a", "--top-p", "0"], "--top-p 0"),
    (["--model", "", "--prompt", "a"], "--model is empty"),
    (["--prompt", ""], "--prompt is empty"),
    (["--json", "{problems}"], "is there and no result of eval.py"),
    (["--json", "{tmp}/a.pdf", "--plot", "{tmp}/a.png"], "is where --plot writes its PDF"),
    (["--prompt", "a", "--json", "b.json"], "--json has no part in --prompt"),
    (["--chat", "--task", "nll=a.jsonl"], "--task has no part in --chat"),
    (["--prompt", "a", "--chat"], "--chat has no part in --prompt"),
    (["--json", "{tmp}/no/folder.json"], "does not exist"),
    (["--json", "{tmp}"], "is a folder"),
    (["--json", "/dev/null"], "no regular file"),
    (["--plot", "{tmp}/picture.jpg"], "end in .png"),
    (["--plot", "{tmp}/no/picture.png"], "does not exist"),
    (["--device", "tpu"], "device 'tpu'")])
def test_bad_input_is_one_line_and_exit_2(arguments, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{\n')
    (tmp_path / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    (tmp_path / "mine.pdf").touch()
    before = sorted(tmp_path.rglob("*"))
    filled = [a.format(tmp=tmp_path, problems=PROBLEMS) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["eval.py", *filled])
    with pytest.raises(SystemExit) as exit_:
        script.system.command_line(script.main)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and words in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_file_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch):
    def no_measure(*arguments):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(script.models, "load_model", no_measure)
    (tmp_path / "out.json").write_text("{}")
    for closed in (tmp_path, tmp_path / "out.json"):  # as root every file can be written: pretend
        monkeypatch.setattr(jsons.os, "access", lambda path, mode: path != closed)
        with pytest.raises(ValueError, match="out.json cannot be written"):
            script.main(["--json", str(tmp_path / "out.json")])


def test_another_base_than_the_runs_own_is_told(run, tmp_path, capsys):
    run = a_run_like(run, tmp_path / "trained", model_sha256=hashes.model_hashes(BUNDLED))
    base = tmp_path / "base"
    shutil.copytree(BUNDLED, base, ignore=shutil.ignore_patterns("data", "*.py"))
    flags = [str(run), "--model", str(base), "--task", f"nll={PROBLEMS}", "--limit", "1"]
    script.main(flags)
    assert "note:" not in capsys.readouterr().out, "a copy is the same model"
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    script.main(flags)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    note = f"note: {run} was trained from another model.safetensors than {base} has"
    assert said == [note]
    changed = json.loads((run / "settings.json").read_text()) | dict(model=str(base))
    (run / "settings.json").write_text(json.dumps(changed))
    script.main([str(run), *flags[3:]])
    assert note in capsys.readouterr().out, "also where the run names it"
    (base / "vocab.json").write_text("{}")  # nothing reads it
    (base / "model.safetensors").write_bytes(weights)
    script.main(flags)
    assert "note:" not in capsys.readouterr().out
    (base / "chat_template.jinja").write_text("")
    script.main(flags)
    assert "another chat_template.jinja than" in capsys.readouterr().out


def test_runs_of_different_models_are_not_mixed(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = dict(base_model_name_or_path="/some/where/else")
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="separate calls"):
        script.main([str(run), str(other)])


def test_without_matplotlib_there_is_a_clear_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        script.main(["--plot", str(tmp_path / "a.png")])


@pytest.mark.slow
def test_the_command_itself_needs_no_arguments():
    done = subprocess.run([sys.executable, "eval.py"], cwd=ROOT, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    for task in ("word problems", *categories.CATEGORIES, "category mean"):
        assert f"\n{task}" in done.stdout
