"""Claim: lfu_min.paper.sweep runs every combination once, keeps what it has, and puts seeds
together as mean and deviation."""
import importlib.util
import json

import pytest

from lfu_min.scoring import pictures

from lfu_min.engine import system

from lfu_min.paper import sweep

ROW = {column: 50.0 for column in sweep.COLUMNS} | {f"{c} nll": 1.0 for c in sweep.COLUMNS[:-1]}


def test_a_grid_is_all_combinations_and_plus_begins_another():
    assert sweep.parse_grid(["aux=none,lora", "seed=0,1"]) == [
        {"aux": "none", "seed": "0"}, {"aux": "none", "seed": "1"}, {"aux": "lora", "seed": "0"},
        {"aux": "lora", "seed": "1"}]
    assert sweep.parse_grid("aux=none seed=0 + aux=reps alpha=0.3 seed=0,1".split()) == [
        {"aux": "none", "seed": "0"}, {"aux": "reps", "alpha": "0.3", "seed": "0"},
        {"aux": "reps", "alpha": "0.3", "seed": "1"}]


@pytest.mark.parametrize("words, named",
                         [(["lr"], "'lr'"), (["lr="], "'lr='"), (["lr=1,,2"], "lr=1,,2"),
                                          (["out=x"], "out cannot vary"),
                                          (["aux=none", "+"], "'+' stands between")])
def test_a_wrong_grid_is_named(words, named):
    with pytest.raises(ValueError, match=named.replace("+", r"\+")):
        sweep.parse_grid(words)


def test_the_table_shows_mean_and_standard_deviation_over_seeds(capsys):
    sweep.show({"base": [ROW], "aux=lora": [ROW | {"math": 40.0}, ROW | {"math": 44.0}]})
    header, base, lora = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["seeds", "word",
                                  "problems"] and base.split()[:3] == ["base", "1", "50.0"]
    assert "42.0 +-2.8" in lora and lora.split()[1] == "2"


def test_what_is_scored_is_not_run_again_and_what_was_cut_short_is(tmp_path, monkeypatch):
    system.write_json(tmp_path / "scores_test.json", ROW)
    # nothing to train with: it would fail
    assert sweep.one({"aux": "none"}, tmp_path, "test", 1) == ROW
    import train
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("half a run")
    seen = []
    monkeypatch.setattr(train, "main", lambda argv: seen.append(argv))
    monkeypatch.setattr(sweep, "scores", lambda run, split, threads: {"split": split})
    assert sweep.one({"aux": "none", "lr": "1"}, tmp_path, "validation",
                     1) == {"split": "validation"}
    assert seen == [["--aux", "none", "--lr", "1", "--out", str(tmp_path / "run")]]
    assert not list((tmp_path / "run").iterdir())
    assert json.loads((tmp_path / "scores_validation.json").read_text()) == {"split": "validation"}


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"),
                    reason="needs matplotlib (requirements-dev.txt)")
def test_the_picture_of_what_is_learned_and_kept(tmp_path):
    by = {"base": [ROW], "aux=none lr=1": [ROW, ROW | {"word problems": 60.0}],
          "aux=none lr=2": [ROW], "aux=reps": [ROW]}
    pictures.tradeoff(tmp_path / "t.png", by, "test split")
    assert (tmp_path / "t.png").stat().st_size > 10_000
