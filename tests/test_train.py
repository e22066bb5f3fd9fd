"""train.py does what its flags say: the run folder, the log, the schedule, the pairing of SFT and
LfU, and bad input.

All on the bundled model, a few steps each, in this process; the script itself, its exit status and
its one-line errors are run in a subprocess once.
"""
import inspect
import json
import math
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from definitions import definition, total_norm
import train
from lfu_min import add_lora, load_adapter, load_model
from lfu_min.bundled import BUNDLED
from lfu_min.engine import system
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.methods import AUXILIARIES, BASELINES, DISTANCES, MOVES
from lfu_min.training import log, loop
from lfu_min.training.loop import LossScale, Plan, micro_batch_seed, suspects, usable
from lfu_min.training.settings import TAKES, get_settings, method_settings

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
                       "--batch-size", "4", "--max-steps", "3", *flags])


@pytest.mark.slow
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
    assert torch.__version__.startswith(settings["versions"]["torch"])
    model = load_model(BUNDLED, dtype=torch.float32)
    load_adapter(model, out)  # and it moved away from its start
    weights = load_file(str(out / "adapter_model.safetensors"))
    assert any(t.abs().max() > 0 for name, t in weights.items() if "lora_B" in name)
    shown = capsys.readouterr().out
    assert ">>>" in shown and "before" in shown and "after" in shown and "step 3/3" in shown


def test_full_tuning_saves_a_folder_that_loads(tmp_path, words):
    out, _ = run(tmp_path, words, "full", "--tune", "full", "--lr", "1e-3")
    before, after = load_model(BUNDLED, dtype=torch.float32), load_model(out)
    moved = [name for name, p in after.named_parameters()
             if not torch.equal(p, before.get_parameter(name))]
    assert len(moved) == len(list(after.parameters()))
    assert (out / "tokenizer.json").is_file()


@pytest.mark.slow
def test_sft_and_lfu_see_the_same_batches_from_the_same_start(tmp_path, words):
    logs = [run(tmp_path, words, aux, "--aux", aux)[1] for aux in ("none", "lora", "reps")]
    for other in logs[1:]:
        assert logs[0][0]["sft"] == pytest.approx(other[0]["sft"], abs=1e-6)
        for a, b in zip(logs[0], other, strict=True):
            assert a["tokens"] == b["tokens"] and a["target_tokens"] == b["target_tokens"]


