"""train.py does what its flags say: the run folder, the log, the schedule, the pairing of SFT and
LfU, and bad input.

All on the bundled model, a few steps each, in this process; the script itself, its exit status and
its one-line errors are run in a subprocess once.
"""
import json
import math
from pathlib import Path
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from lfu_min import load_adapter, load_model
from lfu_min.bundled import BUNDLED
from lfu_min.engine import system

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def words(tmp_path):
    """Twelve short examples of different lengths."""
    path = tmp_path / "words.jsonl"
    rows = [{"question": f"What is {i} + {i + 1}?",
             "answer": "It is " + "so " * (i % 5) + str(2 * i + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, words, name, *flags):
    return train.main(["--data", str(words), "--out", str(tmp_path / name), "--device", "cpu",
                       "--batch-size", "4", "--max-steps", "3", "--ask", "Hello?",
                       *flags])


@pytest.mark.parametrize("aux", ["lora", "reps", "inplace", "none"])
def test_a_run_folder_holds_adapter_settings_and_log(tmp_path, words, aux, capsys):
    out, log = run(tmp_path, words, aux, "--aux", aux)
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json",
                                                     "adapter_model.safetensors", "log.jsonl",
                                                     "settings.json"]
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == log
    assert [r["step"] for r in log] == [1, 2, 3]
    for r in log:
        assert r["loss"] == pytest.approx(r["sft"] + 5 * r["consistency"])
        assert (r["consistency"] > 0) == (r["ascent_norm"] > 0) == (aux != "none")
        assert len(r["consistency_per_layer"]) == 6
        assert r["tokens"] >= r["target_tokens"] > 0 and r["ms"] > 0
    settings = json.loads((out / "settings.json").read_text())
    assert settings["aux"] == aux and settings["seed"] == 42 and len(settings["data_sha256"]) == 64
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0] or settings["versions"]["torch"] == torch.__version__
    model = load_model(BUNDLED, dtype=torch.float32)
    load_adapter(model, out)  # and it moved away from its start
    assert any(t.abs().max() > 0 for k, t in load_file(str(out / "adapter_model.safetensors")).items() if "lora_B" in k)
    shown = capsys.readouterr().out
    assert ">>>" in shown and "before" in shown and "after" in shown and "step 3/3" in shown


def test_full_tuning_saves_a_folder_that_loads(tmp_path, words):
    out, _ = run(tmp_path, words, "full", "--tune", "full", "--lr", "1e-3")
    before, after = load_model(BUNDLED, dtype=torch.float32), load_model(out)
    moved = [name for name, p in after.named_parameters()
             if not torch.equal(p, before.get_parameter(name))]
    assert len(moved) == len(list(after.parameters()))
    assert (out / "tokenizer.json").is_file()


def test_sft_and_lfu_see_the_same_batches_from_the_same_start(tmp_path, words):
    logs = [run(tmp_path, words, aux, "--aux", aux)[1] for aux in ("none", "lora", "reps")]
    assert logs[0][0]["sft"] == pytest.approx(logs[1][0]["sft"],
                                              abs=1e-6) == pytest.approx(logs[2][0]["sft"], abs=1e-6)
    for a, b in zip(logs[0], logs[1]):
        assert a["tokens"] == b["tokens"] and a["target_tokens"] == b["target_tokens"]


