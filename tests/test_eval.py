"""Claim: eval.py measures what it says, writes JSON from which every number can be recomputed,
draws its pictures, and answers bad input with one line and exit status 2 before anything slow
starts. Runs the script's main() on the bundled model with a few examples; how good the model is
does not matter here.
"""
import importlib.util
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parent.parent))
import eval as script
from lfu_min.scoring import categories, pictures
from lfu_min.scoring.measures import Result
from lfu_min.bundled import BUNDLED
from lfu_min.engine.system import ROOT
from test_eval_robustness import contents, run  # noqa: F401  (run is a fixture)


def recomputed(outputs, metric):
    values = {"exact_match": lambda o: o["match"], "compliance": lambda o: o["complied"],
              "not refused": lambda o: not o["refused"], "coherent": lambda o: o["coherent"]}
    if metric == "nll":
        return sum(o["nats"] for o in outputs) / sum(o["tokens"] for o in outputs)
    return sum(map(values[metric], outputs)) / len(outputs)


def picture(folder):
    """The flags that ask for a picture, where matplotlib (requirements-dev.txt) is installed."""
    return ["--plot", str(folder / "out.png")] if importlib.util.find_spec("matplotlib") else []


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
            assert r["value"] == pytest.approx(recomputed(outputs[r["run"], r["task"]],
                                                          r["metric"])) and r["n"] == 3
    shown = capsys.readouterr().out
    assert "word problems" in shown and "(LfU, lora): word problems" in shown and "±" in shown
    assert not picture(tmp_path) or (tmp_path / "out.png").stat().st_size > 10_000
    assert contents(run) == files, "the run's files stay as they were"


def test_category_mean_and_ranks_by_hand():
    exact = lambda **values: [Result(task, "exact_match", v, 0.1, 10) for task, v in values.items()]
    by_run = {"a": exact(math=0.9, knowledge=0.5, reasoning=0.2, helpfulness=0.1),
              "b": exact(math=0.8, knowledge=0.5, reasoning=0.3, helpfulness=0.1),
              "c": exact(math=0.7, knowledge=0.6, reasoning=0.1, helpfulness=0.1)}
    categories.add_ranks(by_run)
    # math 1 2 3, knowledge 2.5 2.5 1, reasoning 2 1 3, helpfulness 2 2 2
    assert [by_run[k][-1].value for k in "abc"] == [7.5 / 4, 7.5 / 4, 9 / 4]


def test_runs_that_differ_in_the_seed_alone_become_one_by_hand():
    def subject(name, **settings):
        return script.Subject(name, name, dict(aux="lora", lam=5.0, lr=1e-3, alpha=0.1) | settings)
    subjects = [script.Subject("base"), subject("a", seed=1), subject("b", seed=2),
                subject("c", seed=1, aux="none"),
                subject("d", seed=1, alpha=0.3), subject("e", seed=3, lam=0)]
    values = dict(base=0.1, a=0.2, b=0.4, c=0.7, d=0.6, e=0.9)
    by_run = {name: [Result("math", "exact_match", v, 0.01, 50)] for name, v in values.items()}
    merged, seeds = script.over_seeds(by_run, subjects)
    assert seeds == {"base": [None], "LfU lora alpha 0.1": [1, 2], "SFT lam 5.0": [1],
                     "LfU lora alpha 0.3": [1], "SFT lam 0": [3]}
    (r,), (alone,) = merged["LfU lora alpha 0.1"], merged["SFT lam 5.0"]
    # sd of 0.2 and 0.4
    assert r.value == pytest.approx(0.3) and r.stderr == pytest.approx(0.02 ** 0.5)
    assert (alone.value, alone.stderr, alone.n) == (0.7, 0.01, 50)
    assert by_run["a"] == [Result("math", "exact_match", 0.2, 0.01, 50)]


@pytest.mark.parametrize("flags", [[], ["--attack", "--attack-steps", "0,2"], ["--wording"]],
                         ids=" ".join)
