"""Claim: --eval-data measures the loss of the file's answers, in nats a supervised token, before
the first step, after every tenth part of the run and at its end, and changes nothing of the run:
the same weights and the same log bit for bit, interrupted or not. One process or two, sharded or
not, measure the same.

On the bundled model, a few steps each. The loss is compared with eval.py's `nll` of the run.
"""
import json
import signal

import pytest
from safetensors.torch import load_file
import torch

import eval as eval_script
import train
from lfu_min.training import log, validation
from test_distributed import TORCHRUN, run as run_script, shards
from test_resume import differences, ended_after
from test_train import run, words  # noqa: F401  (words is a fixture)


@pytest.fixture
def others(tmp_path):
    """Seven examples, one of them too long."""
    path = tmp_path / "others.jsonl"
    rows = [{"question": f"What is {i} + 9?", "answer": "It is " + "so " * i + f"{i + 9}"}
            for i in range(6)] + [{"question": "a " * 300, "answer": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    monkeypatch.setattr(log, "answers", lambda *args: [])


def evals(records):
    """{step: loss} of a log; step 0 is before the first."""
    found = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    return {0: records[0]["eval_loss_before"], **found}


def test_the_loss_is_evals_nll_of_the_base_and_of_the_run(tmp_path, words, others, capsys):
    out, records = run(tmp_path, words, "a", "--eval-data", str(others), "--lr", "1e-2")
    shown = capsys.readouterr().out
    assert "others.jsonl: 6 examples kept, 1 dropped (longer than 256 tokens)" in shown
    found = evals(records)
    assert list(found) == [0, 1, 2, 3]  # a tenth of three steps is less than one
    assert f"eval     before the first step: {found[0]:.4f} nats a supervised token" in shown
    assert f"eval     after step 3: {found[3]:.4f} nats a supervised token" in shown
    short = tmp_path / "short.jsonl"
    short.write_text("".join(others.read_text().splitlines(keepends=True)[:6]))
    scores = eval_script.main([str(out), "--task", f"nll={short}"])
    assert [found[0], found[3]] == [pytest.approx(r["value"], rel=1e-5) for r in scores]
    assert abs(found[0] - found[3]) > 0.1
    settings = json.loads((out / "settings.json").read_text())
    assert settings["eval_data"] == str(others) and len(settings["eval_data_sha256"]) == 64


@pytest.mark.parametrize("steps, due", [
    (1, [1]), (7, [1, 2, 3, 4, 5, 6, 7]), (12, [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]),
    (100, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]), (160, [*range(16, 161, 16)])])
def test_it_is_due_at_every_tenth_part_and_at_the_end(steps, due):
    v = validation.Validation.__new__(validation.Validation)
    v.examples, v.before, v.s, v.say = [1], 2.0, torch.nn.Module(), lambda *args: None
    v.s.steps, v.loss = steps, lambda model: 1.0
    records = [dict(step=step) for step in range(1, steps + 1)]
    for record in records:
        v.after(None, record)
    assert [r["step"] for r in records if "eval_loss" in r] == due
    assert [r["step"] for r in records if "eval_loss_before" in r] == [1]


def without_evals(records):
    return [{name: value for name, value in r.items()
             if not name.startswith("eval_loss") and name != "ms"} for r in records]


@pytest.mark.parametrize("flags", [
    ["--aux", "lora"],
    pytest.param(["--aux", "reps", "--move", "random", "--dtype", "fp16"], marks=pytest.mark.slow),
    pytest.param(["--tune", "full", "--aux", "inplace"], marks=pytest.mark.slow)], ids=" ".join)
def test_the_run_is_the_same_without_it(tmp_path, words, others, flags):
    one, log_one = run(tmp_path, words, "one", *flags)
    two, log_two = run(tmp_path, words, "two", *flags, "--eval-data", str(others))
    assert without_evals(log_one) == without_evals(log_two) and len(evals(log_two)) == 4
    name = "model.safetensors" if "full" in flags else "adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, words, others, cut):
    flags = tmp_path, words, "one", "--eval-data", str(others), "--save-every", "1", "--keep", "9"
    one, _ = run(*flags)
    ended_after(cut, signal.SIGTERM, run, *flags[:2], "two", *flags[3:])
    two, records = train.main(["--resume", str(tmp_path / "two")])
    assert not differences(one, two) and len(evals(records)) == 4


def test_other_eval_data_at_resume_are_taken_said_and_recorded(tmp_path, words, others, capsys):
    flags = tmp_path, words, "a", "--eval-data", str(others), "--aux", "none"
    ended_after(1, signal.SIGTERM, run, *flags)
    others.write_text(others.read_text().splitlines(keepends=True)[2])
    out, records = train.main(["--resume", str(tmp_path / "a")])
    said = "--eval-data is not what the run began with: losses before and after this step cannot"
    assert said in capsys.readouterr().out and len(evals(records)) == 4
    settings = json.loads((out / "settings.json").read_text())
    again, = settings["resumed"]
    assert again["after_step"] == 1 and again["eval_data_sha256"] != settings["eval_data_sha256"]
    train.main(["--verify", str(out)])  # no part of what the run is made of


def test_eval_data_can_be_named_at_resume_only(tmp_path, words, others, capsys):
    ended_after(1, signal.SIGTERM, run, tmp_path, words, "a", "--aux", "none")
    _, records = train.main(["--resume", str(tmp_path / "a"), "--eval-data", str(others)])
    assert ["eval_loss" in r for r in records] == [False, True, True]
    assert "is not what the run began with" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], pytest.param(["--shard"], marks=shards)], ids=str)
def test_two_processes_measure_what_one_does(tmp_path, others, flags):
    """Six examples in batches of four: in the second turn one process has none left."""
    one = run_script(tmp_path, "one", [], "--accumulate", "2", "--eval-data", others)
    two = run_script(tmp_path, "two", TORCHRUN, *flags, "--eval-data", others)
    assert one[0].returncode == two[0].returncode == 0, two[0].stderr
    assert two[0].stdout.count("eval     after step 3:") == 1
    for step, loss in evals(one[1]).items():
        assert evals(two[1])[step] == pytest.approx(loss, rel=1e-4)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=3e-5) for key in a)


@pytest.mark.parametrize("mistake", ["loss", "batch mean", "train"])
def test_a_planted_mistake_is_seen(tmp_path, words, others, capsys, monkeypatch, mistake):
    honest = validation.sft_loss

    def planted(model, h, batch):
        if mistake == "batch mean":  # divided by this batch's tokens
            batch.divisor = len(batch.targets)
        if mistake == "train":  # draws from the global generator, trains
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).add_(1e-3)
        return honest(model, h, batch) * (2 if mistake == "loss" else 1)
    monkeypatch.setattr(validation, "sft_loss", planted)
    with pytest.raises(AssertionError):
        if mistake == "train":
            test_the_run_is_the_same_without_it(tmp_path, words, others, ["--aux", "lora"])
        else:
            test_the_loss_is_evals_nll_of_the_base_and_of_the_run(tmp_path, words, others,
                                                                          capsys)
