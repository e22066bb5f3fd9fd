"""Claim: lfu_min.paper.real gives train.py and the measures what its page says, and its numbers are
those of eval.py's tasks. On the bundled model and a few lines of made-up files; the real runs are
in docs/results."""
import json
import math

import pytest
import torch

from lfu_min.bundled import BUNDLED
from lfu_min.files import data
from lfu_min.files.checkpoint import load_model
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.paper import jobs, real
from lfu_min.scoring import measures, tasks
from lfu_min.training.settings import get_settings


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of small files under the names that real.py asks for, and small numbers."""
    problems = (BUNDLED / "data" / "word_problems_test.jsonl").read_text().splitlines()
    for name, rows in (("gsm8k_train", problems[:12]), ("gsm8k_test", problems[12:18])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "dolly_3k.json").write_text(json.dumps(
        [{"instruction": f"Name number {i}.", "output": f"It is {i}."} for i in range(12)]))
    pairs = [("pour the tea", "into a cup", "into the moon"), ("sit", "on a fish", "on a chair")]
    (tmp_path / "piqa_valid.jsonl").write_text("\n".join(
        json.dumps(dict(goal=goal, sol1=one, sol2=two)) for goal, one, two in pairs))
    (tmp_path / "piqa_valid_labels.lst").write_text("0\n1\n")
    (tmp_path / "wikipedia_30.txt").write_text("A stone is a stone.\nA cup is a cup.\n")
    for name, value in dict(EXAMPLES=5, STEPS=2, HELD_OUT=4, SOLVED=2, CHOICES=2, LINES=1,
                            MAX_LEN=256).items():
        monkeypatch.setattr(real, name, value)
    return tmp_path


def settings(files, *more):
    return ["gsm8k", "--model", str(BUNDLED), "--files", str(files), "--runs", str(files / "runs"),
            "--out", str(files / "out"), "--seeds", "0,1", *more]


def test_train_py_takes_every_row_and_examples_are_apart(files):
    class S:
        model, runs = str(BUNDLED), files / "runs"
    S.files = files
    for name in real.NAMES:
        train, held_out = (set(map(json.dumps, part)) for part in real.split(name, files))
        assert len(train) >= real.EXAMPLES and not train & held_out
        drawn = []
        for seed in (0, 1):
            for row, setting in real.ROWS.items():
                flags, folder, _ = real.job(setting, seed, name, S)
                s = get_settings(jobs.as_flags(flags))
                assert (s.lr, s.max_steps, s.seed) == (float(setting["lr"]), 2, seed), row
                assert s.method == setting.get("method", "sft" if setting.get("aux") == "none"
                                               else "lfu") and f"seed={seed}" in folder.name
            drawn.append(data.read_examples(flags["data"]))
        assert len(drawn[0]) == 5 and drawn[0] != drawn[1]
    folders = {real.job(setting, 0, name, S)[1] for name in real.NAMES
               for setting in real.ROWS.values()}
    assert len(folders) == len(real.NAMES) * len(real.ROWS), "no run stands for another"


def test_the_base_scores_are_those_of_the_tasks(files):
    """Each number again, from the functions below the tasks."""
    class S:
        model, runs = str(BUNDLED), files / "runs"
    S.files = files
    found = real.job(None, 0, "gsm8k", S)[2]["scores"](None)
    model, tokenizer = load_model(BUNDLED, dtype=torch.float32), load_tokenizer(BUNDLED)

    def nats(examples):
        sums, counts = zip(*measures.answer_nll(model, tokenizer, examples, "plain"))
        return sum(sums) / sum(counts)
    assert found["learned nll"] == pytest.approx(
        nats(data.read_examples(files / "gsm8k_test.jsonl")[:4]), rel=1e-6)
    others = [data.Example(r["instruction"], r["output"])
              for r in real.split("dolly", files)[1]]
    assert len(others) == 4
    assert found["other nll"] == pytest.approx(nats(others), rel=1e-6)
    lls = [ll for ll, _ in measures.score(model, tokenizer, [
        (f"Question: {goal}\nAnswer:", f" {choice}") for goal, choice in [
            ("pour the tea", "into a cup"), ("pour the tea", "into the moon"),
            ("sit", "on a fish"), ("sit", "on a chair")]])]
    assert found["piqa margin"] == pytest.approx(
        ((lls[0] - lls[1]) + (lls[3] - lls[2])) / 2, rel=1e-5)
    assert found["piqa acc"] == 50 * ((lls[0] > lls[1]) + (lls[3] > lls[2]))
    text = "A stone is a stone.\n"
    total = measures.text_nats(model, tokenizer, text, 1024, None).sum().item()
    assert found["wikipedia bits"] == pytest.approx(total / math.log(2) / len(text), rel=1e-6)
    assert found["right"] in (0, 50, 100)


@pytest.mark.slow
def test_the_page_of_real_runs_and_nothing_twice(files, monkeypatch):
    monkeypatch.setattr(real, "ROWS", {row: real.ROWS[row] for row in ("SFT", "LfU-lora")})
    monkeypatch.setattr(jobs, "all_measured", lambda todo, *others, **more: {
        key: jobs.measured(*job) for key, job in todo.items()})
    text = real.main(settings(files))
    assert (files / "out" / "real_gsm8k.md").read_text() == text
    assert "python -m lfu_min.paper.real gsm8k --model bundled --files data" in text
    assert text.count("| LfU-lora |") == 2 and "| base |" in text
    monkeypatch.setattr(jobs, "trained", None)  # would be called for a run that is missing
    assert real.main(settings(files)) == text
    other = files / "other"
    other.symlink_to(BUNDLED)  # the same model by another name is the same
    assert real.main([str(other) if a == str(BUNDLED) else a for a in settings(files)]) == (
        text.replace("--model bundled", "--model other"))
    assert [p.name for p in (files / "runs").iterdir()] == ["bundled"]


def test_a_missing_file_is_one_line(files):
    (files / "gsm8k_train.jsonl").unlink()
    with pytest.raises(ValueError, match="gsm8k_train.jsonl"):
        real.main(settings(files))
    assert not (files / "out").exists()