def test_over_seeds_prints_and_draws_means(run, flags, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    settings = json.loads((run / "settings.json").read_text())
    (again / "settings.json").write_text(json.dumps(settings | {"seed": 7}))
    flat = script.main([str(run), str(again), *flags, "--over-seeds", "--limit", "3",
                        "--max-new-tokens", "8", *picture(tmp_path)])
    assert {r["run"] for r in flat} == {"base", "LfU lora"}
    same = [r for r in flat if r["run"] == "LfU lora" and r["metric"] != "rank"]
    # twice the same weights: no spread
    assert all(r["stderr"] == pytest.approx(0, abs=1e-12) for r in same)
    assert f"seeds: LfU lora {settings['seed']}, 7" in capsys.readouterr().out


@pytest.mark.parametrize("flag, tasks_, panel", [
    (["--noise"], [f"layer {l}" for l in range(7)], "layers"),
    (["--wording"], ["wording 0", "wording 6 (unseen)", "over wordings"], "wordings"),
    (["--attack", "--attack-steps", "0,2"], ["attack, 0 steps", "attack, 2 steps"], "attack")])
def test_robustness_flags_on_the_bundled_world(run, flag, tasks_, panel, tmp_path):
    flat = script.main([str(run), *flag, "--limit", "4", "--max-new-tokens", "8", "--batch-size",
                        "64",
                        "--json", str(tmp_path / "out.json"), *picture(tmp_path)])
    assert set(tasks_) <= {r["task"] for r in flat} and {r["run"]
                                                         for r in flat} == {"base", str(run)}
    assert not picture(tmp_path) or (tmp_path / "out.png").stat().st_size > 10_000
    if flag == ["--noise"]:
        layer0 = [r["value"] for r in flat if r["task"] == "layer 0"]
        assert layer0[0] == layer0[1], "every run meets the same noise"


def test_tasks_on_files_and_the_limit_that_is_said(tmp_path, capsys):
    problems = BUNDLED / "data" / "word_problems_test.jsonl"
    (tmp_path / "text.txt").write_text("Ann has the key.\nBen has the box.\nWhat is 3 + 4?\n")
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows))
    (tmp_path / "lambada.jsonl").write_text('{"text": "Ann has the key"}\n')
    flat = script.main(["--task", f"gsm8k={tmp_path / 'many.jsonl'}", "--max-new-tokens", "1",
                        "--batch-size", "200",
                        "--task", f"perplexity={tmp_path / 'text.txt'}", "--task",
                        f"nll={tmp_path / 'many.jsonl'}",
                        "--task", f"lambada={tmp_path / 'lambada.jsonl'}"])
    shown = capsys.readouterr().out
    n = {(r["task"], r["metric"]): r["n"] for r in flat}
    assert n["gsm8k", "strict-match"] == 200 and "the first 200 of 400" in shown
    assert n["nll", "nll"] == 400 and n["lambada",
                                        "acc"] == 1 and n["perplexity", "bits_per_byte"] > 10
    one_line = script.main(["--task", f"perplexity={tmp_path / 'text.txt'}", "--limit", "1"])
    assert one_line[0]["n"] < n["perplexity", "bits_per_byte"] / 2


def test_answers_side_by_side(run, capsys, monkeypatch):
    shown = script.main([str(run), "--prompt", "What is 3 + 4?", "--max-new-tokens", "5",
                         "--temperature", "0"])
    assert shown[0][0] == "What is 3 + 4?" and set(shown[0][1]) == {"base", str(run)}
    monkeypatch.setattr(sys, "stdin", __import__("io").StringIO("What is 3 + 4?\n\n"))
    capsys.readouterr()
    script.main([str(run), "--chat", "--max-new-tokens", "5", "--temperature", "0"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines if line[2:3].strip()][:2] == ["base", str(run)]
    assert lines[0].strip().split(None, 1)[1:] == ([shown[0][1]["base"].splitlines()[0]]
                                                   if shown[0][1]["base"] else [])


def test_curves_of_a_run(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-dev.txt)")
    script.main([str(run), "--curves", "--plot", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_two_runs_of_one_name_are_told_apart():
    assert pictures.short_names(["a/x", "b/x", "c/y"]) == {"a/x": "a/x", "b/x": "b/x", "c/y": "y"}


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
    (["--task", "gsm8k={problems}", "--few-shot", "200"], "few-shot 200"),
    (["--limit", "0"], "--limit 0"),
    (["--stride", "2000", "--task", "perplexity={problems}"], "stride 2000"),
    (["--attack", "--attack-steps", "0,x"], "--attack-steps"),
    (["--attack", "--attack-data", "{problems}"], "TRAIN,TEST"),
    (["--prompt", "a", "--top-p", "0"], "--top-p 0"),
    (["--json", "{tmp}/no/folder.json"], "does not exist"),
    (["--plot", "{tmp}/picture.jpg"], "end in .png"),
    (["--curves"], "--curves needs"),
    (["--device", "tpu"], "device 'tpu'")])
def test_bad_input_is_one_line_and_exit_2(arguments, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{\n')
    (tmp_path / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    places = dict(tmp=tmp_path, problems=BUNDLED / "data" / "word_problems_test.jsonl")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["eval.py", *[a.format(**places) for a in arguments]])
    with pytest.raises(SystemExit) as exit_:
        script.system.command_line(script.main)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and words in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_runs_of_different_models_are_not_mixed(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path="/some/where/else")))
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
