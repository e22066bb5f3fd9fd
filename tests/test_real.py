"""Claim: lfu_min.paper.real gives train.py and the measures what its page says, and its numbers are
those of eval.py's tasks. On the bundled model and a few lines of made-up files; the real runs are
in docs/results."""
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
import torch

from lfu_min.bundled import BUNDLED
from lfu_min.files import data
from lfu_min.files.checkpoint import load_model
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.paper import jobs, real
from lfu_min.scoring import measures, tasks
from lfu_min.training.settings import get_settings
from test_reproduce import InThisProcess


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
    for name, value in dict(EXAMPLES=5, BATCH=3, VALIDATION=3, HELD_OUT=4, OTHERS=4, SOLVED=2,
                            CHOICES=2, CHARACTERS=20).items():
        monkeypatch.setattr(real, name, value)
    return tmp_path


def settings(files, *more):
    return ["gsm8k", "--model", str(BUNDLED), "--files", str(files), "--runs", str(files / "runs"),
            "--out", str(files / "out"), "--seeds", "0,1", *more]


@pytest.fixture
def s(files):
    """What real.main parses."""
    return SimpleNamespace(model=str(BUNDLED), files=files, runs=files / "runs", jobs=1, threads=1,
                           seeds=[0, 1], recorded=False, epochs=1)


def test_train_py_takes_every_row_and_examples_are_apart(s):
    for name in real.NAMES:
        own = {part: data.read_examples(file) for part, file in real.parts(name, s).items()}
        together = [example for part in own.values() for example in part]
        assert len(set(together)) == len(together), "no example has two parts"
        assert len(own["train"]) >= real.EXAMPLES and len(own["validation"]) == 3
        drawn = []
        for seed in (0, 1):
            for row, setting in real.METHODS.items():
                flags, folder, _ = real.job(setting | {"lr": "5e-4"}, seed, name, s)
                got = get_settings(jobs.as_flags(flags))
                assert (got.lr, got.epochs, got.seed) == (5e-4, 1, seed), row
                assert got.method == setting.get("method", "sft" if setting.get("aux") == "none"
                                                 else "lfu") and f"seed={seed}" in folder.name
            drawn.append(data.read_examples(flags["data"]))
            assert set(drawn[-1]) <= set(own["train"])
        assert len(drawn[0]) == 5 and drawn[0] != drawn[1]
    folders = {real.job(setting, 0, name, s)[1] for name in real.NAMES
               for setting in real.METHODS.values()}
    s.epochs = 3
    flags, folder, _ = real.job(real.METHODS["SFT"], 0, "dolly", s)
    assert flags["epochs"] == 3 and "epochs=3" in folder.name
    assert real.tuning("dolly", s)["5e-4"][0]["epochs"] == 1
    assert len({folder, *folders}) == len(real.NAMES) * len(real.METHODS) + 1, (
        "no run stands for another")


def test_examples_longer_than_max_len_are_in_no_part(s, monkeypatch):
    tokenizer = load_tokenizer(BUNDLED)
    examples = data.read_examples(s.files / "gsm8k_train.jsonl")
    lengths = [len(data.encode_example(tokenizer, e)[0]) for e in examples]
    monkeypatch.setattr(real, "MAX_LEN", sorted(lengths)[-2])
    own = real.parts("gsm8k", s)
    kept = data.read_examples(own["train"]) + data.read_examples(own["validation"])
    assert len(kept) == sum(n <= real.MAX_LEN for n in lengths) < len(examples)
    assert all(len(data.encode_example(tokenizer, e)[0]) <= real.MAX_LEN for e in kept)


def test_too_few_examples_are_said_before_anything_is_written(s, monkeypatch):
    monkeypatch.setattr(real, "EXAMPLES", 50)
    with pytest.raises(ValueError, match="53 examples of at most 128 tokens are needed.* are 12"):
        real.parts("gsm8k", s)
    assert not s.runs.exists()


def test_the_rate_is_sfts_best_on_the_validation_part(s, monkeypatch):
    def found(todo, *arguments):
        assert {folder.name.split("seed=")[1] for _, folder, _ in todo.values()} == {"100"}
        assert all(list(own) == ["validation"] for *_, own in todo.values())
        return {lr: {"validation nll": abs(float(lr) - 4e-4)} for lr in todo}
    monkeypatch.setattr(jobs, "all_measured", found)
    assert real.choose("gsm8k", s, None) == "5e-4"
    s.recorded = True
    with pytest.raises(ValueError, match="lacks the runs that choose the learning rate"):
        real.choose("gsm8k", s, s.files / "no record")


def test_the_base_scores_are_those_of_the_tasks(s, files):
    """Each number again, from the functions below the tasks."""
    own = real.job(None, 0, "gsm8k", s)[2]
    found = own["scores"](None) | own["solved"](None)
    model, tokenizer = load_model(BUNDLED, dtype=torch.float32), load_tokenizer(BUNDLED)

    def nats(examples):
        sums, counts = zip(*measures.answer_nll(model, tokenizer, examples, "plain"))
        return sum(sums) / sum(counts)
    assert found["learned nll"] == pytest.approx(
        nats(data.read_examples(real.parts("gsm8k", s)["held-out"])), rel=1e-6)
    others = [data.Example(r["instruction"], r["output"])
              for r in real.split("dolly", files, lambda row: True)["held-out"]]
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