def test_one_seed_gives_one_run(tmp_path, words):
    files = [load_file(str(run(tmp_path, words, n, "--seed",
                               "7")[0] / "adapter_model.safetensors")) for n in "ab"]
    other = load_file(str(run(tmp_path, words, "c", "--seed",
                              "8")[0] / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert not all(torch.equal(files[0][k], other[k]) for k in other)


def test_lambda_zero_is_plain_sft_to_the_bit(tmp_path, words):
    a, b = (load_file(str(run(tmp_path, words, n, *f)[0] / "adapter_model.safetensors"))
            for n, f in (("a", ["--aux", "none"]), ("b", ["--aux", "lora", "--lam", "0"])))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_accumulation_is_one_large_batch_for_sft(tmp_path, words):
    """Two micro-batches of 4 give the same step as one batch of 8: the token mean runs over the
    whole step."""
    one = run(tmp_path, words, "one", "--aux", "none", "--batch-size", "8", "--accumulate", "1")[1]
    two = run(tmp_path, words, "two", "--aux", "none", "--batch-size", "4", "--accumulate", "2")[1]
    for a, b in zip(one, two):
        assert a["sft"] == pytest.approx(b["sft"],
                                         rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_schedule_warms_up_then_falls_to_zero_along_a_cosine(tmp_path, words):
    log = run(tmp_path, words, "s", "--aux", "none", "--max-steps", "10", "--warmup", "0.15",
              "--lr", "0.5e-3")[1]
    lrs = [r["lr"] for r in log]
    # ceil(0.15 * 10) = 2 steps up
    assert lrs[0] == pytest.approx(0.25e-3) and lrs[1] == pytest.approx(0.5e-3)
    assert lrs[5] == pytest.approx(0.25e-3) and lrs[9] == 0  # half way, and the end
    assert log[4]["epoch"] == pytest.approx(5 * 4 / 12)


def test_epochs_set_the_number_of_steps(tmp_path, words):
    log = train.main(["--data", str(words), "--out", str(tmp_path / "e"), "--device", "cpu",
                      "--aux", "none", "--batch-size", "5",
                      "--epochs", "2", "--ask", "Hi"])[1]
    assert len(log) == 2 * math.ceil(12 / 5)


def test_the_ascent_may_use_another_batch(tmp_path, words):
    same, other = (run(tmp_path, words, b, "--ascent-batch", b)[1] for b in ("same", "other"))
    assert same[0]["sft"] == pytest.approx(other[0]["sft"],
                                           abs=1e-6) and same[0]["ascent_norm"] != other[0]["ascent_norm"]


def test_long_examples_are_dropped_and_counted(tmp_path, words, capsys):
    run(tmp_path, words, "d", "--aux", "none", "--max-len", "20")
    text = capsys.readouterr().out
    kept, dropped = (int(text.split(word)[0].split()[-n])
                     for word, n in ((" examples kept", 1), (" dropped", 1)))
    assert 0 < kept < 12 and kept + dropped == 12


BAD = [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--model", "nowhere", "--data", "WORDS"], "nowhere"),
    (["--model", "MODEL"], "--data"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--r", "0"], "--r"),
    (["--batch-size", "0"], "--batch-size"),
    (["--epochs", "-1"], "--epochs"), (["--accumulate", "0"], "--accumulate"),
    (["--max-steps", "0"], "--max-steps"),
    (["--alpha", "-0.1"], "--alpha"), (["--lam", "inf"], "--lam"), (["--lam", "nan"], "--lam"),
    (["--clip", "0"], "--clip"),
    (["--warmup", "2"], "--warmup"), (["--seed", "-1"], "--seed"), (["--layers", "0-3"], "layers"),
    (["--layers", "3-9"], "layers"), (["--layers", "top"], "layers"),
    (["--max-len", "3"], "max_len"), (["--device", "tpu"], "device"),
    (["--out", "FULL"], "not empty"), (["--out", "WORDS"], "output folder"),
]


@pytest.mark.parametrize("flags, named", BAD,
                         ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_settings_are_refused_by_name_before_anything_is_written(tmp_path, words, flags, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_model",
                        lambda *a: pytest.fail("the model was loaded before the settings were "
                                               "checked"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    names = {"WORDS": str(words), "FULL": str(tmp_path / "full"), "MODEL": str(BUNDLED)}
    with pytest.raises(ValueError, match=named) as error:
        train.main(["--device", "cpu", "--data",
                    str(words)][: 2 if "--data" in flags or "MODEL" in flags else 4]
                   + [names.get(flag, flag) for flag in flags])
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_script_says_what_is_wrong_in_one_line_and_exits_with_2(tmp_path):
    for flags in (["--lr", "-1"], ["--aux", "nonsense"]):
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith(("error: --lr", "train.py: error: argument --aux"))
    assert list(tmp_path.iterdir()) == []


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path, words, monkeypatch):
    honest = train.lfu_backward
    def broken(*args, **kwargs):
        return {**honest(*args, **kwargs), "sft": torch.tensor(math.nan)}
    monkeypatch.setattr(train, "lfu_backward", broken)
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        run(tmp_path, words, "nan")


def test_a_float16_overflow_skips_the_step_and_halves_the_scale(tmp_path, words, monkeypatch):
    """The first gradient is made infinite: nothing is learned in that step, the next one runs at
    half the loss scale."""
    honest, calls = train.lfu_backward, []
    def overflowing(model, *args, **kwargs):
        result = honest(model, *args, **kwargs)
        calls.append(kwargs["loss_scale"])
        if len(calls) == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return result
    monkeypatch.setattr(train, "lfu_backward", overflowing)
    out, log = run(tmp_path, words, "fp16", "--dtype", "fp16", "--max-steps", "2")
    assert log[0]["grad_norm"] == math.inf and log[1]["loss_scale"] == log[0]["loss_scale"] / 2
    assert all(t.isfinite().all() for t in load_file(str(out / "adapter_model.safetensors")).values())