@pytest.mark.slow
def test_one_seed_gives_one_run(tmp_path, words):
    files = [load_file(str(run(tmp_path, words, n, "--seed",
                               "7")[0] / "adapter_model.safetensors")) for n in "ab"]
    other = load_file(str(run(tmp_path, words, "c", "--seed",
                              "8")[0] / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert not all(torch.equal(files[0][k], other[k]) for k in other)


def test_lambda_zero_is_plain_sft_to_the_bit(tmp_path, words):
    a, b, c = (load_file(str(run(tmp_path, words, n, *f)[0] / "adapter_model.safetensors"))
               for n, f in (("a", ["--aux", "none"]), ("b", ["--aux", "lora", "--lam", "0"]),
                            ("c", ["--method", "sft"])))
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("size, count", [("4", "2"), ("1", "8")])
def test_accumulation_is_one_large_batch_for_sft(tmp_path, words, size, count):
    """Two micro-batches of 4, or 8 of 1, give the same step as one batch of 8: the token mean runs
    over the whole step."""
    one = run(tmp_path, words, "one", "--aux", "none", "--batch-size", "8", "--accumulate", "1")[1]
    two = run(tmp_path, words, "two", "--aux", "none", "--batch-size", size, "--accumulate",
              count)[1]
    for a, b in zip(one, two):
        assert a["sft"] == pytest.approx(b["sft"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_schedule_warms_up_then_falls_to_zero_along_a_cosine(tmp_path, words):
    log = run(tmp_path, words, "s", "--aux", "none", "--max-steps", "20",
              "--lr", "0.5e-3")[1]
    lrs = [r["lr"] for r in log]  # 0.1 of the 20 steps go up
    assert lrs[0] == pytest.approx(0.25e-3) and lrs[1] == pytest.approx(0.5e-3)
    assert lrs[10] == pytest.approx(0.25e-3) and lrs[19] == 0  # half way, and the end
    assert log[4]["epoch"] == pytest.approx(5 / 3)


def test_epochs_set_the_number_of_steps(tmp_path, words):
    log = train.main(["--data", str(words), "--out", str(tmp_path / "e"), "--device", "cpu",
                      "--aux", "none", "--batch-size", "5",
                      "--epochs", "2"])[1]
    assert len(log) == 2 * math.ceil(12 / 5)


@pytest.mark.slow
@pytest.mark.parametrize("flag, usual", [("--move", "ascent"), ("--compare", "mse")])
def test_the_parts_can_be_chosen(tmp_path, words, flag, usual):
    """Each choice trains, from the same start, and none is a synonym of the usual one."""
    choices = MOVES if flag == "--move" else DISTANCES
    logs = {name: run(tmp_path, words, name, flag, name, "--max-steps", "1")[1] for name in choices}
    for name, log in logs.items():
        assert log[0]["sft"] == pytest.approx(logs[usual][0]["sft"], abs=1e-6)
        if name != usual:
            assert log[0]["consistency"] != logs[usual][0]["consistency"]


@pytest.mark.parametrize("name, flags, settings", [
    ("neftune", ["--neftune-alpha", "7"], dict(alpha=7)), ("prompt", [], {}),
    ("gem", ["--gem-beta", "0.5"], dict(beta=0.5)), ("sam", ["--rho", "0.3"], dict(rho=0.3)),
    ("l1", ["--lam", "2"], dict(lam=1)), ("l2", ["--lam", "0.02"], dict(lam=0.01)),
    ("logit_kl", ["--lam", "2", "--alpha", "0.2"], dict(lam=1, alpha=0.2)),
    ("attached", ["--lam", "2", "--alpha", "0.2"], dict(lam=1, alpha=0.2))])
def test_a_baseline_gets_what_the_flags_say(tmp_path, words, monkeypatch, name, flags, settings):
    """Lambda is divided by the two micro-batches; the step's losses add up to the log's."""
    calls, honest = [], BASELINES[name]

    def spy(model, batch, **given):
        assert given == settings
        calls.append(honest(model, batch, **given))
        assert batch.divisor > len(batch.targets)  # the optimizer step's
        assert (0 in batch.positions) == (name == "prompt")  # the first token predicts a target
        return calls[-1]
    monkeypatch.setitem(BASELINES, name, spy)
    monkeypatch.setattr(train, "lfu_step", lambda *args: pytest.fail("that is LfU"))
    out, log = run(tmp_path, words, name, "--method", name, *flags, "--accumulate", "2",
                   "--max-steps", "1")
    assert len(calls) == 2
    assert log[0]["loss"] == pytest.approx(sum(r.get("loss", r["sft"]) for r in calls).item())
    assert log[0]["sft"] == pytest.approx(sum(r["sft"] for r in calls).item())
    saved = json.loads((out / "settings.json").read_text())
    assert saved["method"] == name


@pytest.mark.parametrize("flags, method, aux", [
    ([], "lfu", "lora"), (["--aux", "reps"], "lfu", "reps"), (["--aux", "none"], "sft", "none"),
    (["--method", "sft"], "sft", "none"), (["--method", "sft", "--aux", "none"], "sft", "none"),
    (["--lam", "0"], "sft", "none"),
    (["--method", "lfu", "--aux", "reps"], "lfu", "reps"), (["--method", "gem"], "gem", "none")])
def test_methods_and_their_synonyms(flags, method, aux):
    s = get_settings(flags)
    assert (s.method, s.aux) == (method, aux)


def test_every_baseline_has_its_flags():
    assert TAKES.keys() == {"lfu", *BASELINES}
    for name, step in BASELINES.items():
        assert set(TAKES[name].values()) <= inspect.signature(step).parameters.keys()
        s = get_settings(["--method", name])  # the defaults are the step's
        for flag, setting in TAKES[name].items():
            assert getattr(s, flag) == inspect.signature(step).parameters[setting].default


# ---- what train.py hands to the step ----

def handed_over(tmp_path, words, monkeypatch, *flags):
    """The arguments of every call of lfu_step: (batch, auxiliary, lam, alpha, layers, move,
    compare), with --accumulate 2 and no value a default's."""
    calls, honest = [], train.lfu_step

    def spy(model, batch, *args, **kwargs):
        bound = inspect.signature(honest).bind(model, batch, *args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return honest(model, batch, *args, **kwargs)
    monkeypatch.setattr(train, "lfu_step", spy)
    _, log = run(tmp_path, words, "spied", "--accumulate", "2", "--max-steps", "1", "--lam", "3",
                 "--alpha", "0.07", "--layers", "2-4", *flags)
    return calls, log


def test_the_step_gets_what_the_flags_say(tmp_path, words, monkeypatch):
    """Lambda divided by the micro-batches, alpha not; the layers; the divisor of the whole step."""
    calls, log = handed_over(tmp_path, words, monkeypatch, "--aux", "reps", "--move", "descent",
                             "--compare", "cosine")
    assert len(calls) == 2
    for call in calls:
        assert call["lam"] == 3 / 2 and call["alpha"] == 0.07 and call["layers"] == [2, 3, 4]
        assert call["auxiliary"] is AUXILIARIES["reps"]
        assert call["move"] is MOVES["descent"] and call["compare"] is DISTANCES["cosine"]
        assert call["batch"].divisor == sum(len(c["batch"].targets) for c in calls)
        assert call["batch"].loss_scale == 1 and call["batch"].other is None
    seeds = [call["batch"].generator.initial_seed() for call in calls]
    assert seeds == [micro_batch_seed(42, 0), micro_batch_seed(42, 4)]
    assert log[0]["loss"] == pytest.approx(log[0]["sft"] + 3 * log[0]["consistency"])
    assert len(log[0]["consistency_per_layer"]) == 3


def test_the_other_batch_is_another_one_with_its_own_divisor(tmp_path, words, monkeypatch):
    calls, _ = handed_over(tmp_path, words, monkeypatch, "--move", "other-batch", "--dtype", "fp16")
    for call in calls:
        own, other = call["batch"], call["batch"].other
        assert other.divisor == len(other.targets) and own.divisor > len(own.targets)
        assert own.loss_scale == 16 * own.divisor and other.loss_scale == 16 * other.divisor
        assert own.input_ids.shape != other.input_ids.shape or not own.input_ids.equal(
            other.input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("aux", ["lora", "reps", "inplace"])
def test_one_step_is_the_definition_on_the_same_micro_batches(tmp_path, words, monkeypatch, aux):
    """From the flags to the gradient before clipping: against tests/definitions.py, in float32."""
    calls, log = handed_over(tmp_path, words, monkeypatch, "--aux", aux)
    model = add_lora(load_model(BUNDLED, dtype=torch.float32),
                     generator=torch.Generator().manual_seed(42))
    total = {}
    for call in calls:
        batch = call["batch"]
        labels = torch.full_like(batch.input_ids, -100).flatten()
        labels[batch.positions + 1] = batch.targets
        gradient, _, _ = definition(
            model, batch.input_ids, labels.view_as(batch.input_ids), aux, lam=1.5, alpha=0.07,
            layers=[2, 3, 4], seed=batch.generator.initial_seed(), divisor=batch.divisor)
        total = {n: g + total.get(n, 0) for n, g in gradient.items()}
    assert log[0]["grad_norm"] == pytest.approx(total_norm(total.values()), rel=1e-4)


@pytest.mark.parametrize("length, warned", [("20", True), ("24", False)])
def test_long_examples_are_dropped_and_counted(tmp_path, words, capsys, length, warned):
    """With a warning where most are."""
    run(tmp_path, words, "d", "--aux", "none", "--max-len", length, "--max-steps", "1")
    text = capsys.readouterr().out
    kept, dropped = (int(text.split(word)[0].split()[-n])
                     for word, n in ((" examples kept", 1), (" dropped", 1)))
    assert 0 < kept < 12 and kept + dropped == 12
    assert ("warning  most examples are dropped" in text) == warned == (dropped > kept)


def test_control_characters_in_data_and_answers_do_not_reach_the_terminal(tmp_path, capsys,
                                                                         monkeypatch):
    """A colour, a cleared screen, a carriage return over what stands there: shown as escapes."""
    path = tmp_path / "words.jsonl"
    path.write_text(json.dumps({"question": "a\x1b[2Jb\rc\x07", "answer": "\x1b[31mred\x9b"}))
    monkeypatch.setattr(log, "generate", lambda model, prompts, **_: [
        load_tokenizer(BUNDLED).encode("\x1b]0;title\x07")] * len(prompts))
    run(tmp_path, path, "ansi", "--aux", "none", "--max-steps", "1")
    shown = capsys.readouterr().out
    assert r"a\x1b[2Jb\x0dc\x07" in shown and r"\x1b[31mred" in shown
    assert r"after   \x1b]0;title\x07" in shown
    assert all(c in "\n\t" or c.isprintable() for c in shown)


@pytest.mark.slow
def test_sft_says_nothing_of_what_it_has_not(tmp_path, words, capsys):
    run(tmp_path, words, "sft", "--aux", "none", "--max-steps", "1")
    shown = capsys.readouterr().out
    assert not any(word in shown for word in ("lambda", "alpha", "cons ", "share", "ascent |g|"))
    run(tmp_path, words, "lfu", "--max-steps", "1")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("lambda", "alpha", "cons ", "share", "ascent |g|"))


def test_a_full_folder_runs_new_is_in_nobodys_way(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "notes.txt").write_text("mine")
    flags = ["--data", str(words), "--aux", "none", "--max-steps", "1", "--batch-size", "2"]
    assert train.main(flags)[0] == Path("runs/none-000")
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match="output folder runs cannot be written: .* not a folder"):
        train.main(flags)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")])
def test_too_little_memory_is_one_line(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as exit_:
        system.command_line(main)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: out of memory: a smaller --batch-size")

    def other():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        system.command_line(other)


def test_a_screen_without_a_character_shows_a_question_mark():
    told = subprocess.run(
        [sys.executable, "-c", "from lfu_min.engine import system\n"
         "system.command_line(lambda: print('1 \u00b1 2 \u5b57'))"],
        cwd=system.ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (told.stdout, told.stderr, told.returncode) == ("1 ? 2 ?\n", "", 0)


def test_a_new_method_runs_with_its_defaults(monkeypatch):
    """An entry of BASELINES alone; TAKES is for flags of its own."""
    monkeypatch.setitem(BASELINES, "new", None)
    s = get_settings(["--method", "new"])
    assert method_settings(s, 2) == {} and s.aux == "none"
    with pytest.raises(ValueError, match="--lam 3.0 has no part in --method new"):
        get_settings(["--method", "new", "--lam", "3"])


@pytest.mark.parametrize("parameters, variable, there, threads", [
    (1e6, None, 1, [1]), (1e6, None, 2, [1]), (1e6, None, 7, [3]), (1e6, None, 64, [4]),
    (1e8, None, 8, []), (1e6, "4", 8, [])])
def test_small_models_take_half_of_the_threads_unless_told(monkeypatch, parameters, variable, there,
                                                           threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    calls = []
    monkeypatch.setattr(system, "THREADS", there)
    monkeypatch.setattr(torch, "get_num_threads", lambda: (calls or [there])[-1])
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    system.spare_threads(parameters)
    system.spare_threads(parameters)  # a second model
    assert calls == threads * 2


def test_pictures_and_runs_of_the_documents_are_ignored_by_git():
    names = ["scores.png", "scores.pdf", "runs/lora-000/log.jsonl", "build/lib/x", "merged/x"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a clone of the repository")
    assert done.stdout.split() == names


def test_encoding_says_how_far_it_is_every_30_seconds(monkeypatch, capsys):
    """Where no person looks on; on a terminal, in place and more often."""
    now = [100.0]
    monkeypatch.setattr(system.time, "time", lambda: now[0])
    report = log.encoding()
    for done, seconds in enumerate((100, 129, 131, 150, 162), 1):
        now[0] = seconds
        report(1000 * done, 9000)
    assert capsys.readouterr().err == (
        "encoding the data 3000/9000, 96.8/s, ETA 1 min 02 s\n"
        "encoding the data 5000/9000, 80.6/s, ETA 50 s\n")
    monkeypatch.setenv("RANK", "1")
    assert log.encoding() is None


BAD = [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--resume", ""], "--resume is empty"), (["--out", ""], "--out is empty"),
    (["--model", "nowhere", "--data", "WORDS"], "nowhere"),
    (["--model", "MODEL"], "--data"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--r", "0"], "--r"),
    (["--batch-size", "0"], "--batch-size"),
    (["--epochs", "-1"], "--epochs"), (["--accumulate", "0"], "--accumulate"),
    (["--max-steps", "0"], "--max-steps"),
    (["--alpha", "-0.1"], "--alpha"), (["--lam", "inf"], "--lam"), (["--lam", "nan"], "--lam"),
    (["--seed", "-1"], "--seed"), (["--layers", "0-3"], "layers"),
    (["--move", "up"], "--move"), (["--compare", "l3"], "--compare"), (["--epoch"], "--epoch"),
    (["--compare", "logit-kl", "--aux", "inplace", "--tune", "full"], "logit-kl"),
    (["--shard", "--move", "two-steps"], "two-steps"),
    (["--method", "adam"], "--method"), (["--method", "sam", "--aux", "reps"], "--aux reps"),
    (["--method", "gem", "--aux", "none"], "--aux none"), (["--rho", "0.1"], "--rho 0.1"),
    (["--method", "gem", "--neftune-alpha", "5"], "--neftune-alpha 5"),
    (["--method", "sft", "--lam", "5"], "--lam 5"), (["--method", "l1", "--alpha", "1"], "--alpha"),
    (["--method", "sft", "--aux", "lora"], "--aux lora"),
    (["--epochs", "1e308"], "--epochs 1e.308 should be a positive number below 1,000,000,000"),
    (["--r", "1000000000"], "--r 1000000000"), (["--r", "70000"], "r = 70000"),
    (["--max-steps", "9" * 4000], "--max-steps 9{40} should"), (["--seed", str(2**64)], "--seed"),
    (["--lora-alpha", "1e300"], "--lora-alpha"), (["--lam", "1e300"], "--lam"),
    (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl"), (["--eval-data", "LONG"], "max_len 256"),
    (["--aux", "none", "--gem-beta", "1"], "--gem-beta 1.0 has no part in --method sft"),
    *((["--aux", "none", *flag], flag[0]) for flag in (
        ["--alpha", "1"], ["--lam", "3"], ["--layers", "early"], ["--move", "random"],
        ["--compare", "cosine"])),
    (["--max-steps", "3", "--epochs", "2"], "leave one out"),
    (["--method", "sam", "--move", "descent"], "--move"),
    (["--method", "sam", "--shard"], "--shard"),
    (["--method", "gem", "--gem-beta", "0"], "--gem-beta"),
    (["--method", "sam", "--rho", "-1"], "--rho"),
    (["--method", "neftune", "--neftune-alpha", "inf"], "--neftune-alpha"),
    (["--layers", "3-9"], "layers"), (["--layers", "top"], "layers"),
    (["--max-len", "3"], "max_len"), (["--device", "tpu"], "device"),
    (["--out", "FULL"], "not empty"), (["--out", "WORDS"], "output folder"),
]


@pytest.mark.parametrize("flags, named", BAD,
                         ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_settings_are_refused_by_name_before_anything_is_written(tmp_path, words, flags, named,
                                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_model",
                        lambda *a: pytest.fail("the model was loaded before the settings were "
                                               "checked"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    (tmp_path / "full" / "long.jsonl").write_text(json.dumps({"question": "a " * 300,
                                                              "answer": "b"}))
    before = sorted(tmp_path.rglob("*"))
    names = {"WORDS": str(words), "FULL": str(tmp_path / "full"), "MODEL": str(BUNDLED),
             "LONG": str(tmp_path / "full" / "long.jsonl")}
    with pytest.raises(ValueError, match=named) as error:
        train.main(["--device", "cpu", "--data",
                    str(words)][: 2 if "--data" in flags or "MODEL" in flags else 4]
                   + [names.get(flag, flag) for flag in flags])
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_the_script_says_what_is_wrong_in_one_line_and_exits_with_2(tmp_path):
    for flags in (["--lr", "-1"], ["--aux", "nonsense"]):
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        line, = done.stderr.strip().splitlines()
        assert line.startswith(("error: --lr", "error: argument --aux"))
    assert list(tmp_path.iterdir()) == []


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path, words, monkeypatch):
    honest = train.lfu_step

    def broken(*args, **kwargs):
        return {**honest(*args, **kwargs), "sft": torch.tensor(math.nan)}
    monkeypatch.setattr(train, "lfu_step", broken)
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        run(tmp_path, words, "nan")


@pytest.mark.slow
@pytest.mark.parametrize("what, dtype", [("sft", "fp32"), ("grad", "fp32"), ("sft", "fp16")])
def test_the_examples_of_what_is_not_finite_are_named(tmp_path, words, monkeypatch, what, dtype):
    """By their numbers in the file, of the one micro-batch of the second step that is not finite;
    five of the twelve are dropped."""
    honest, step, seen = train.lfu_step, [], []
    texts = [json.loads(line)["question"] for line in words.read_text().splitlines()]
    tokenizer = load_tokenizer(BUNDLED)

    def broken(model, batch, *args, **kwargs):
        result = honest(model, batch, *args, **kwargs)
        step.append(1)
        if len(step) == 4:
            for ids in batch.input_ids.tolist():
                question = tokenizer.decode(ids).split("Question: ")[1].split("\n")[0]
                seen.append(texts.index(question) + 1)
            if what == "sft":
                return {**result, "sft": torch.tensor(math.nan)}
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)
            result["sft_grad_norm"] = torch.tensor(math.nan)
        return result
    monkeypatch.setattr(train, "lfu_step", broken)
    with pytest.raises(ValueError, match="step 2: the (loss|gradient's norm) is nan") as error:
        run(tmp_path, words, "nan", "--batch-size", "2", "--accumulate", "2", "--max-len", "24",
            "--dtype", dtype)
    assert f"(examples {', '.join(map(str, seen))})" in str(error.value) and len(seen) == 2
    assert "\n" not in str(error.value) and ("bf16" in str(error.value)) == (dtype == "fp16")


def test_where_nothing_of_this_process_is_wrong_all_of_the_step_is_named():
    plan = Plan([], 0, 2, 0, [[7, 8]], list(range(7, 30)))
    assert suspects(plan, [{"sft": torch.tensor(1.0)}]) == (
        "examples " + ", ".join(map(str, range(7, 27))) + " and 3 more")


@pytest.mark.parametrize("step, sft, smaller", [
    (1, 2.0, "--alpha"), (1, math.nan, "--lr"), (2, 2.0, "--lr")])
def test_a_loss_that_is_infinite_before_anything_was_learned_is_not_the_rates(step, sft, smaller):
    record = dict(step=step, loss=math.inf, sft=sft, grad_norm=1.0, ascent_norm=1.0)
    with pytest.raises(ValueError, match=f"the loss is inf .*try a smaller {smaller}"):
        usable(record, LossScale(), Plan([], 0, 1, 0, [[1]], [1]), [{}])


def scales_of(overflows, steps):
    """The loss scales of `steps` steps, of which those in `overflows` overflow."""
    scale, found = LossScale(16.0), []
    for step in range(1, steps + 1):
        found.append(scale.value)
        norm = math.inf if step in overflows else 1.0
        record = dict(step=step, loss=1.0, grad_norm=norm, ascent_norm=0.0)
        assert usable(record, scale, Plan([], 0, 1, 0, [[1]], [1]), [{}]) == (step not in overflows)
    return found


def test_the_loss_scale_grows_back_after_1000_good_steps(monkeypatch):
    """A long run with an overflow now and then goes on; the scale never exceeds its start."""
    found = scales_of({1, 2, 1002, 3500}, 6000)
    assert found[:3] == [16, 8, 4] and found[1000:1002] == [4, 4]  # 999 good ones: not yet
    assert set(found[1002:2002]) == {2} and set(found[2002:3002]) == {4}
    assert set(found[3002:3500]) == {8} and set(found[3500:4500]) == {4}
    assert set(found[4500:5500]) == {8} and set(found[5500:]) == {16}
    monkeypatch.setattr(loop, "GROW", 10**9)  # the planted mistake: it never grows back
    with pytest.raises(ValueError, match="the gradient's norm is inf"):
        scales_of(set(range(1, 60_000, 2000)), 60_000)
    monkeypatch.undo()
    assert scales_of(set(range(1, 60_000, 2000)), 60_000)[-1] == 16
    with pytest.raises(ValueError, match="step 15: the gradient's norm is inf"):
        scales_of(set(range(1, 30)), 30)  # but not where every step overflows


@pytest.mark.parametrize("step, movement, warns", [
    (1, [0.01, 0.31], True), (1, [0.01, 0.29], False), (2, [0.5], False), (1, [], False)])
def test_a_first_step_that_moves_a_layer_too_far_is_said(step, movement, warns):
    assert ("another model" in log.warning({"step": step, "movement": movement})) == warns


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_ascent_that_did_not_move_is_no_step(tmp_path, words, monkeypatch, dtype):
    """Eq 2's g overflows in the first step, the gradients do not: nothing is learned, which would
    be plain SFT, and the log has an ascent_norm of null. In float32 no scale can help."""
    honest, calls = train.lfu_step, []

    def overflowing(*args, **kwargs):
        result = honest(*args, **kwargs)
        calls.append(1)
        return {**result, "ascent_norm": torch.tensor(math.nan)} if len(calls) == 1 else result
    monkeypatch.setattr(train, "lfu_step", overflowing)
    if dtype == "fp32":
        with pytest.raises(ValueError, match="step 1: the ascent's gradient's norm is nan"):
            run(tmp_path, words, "g", "--dtype", dtype)
        return
    out, log = run(tmp_path, words, "g", "--dtype", dtype, "--max-steps", "2", "--save-every", "1",
                   "--keep", "2")
    assert [r["loss_scale"] for r in log] == [16, 8] and math.isfinite(log[0]["grad_norm"])
    assert log[0]["ascent_norm"] is None and log[1]["ascent_norm"] > 0
    weights = load_file(out / "checkpoints" / "step-000001" / "trained.safetensors")
    assert not any(t.any() for name, t in weights.items() if "lora_B" in name)


def test_a_float16_overflow_skips_the_step_and_halves_the_scale(tmp_path, words, monkeypatch):
    """The first gradient is made infinite: nothing is learned in that step, the next one runs at
    half the loss scale."""
    honest, scales = train.lfu_step, []

    def overflowing(model, batch, *args, **kwargs):
        result = honest(model, batch, *args, **kwargs)
        scales.append(batch.loss_scale / batch.divisor)
        if len(scales) == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return result
    monkeypatch.setattr(train, "lfu_step", overflowing)
    out, log = run(tmp_path, words, "fp16", "--dtype", "fp16", "--max-steps", "2")
    assert log[0]["grad_norm"] is None and log[1]["loss_scale"] == log[0]["loss_scale"] / 2
    assert scales == [16, 8]
    weights = load_file(str(out / "adapter_model.safetensors"))
    assert all(t.isfinite().all() for t in weights.values())