def test_right_is_the_last_number_of_the_reply(s, files, monkeypatch):
    gold = tasks.normalise(tasks.read_gsm8k(files / "gsm8k_test.jsonl")[0].target)
    monkeypatch.setattr(tasks, "reply", lambda *args, **kwargs: [f"#### 0, no: {gold}", "nothing"])
    assert real.solved(None, str(BUNDLED), files) == {"right": 50}


@pytest.mark.slow
def test_the_page_of_real_runs_and_nothing_twice(files, monkeypatch):
    monkeypatch.setattr(real, "METHODS", {row: real.METHODS[row] for row in ("SFT", "LfU-lora")})
    monkeypatch.setattr(real, "RATES", ("5e-4", "1e-3"))
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", InThisProcess)
    text = real.main(settings(files))
    assert (files / "out" / "real_gsm8k.md").read_text() == text
    assert "python -m lfu_min.paper.real gsm8k --model bundled --files data --seeds 0,1" in text
    assert text.count("| LfU-lora |") == 2 and "| base |" in text and "seed 100" in text
    assert "Not run yet" not in text
    assert len((files / "out" / jobs.RECORD).read_text().splitlines()) == (
        2 * 3 + 4 * 2 + 1 + 3)  # and what the first seed solved
    record = files / "out" / jobs.RECORD
    every = record.read_text()
    honest = jobs.measured
    monkeypatch.setattr(jobs, "measured", None)  # would be called for a run that is missing
    assert real.main(settings(files)) == text
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "measured", honest)
        more = real.main(settings(files, "--epochs", "2", "--methods", "SFT"))
    assert (files / "out" / "real_gsm8k_2_epochs.md").read_text() == more
    assert "--seeds 0,1 --methods 'SFT' --epochs 2\n" in more and "| LfU" not in more
    assert "Not run yet, or in part: LfU-lora with seed 0, 1." in more and "seed 100" not in more
    assert len(record.read_text().splitlines()) == len(every.splitlines()) + 2 * 2 + 1
    assert (files / "out" / "real_gsm8k.md").read_text() == text
    record.write_text("".join(line + "\n" for line in every.splitlines()
                              if "aux=lora" not in line or "seed=1" not in line))
    less = real.main(settings(files, "--recorded"))
    assert "Not run yet, or in part: LfU-lora with seed 1." in less
    assert "--files data --seeds 0,1 --recorded\n" in less
    assert "| LfU-lora |" in less
    record.write_text("".join(line + "\n" for line in every.splitlines()
                              if "aux=lora" not in line and '"scores"' not in line))
    less = real.main(settings(files, "--recorded"))
    assert ("Not run yet, or in part: base; SFT with seed 0, 1; LfU-lora with seed 0, 1; SFT at"
            in less)
    assert "LfU-lora |" not in less and "- LfU-lora" not in less
    assert re.search(r"\| SFT at 5e-4, seed 100 \| \d\.\d{3} \| - \|", less), "what is known"
    record.write_text(every)
    other = files / "other"
    other.symlink_to(BUNDLED)  # the same model by another name is the same
    assert real.main([str(other) if a == str(BUNDLED) else a for a in settings(files)]) == text
    alone = ["gsm8k", "--recorded", "--out", str(files / "out"), "--seeds", "0,1"]
    assert real.main(alone) == text, "from the record alone"
    with pytest.raises(ValueError, match="runs of no model: name one with --model and --files"):
        real.main(["dolly", *alone[1:]])
    for lacking in (["gsm8k"], [*alone, "--model", str(BUNDLED)]):
        with pytest.raises(ValueError, match="--model and --files are needed, both, or --recorded"):
            real.main(lacking)
    assert [p.name for p in (files / "runs").iterdir()] == [real.identity(BUNDLED, files)]


def test_another_model_or_other_files_of_the_same_names_are_other_runs(s, files):
    own = {real.identity(BUNDLED, files)}
    model = files / "bundled"
    shutil.copytree(BUNDLED, model, ignore=shutil.ignore_patterns("data", "*.py"))
    assert {real.identity(model, files)} == own, "a copy is the same model"
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    own.add(real.identity(model, files))
    for name in real.FILES:
        with open(files / name, "a") as file:
            file.write(" ")
        own.add(real.identity(BUNDLED, files))
    assert len(own) == 2 + len(real.FILES) and all(name.startswith("bundled-") for name in own)


def test_the_seed_that_chooses_the_rate_is_used_for_nothing_else(files):
    with pytest.raises(ValueError, match="--seeds 100: it chooses the learning rate, and nothing"):
        real.main([*settings(files)[:-1], "1,100"])


@pytest.mark.parametrize("name", real.FILES)
def test_a_missing_file_is_one_line(files, name):
    (files / name).unlink()
    with pytest.raises(ValueError, match=name):
        real.main(settings(files))
    assert not (files / "out").exists() and not (files / "runs").exists()
