"""Claim: lfu_min.paper.sweep runs every combination once, keeps what it has, and puts seeds
together as mean and deviation."""
import json
from types import SimpleNamespace

import pytest

from lfu_min.engine import system
from lfu_min.lora import lora_modules
from lfu_min.paper import jobs, measures, sweep
from lfu_min.scoring.measures import Result
from test_eval_robustness import run  # noqa: F401  (a fixture)

ROW = {column: 50.0 for column in sweep.COLUMNS} | {f"{c} nll": 1.0 for c in sweep.COLUMNS[:-1]} | {
    "others nll": 1.0}


def test_a_grid_is_all_combinations_and_plus_begins_another():
    assert sweep.parse_grid(["aux=none,lora", "seed=0,1"]) == [
        {"aux": "none", "seed": "0"}, {"aux": "none", "seed": "1"}, {"aux": "lora", "seed": "0"},
        {"aux": "lora", "seed": "1"}]
    assert sweep.parse_grid("aux=none seed=0 + aux=reps alpha=0.3 seed=0,1".split()) == [
        {"aux": "none", "seed": "0"}, {"aux": "reps", "alpha": "0.3", "seed": "0"},
        {"aux": "reps", "alpha": "0.3", "seed": "1"}]


WRONG = [
    (["lr"], "'lr'"), (["lr="], "'lr='"), (["lr=1,,2"], "lr=1,,2"), (["out=x"], "out has no part"),
    (["resume=x"], "resume has no part"), (["lr=1e-3", "lr=2e-3"], "write lr=1e-3,2e-3"),
    (["aux=none", "+"], "'+' stands between"),
    # what train.py itself refuses, the combination named
    (["aux=none", "lr=1,0"], "aux=none lr=0: --lr 0.0 should be"), (["lr=x"], "lr=x: .*'x'"),
    (["help=1"], "help has no part"),
    (["seed=0", "+", "momentum=1"], "momentum=1: .*--momentum")]


@pytest.mark.parametrize("words, named", WRONG)
def test_a_wrong_grid_is_named(words, named):
    with pytest.raises(ValueError, match=named.replace("+", r"\+")):
        sweep.parse_grid(words)


@pytest.mark.parametrize("arguments, named", [
    (["lr=1,x"], "lr=x"), (["lr=1", "--json", "{out}"], "is a folder"),
    (["lr=1", "--json", "{out}/no/s.json"], "does not exist"), (["lr=1", "--jobs", "x"], "jobs")])
def test_nothing_runs_before_all_of_it_is_right(arguments, named, tmp_path, monkeypatch):
    def no_run(*arguments):
        raise AssertionError("a run was started")
    monkeypatch.setattr(sweep, "run_all", no_run)
    with pytest.raises(ValueError, match=named):
        sweep.main([*(a.format(out=tmp_path) for a in arguments), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_train_py_is_found_by_its_place_in_the_repository(tmp_path, monkeypatch):
    assert sweep.train_script().__file__ == str(system.ROOT / "train.py")
    assert callable(sweep.train_script().main)
    monkeypatch.setattr(system, "ROOT", tmp_path)  # as after pip install: no train.py there
    with pytest.raises(ValueError, match="need the repository"):
        sweep.main(["lr=1", "--out", str(tmp_path / "out")])


def test_a_combination_that_the_grid_names_twice_is_run_once(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "run_all", lambda s, settings: seen.append(settings) or
                        {"base": [ROW]})
    sweep.main("seed=0,0 + seed=0,1 --out".split() + [str(tmp_path)])
    assert seen == [[{"seed": "0"}, {"seed": "1"}]]


def test_the_table_shows_mean_and_standard_deviation_over_seeds(capsys):
    sweep.show({"base": [ROW], "aux=lora": [ROW | {"math": 40.0}, ROW | {"math": 44.0}]})
    header, base, lora = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["seeds", "word", "problems"]
    assert base.split()[:3] == ["base", "1", "50.0"]
    assert "42.0 +-2.8" in lora and lora.split()[1] == "2"


def test_a_run_is_scored_with_its_adapter_and_the_base_without(run, monkeypatch):
    seen = []

    def measure(model, tokenizer, options, split):
        seen.append(len(lora_modules(model)))
        return [Result("math", "exact_match", 0.25, 0.1, 9), Result("math", "nll", 2.0, 0.1, 9)], {}
    monkeypatch.setattr(measures, "CATEGORIES", ("math",))
    monkeypatch.setattr(sweep.categories, "measure", measure)
    expected = {"math": 25.0, "math nll": 2.0, "others nll": 2.0}
    assert measures.scores(None, "test") == measures.scores(run, "test") == expected
    assert seen == [0, 7 * 6], "seven LoRAs in each of the six layers"


def test_what_is_scored_is_not_run_again_and_what_was_cut_short_is(tmp_path, monkeypatch):
    measures = {"scores_test": lambda run: {"split": "test"}}
    there = {"scores_test": {"numbers": ROW, "seconds": 1}}
    (tmp_path / "scores_test.json").write_text(json.dumps(there["scores_test"]))
    # nothing to train with: it would fail
    assert jobs.measured({"aux": "none"}, tmp_path, measures) == there
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text("half a run")
    seen = []

    def main(flags):
        seen.append(flags)
        (tmp_path / "run").mkdir(exist_ok=True)
    monkeypatch.setattr(jobs, "train_script", lambda: SimpleNamespace(main=main))
    measures |= {"scores_validation": lambda run: {"run": str(run)}}
    for _ in range(2):
        found = jobs.measured({"aux": "none", "lr": "1"}, tmp_path, measures)
        assert found == there | {"scores_validation": {"numbers": {"run": str(tmp_path / "run")},
                                                       "seconds": 0}}
    assert seen == [["--aux", "none", "--lr", "1", "--out", str(tmp_path / "run")]], "once"
    assert not (tmp_path / "run" / "checkpoints").exists(), "what was cut short is gone"
    (tmp_path / "trained").unlink()
    (tmp_path / "run" / "checkpoints" / "step-0000002").mkdir(parents=True)
    jobs.trained({"aux": "none"}, tmp_path)
    assert seen[1:] == [["--resume", str(tmp_path / "run")]], "from its checkpoint"
