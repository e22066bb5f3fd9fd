"""Claim: a run that was interrupted and goes on with --resume is the uninterrupted one, bit for bit
on the CPU: weights, optimizer state, learning rate, loss scale, order, draws, and a log without
gaps or doubles. Whatever ends it, there is a whole checkpoint, or none yet; what cannot go on is
refused in one line.

Interrupted are runs in this process, by a signal to itself or by an exception in the place of a
power cut. Slow: signals to the script, kill -9 of forks of this process (which have torch already)
at 50 random moments and before every operation on the disk, two processes of torchrun. Folders are
compared byte for byte; planted mistakes in what is restored are seen.
"""
import errno
import json
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file, save_file
import torch

from conftest import randomise
import eval as eval_script
import train
from lfu_min import load_adapter, load_model, save_model
from lfu_min.bundled import BUNDLED
from lfu_min.engine import system
from lfu_min.engine.system import ROOT
from lfu_min.model import Llama, LlamaConfig
from lfu_min.paper import jobs
from lfu_min.training import checkpoints, folder, log, loop
from lfu_min.training.checkpoints import latest, read_state, steps_in

STEPS = 5


class PowerCut(Exception):
    """Ends a run at once, as nothing in it expects."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny random model and the bundled tokenizer."""
    path = tmp_path_factory.mktemp("model") / "model"
    vocabulary = json.loads((BUNDLED / "config.json").read_text())["vocab_size"]
    save_model(randomise(Llama(LlamaConfig(vocabulary, 16, 24, 2, 2, 1, 8)), std=0.1), path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, path)
    return path


@pytest.fixture
def words(tmp_path, model):
    """Twelve short examples of different lengths, beside a link to the model."""
    return write_words(tmp_path, model)


def write_words(folder, model):
    (folder / "model").symlink_to(model)
    path = folder / "words.jsonl"
    rows = [{"question": f"What is {i} + {i + 1}?",
             "answer": "It is " + "so " * (i % 5) + str(2 * i + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    """The answers before and after take longer than these runs."""
    monkeypatch.setattr(log, "answers", lambda *args: [])


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def flags(words, out, *more):
    return ["--model", str(words.with_name("model")), "--data", str(words), "--out", str(out),
            "--device", "cpu", "--batch-size", "3", "--accumulate", "1", "--lr", "5e-3",
            "--max-len", "99", "--max-steps", str(STEPS), *more]


def start(words, out, *more):
    return train.main(flags(words, out, *more))


def resume(out, *more):
    return train.main(["--resume", str(out), *more])


def ended_after(step, how, run, *args):
    """Let run(*args) end after `step` was logged: by a signal to this process (then it exits with
    128 + its number), or by an exception that goes straight through."""
    honest = log.write

    def write(out, record):
        honest(out, record)
        if record["step"] == step and how is PowerCut:
            raise PowerCut
        if record["step"] == step:
            os.kill(os.getpid(), how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "write", write)
        if how is PowerCut:
            with pytest.raises(PowerCut):
                run(*args)
            return
        with pytest.raises(SystemExit) as ended:
            run(*args)
        assert ended.value.code == 128 + how


def changed_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def differences(one, two):
    """What differs in two run folders: names of files; of the log without its milliseconds."""
    def content(path):
        if path.name == "settings.json":
            return json.loads(path.read_text())["saved_sha256"]
        if path.name != "log.jsonl":
            return path.read_bytes()
        return [{**json.loads(line), "ms": 0} for line in path.read_text().splitlines()]
    files = [{str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()}
             for run in (one, two)]
    found = sorted(files[0].keys() ^ files[1].keys())
    return found + sorted(name for name in files[0].keys() & files[1].keys()
                          if content(files[0][name]) != content(files[1][name]))


# ---- the same run ----

ALL = ["--save-every", "1", "--keep", "9"]  # weights and optimizer of every step are compared
KINDS = {"lora": ["--aux", "lora"], "reps": ["--aux", "reps"], "inplace": ["--aux", "inplace"],
         "other-batch": ["--move", "other-batch"], "random": ["--move", "random"],
         "full": ["--tune", "full", "--lr", "1e-3"], "accumulate": ["--accumulate", "2"],
         "neftune": ["--method", "neftune"], "sft": ["--aux", "none"]}


def some(names, fast):
    """Parameters of a test, all but `fast` of them slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(KINDS, ["lora", "inplace", "full"]))
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, words, kind, monkeypatch):
    """Stopped by a signal after step 2; every checkpoint of steps 1 to 4, the log and what is saved
    are compared. Another global seed has no part in it, and nothing is unpickled."""
    one, two = tmp_path / "one", tmp_path / "two"
    torch.manual_seed(1)
    start(words, one, *ALL, *KINDS[kind])
    ended_after(2, signal.SIGTERM, start, words, two, *ALL, *KINDS[kind])
    torch.manual_seed(2)
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *args, **kw: pytest.fail("unpickled"))
    out, records = resume(two)
    assert len(steps_in(one)) == STEPS - 1 and not differences(one, two)
    assert out == two and [r["step"] for r in records] == [1, 2, 3, 4, 5]
    train.main(["--verify", str(two)])


@pytest.mark.slow
@pytest.mark.parametrize("aux", ["lora", "reps", "inplace", "none"])
def test_the_bundled_model_with_its_defaults_too(tmp_path, aux):
    """Twelve steps of 16 word problems; another process would not make a difference, see below."""
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["--aux", aux, "--max-steps", "12", "--device", "cpu", *ALL, "--keep", "12"]
    train.main([*command, "--out", str(one)])
    ended_after(5, signal.SIGINT, train.main, [*command, "--out", str(two)])
    ended_after(8, PowerCut, resume, two)
    resume(two)
    assert len(steps_in(one)) == 11 and not differences(one, two)


@pytest.mark.parametrize("cut", some([1, 3, 4, 5], [1, 4]))
def test_a_run_that_just_ends_goes_on_from_its_last_checkpoint(tmp_path, words, cut):
    """Checkpoints after steps 2 and 4, half a line in the log; without a checkpoint it begins
    again."""
    one, two = tmp_path / "one", tmp_path / "two"
    start(words, one, "--save-every", "2")
    ended_after(cut, PowerCut, start, words, two, "--save-every", "2")
    assert [p.name for p in steps_in(two)] == ([f"step-00000{(cut - 1) // 2 * 2}"] if cut > 2
                                               else [])
    with open(two / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    (two / "adapter_model.safetensors.7.tmp").write_text("half")
    resume(two)
    assert not differences(one, two)
    assert sorted(p.name for p in two.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "log.jsonl", "settings.json"]
    settings = json.loads((two / "settings.json").read_text())
    assert [r["after_step"] for r in settings["resumed"]] == [(cut - 1) // 2 * 2]


@pytest.mark.slow
def test_interrupted_again_and_again(tmp_path, words):
    """After each step once, in turns by Ctrl-C, SIGTERM and a power cut; after the last one only
    the adapter has still to be written."""
    one, two = tmp_path / "one", tmp_path / "two"
    start(words, one)
    ended_after(1, signal.SIGINT, start, words, two)
    for step, how in ((2, signal.SIGTERM), (3, PowerCut), (3, signal.SIGINT), (4, signal.SIGINT),
                      (5, signal.SIGTERM)):
        ended_after(step, how, resume, two)
        assert latest(two).name == f"step-00000{step - (how is PowerCut)}"
    resume(two)
    assert not differences(one, two)


@pytest.fixture
def overflowing(monkeypatch):
    """The first micro-batch's gradient is infinite, and the loss scale grows after two steps."""
    honest = train.lfu_step

    def step(model, batch, *args, **kwargs):
        result = honest(model, batch, *args, **kwargs)
        if batch.generator.initial_seed() == loop.micro_batch_seed(42, 0):
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return result
    monkeypatch.setattr(train, "lfu_step", step)
    monkeypatch.setattr(loop, "GROW", 2)


@pytest.mark.parametrize("cut", some([1, 2, 3], [2]))
def test_the_loss_scale_goes_on_too(tmp_path, words, overflowing, cut):
    """Halved in step 1 (then AdamW has no state yet), doubled after step 3."""
    one, two = tmp_path / "one", tmp_path / "two"
    _, records = start(words, one, *ALL, "--dtype", "fp16")
    assert [r["loss_scale"] for r in records] == [16, 8, 8, 16, 16]
    ended_after(cut, signal.SIGTERM, start, words, two, *ALL, "--dtype", "fp16")
    resume(two, "--dtype", "auto")
    assert not differences(one, two)


def without(ending):
    """read_tensors, with zeros for the tensors whose name ends so."""
    honest = checkpoints.read_tensors

    def read(file, shapes):
        found = honest(file, shapes)
        return {n: t * 0 if n.endswith(ending) else t for n, t in found.items()}
    return checkpoints, "read_tensors", read


def other_state(**changes):
    """read_state, with something else in it; a function gets what was there."""
    honest = checkpoints.read_state

    def read(path, run=None):
        state = honest(path, run)
        return {**state, **{n: f(state[n]) for n, f in changes.items()}}
    return checkpoints, "read_state", read


@pytest.mark.slow
@pytest.mark.parametrize("planted, seen", [
    (without(".exp_avg"), "adapter_model.safetensors"),
    (without(".exp_avg_sq"), "adapter_model.safetensors"),
    (without("layers.1.mlp.down_proj.lora_B.step"), "adapter_model.safetensors"),
    (without("layers.0.mlp.up_proj.lora_A"), "adapter_model.safetensors"),
    (other_state(step=lambda n: n - 1), "adapter_model.safetensors"),
    (other_state(token_scale=lambda x: 16.0), "log.jsonl"),
    (other_state(good_steps=lambda n: 0), "log.jsonl"),
    ((log, "cut", lambda run, steps: log.read(run, steps)[0]), "log.jsonl")],
    ids=["no exp_avg", "no exp_avg_sq", "AdamW's step of one weight", "one weight", "one step more",
         "no loss scale", "no count of good steps", "log not cut"])
def test_a_mistake_in_what_is_restored_is_seen(tmp_path, words, overflowing, planted, seen,
                                               monkeypatch):
    """A power cut after step 3, with a checkpoint after step 2."""
    one, two = tmp_path / "one", tmp_path / "two"
    start(words, one, "--dtype", "fp16")
    ended_after(3, PowerCut, start, words, two, "--dtype", "fp16", "--save-every", "2")
    monkeypatch.setattr(*planted)
    try:
        resume(two, "--save-every", "0")
    except ValueError as error:  # the run itself sees a record that stands twice
        assert seen in str(error)
    else:
        assert seen in differences(one, two)


def test_one_command_and_seed_give_one_log(tmp_path, words):
    for name in "ab":
        start(words, tmp_path / name)
    start(words, tmp_path / "c", "--seed", "43")
    assert not differences(tmp_path / "a", tmp_path / "b")
    assert "log.jsonl" in differences(tmp_path / "a", tmp_path / "c")


# ---- which checkpoints there are ----

@pytest.mark.parametrize("more, left", [
    (["--save-every", "2", "--keep", "3"], [2, 4]), (["--save-every", "1"], []),
    (["--save-every", "1", "--keep", "2"], [3, 4])])
def test_keep_says_how_many_are_left_of_a_finished_run(tmp_path, words, more, left, capsys):
    out, _ = start(words, tmp_path / "out", *more)
    assert [int(p.name[5:]) for p in steps_in(out)] == left
    assert (out / "checkpoints").exists() == bool(left)
    capsys.readouterr()
    assert len(resume(out)[1]) == STEPS  # and a finished run says so in a line
    assert capsys.readouterr().out == f"{out} is finished: all 5 steps are done and saved\n"
    eval_script.main([str(out), "--prompt", "What is 1 + 2?", "--max-new-tokens", "2"])


def test_one_checkpoint_is_kept_while_a_run_goes_on(tmp_path, words):
    ended_after(4, PowerCut, start, words, tmp_path / "out", "--save-every", "1")
    assert [p.name for p in steps_in(tmp_path / "out")] == ["step-000003"]
    ended_after(3, signal.SIGTERM, start, words, tmp_path / "none", "--save-every", "0")
    assert [p.name for p in steps_in(tmp_path / "none")] == ["step-000003"]


def test_an_unfinished_run_is_not_scored(tmp_path, words):
    ended_after(2, signal.SIGTERM, start, words, tmp_path / "out")
    with pytest.raises(ValueError, match="has not finished: python train.py --resume"):
        eval_script.main([str(tmp_path / "out"), "--prompt", "a"])


def test_a_second_ctrl_c_stops_at_once_and_one_sent_twice_does_not(monkeypatch, capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), system.stop_signals() as stop:
        assert stop.code == 0
        for seconds in (0, 0.1, 5):
            now[0] = seconds
            signal.raise_signal(signal.SIGINT)
            assert stop.code == 130 and seconds < 5
    assert capfd.readouterr().err.count("again stops at once") == 1
    with system.stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.code == 143
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with system.stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.code == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_script_leaves_sigterm_as_it_was():
    def main():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(SystemExit) as ended:
        system.command_line(main)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- what can go wrong ----

class FullDisk:
    """A file to which half a line can still be written."""

    def __init__(self, path, *args, **kwargs):
        self.file = path.open("a")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[:len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, words, what):
    resource = pytest.importorskip("resource", reason="limits the size of files, as a full disk")
    one, two = tmp_path / "one", tmp_path / "two"
    start(words, one)
    ended_after(2, signal.SIGTERM, start, words, two)
    before = {p.name: p.read_bytes() for p in latest(two).iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    named = "step-000003" if what == "checkpoint" else "log.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        if what == "log":
            patch.setattr(log, "open", FullDisk, raising=False)
        else:  # the log still fits
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        try:
            with pytest.raises(ValueError, match=f"{named} cannot be written: (File too large|No "
                                                 "space left on device)") as error:
                resume(two, "--save-every", "1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and f"train.py --resume {two}" in str(error.value)
    assert [p.name for p in (two / "checkpoints").iterdir()] == ["step-000002"]
    assert {p.name: p.read_bytes() for p in latest(two).iterdir()} == before
    resume(two)
    assert not differences(one, two)


def test_an_error_of_the_system_when_the_result_is_saved_loses_no_training(tmp_path, words):
    with pytest.MonkeyPatch.context() as patch:
        def lost(*arguments, **more):
            raise OSError(errno.ESTALE, "Stale file handle")
        patch.setattr(train, "save_adapter", lost)
        with pytest.raises(ValueError, match="Stale file handle; the run is not finished, its last "
                                             "checkpoint is step-000005: python train.py"):
            start(words, tmp_path / "out", "--save-every", "0")
    resume(tmp_path / "out")
    assert folder.finished(tmp_path / "out")


def test_what_cannot_be_tidied_does_not_make_a_finished_run_fail(tmp_path, words, monkeypatch):
    def busy(*paths):
        raise OSError(errno.EACCES, "denied")
    monkeypatch.setattr(folder, "remove_half_written", busy)
    out, _ = start(words, tmp_path / "out", "--save-every", "0")
    assert folder.finished(out)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_full_disk_when_the_result_is_saved_is_one_line_and_loses_no_training(tmp_path, words,
                                                                               tune):
    """Nothing half written stands under the adapter's or the model's name. A checkpoint of all that
    was trained is left, and --resume ends the run as if the disk had never been full. Where it is
    too full for that as well, the error promises nothing."""
    resource = pytest.importorskip("resource", reason="limits the size of files, as a full disk")
    one, two = tmp_path / "one", tmp_path / "two"
    start(words, one, "--tune", tune)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest = train.save

    def save(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            honest(*args)
        finally:
            if not stays_full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for stays_full, out, left in ((False, two, "its last checkpoint is step-000005: python "
                                                f"train.py --resume {two}"),
                                  (True, tmp_path / "three", "and has no checkpoint to go on from: "
                                                             "train again")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "save", save)
            try:
                with pytest.raises(ValueError, match=" cannot be written: ") as error:
                    start(words, out, "--tune", tune, "--save-every", "0")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(f"; the run is not finished, {left}")
        assert not [*out.glob("*.safetensors"), *out.rglob("*.tmp")]
    resume(two)
    assert not differences(one, two)


def test_what_ends_the_answers_afterwards_loses_nothing(tmp_path, words, monkeypatch):
    """All is saved before the model is asked again."""
    asked = []

    def answers(*args):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return []
    monkeypatch.setattr(log, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        start(words, tmp_path / "out")
    assert folder.finished(tmp_path / "out")
    train.main(["--verify", str(tmp_path / "out")])


@pytest.mark.parametrize("when, file", [("write", "log.jsonl"), ("after", "step-000003")])
def test_a_folder_that_vanishes_is_one_line(tmp_path, words, monkeypatch, when, file):
    out, owner = tmp_path / "out", log if when == "write" else checkpoints.Checkpoints
    honest = getattr(owner, when)

    def vanishing(first, last):
        if last == 3 or isinstance(last, dict) and last["step"] == 3:
            shutil.rmtree(out)
        return honest(first, last)
    monkeypatch.setattr(owner, when, vanishing)
    with pytest.raises(ValueError, match=f"{file} cannot be written: No such file") as error:
        start(words, out, "--save-every", "1")
    assert "\n" not in str(error.value) and not out.exists()


@pytest.fixture(scope="module")
def halted(tmp_path_factory, model):
    """A run that was stopped after step 2, beside its model and data; not to be changed."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "answers", lambda *args: [])
        words = write_words(folder, model)
        ended_after(2, signal.SIGTERM, start, words, folder / "out")
    return folder / "out"


@pytest.fixture
def stopped(tmp_path, halted):
    """A copy of that run, of its model and data."""
    shutil.copytree(halted.parent, tmp_path, dirs_exist_ok=True)
    changed_json(tmp_path / "out" / "settings.json", model=str(tmp_path / "model"),
                 data=str(tmp_path / "words.jsonl"))
    return tmp_path / "out"


def refused(out, named, *more):
    record = out / "settings.json"
    before = record.read_bytes() if record.is_file() else None
    with pytest.raises(ValueError, match=named) as error:
        resume(out, *more)
    assert "\n" not in str(error.value)
    assert before is None or record.read_bytes() == before, "nothing is recorded"


@pytest.mark.parametrize("more", [
    "--lr 0.1", "--aux reps", "--aux none", "--lam 2", "--alpha 1", "--layers early",
    "--move random", "--compare cosine", "--method sam", "--tune full", "--r 4", "--lora-alpha 8",
    "--max-steps 9", "--epochs 1", "--batch-size 4", "--accumulate 2", "--seed 1", "--dtype bf16",
    "--template alpaca", "--max-len 98", "--shard", "--out elsewhere", "--keep 0"])
def test_other_settings_are_refused_by_name(halted, more):
    refused(halted, more.split()[0], *more.split())


def test_the_same_settings_and_harmless_ones_are_not(stopped, tmp_path):
    shutil.move(tmp_path / "words.jsonl", tmp_path / "moved.jsonl")
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    refused(stopped, "words.jsonl is gone; .* name it with --data", "--model",
            str(tmp_path / "elsewhere"))
    resume(stopped, "--model", str(tmp_path / "elsewhere"), "--data", str(tmp_path / "moved.jsonl"),
           "--save-every", "1", "--keep", "1", "--device", "cpu", "--max-steps", "5", "--aux",
           "lora", "--lr", "5e-3", "--dtype", "auto", "--activation-checkpointing",
           "--out", str(stopped))


def test_all_that_is_gone_is_said_at_once_and_eval_data_may_be_another(stopped, tmp_path):
    shutil.move(tmp_path / "words.jsonl", tmp_path / "moved.jsonl")
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    refused(stopped, "model is gone; if .* --model; data .*words.jsonl is gone; .* with --data")
    changed_json(stopped / "settings.json", eval_data=str(tmp_path / "none.jsonl"))
    refused(stopped, "none.jsonl is gone; if it lies elsewhere now, or another file will do")


def test_another_model_or_other_data_are_refused_by_name(stopped, tmp_path):
    for name in ("words.jsonl", "model/config.json", "model/tokenizer.json",
                 "model/model.safetensors"):
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(whole + b" ")
        refused(stopped, f"{file.name} has changed")
        file.write_bytes(whole)
    for unread in ("vocab.json", "tokenizer.model", "model.safetensors.index.json"):
        (tmp_path / "model" / unread).write_text("")
    template = tmp_path / "model" / "chat_template.jinja"  # a file of its own would be read first
    template.write_text("")
    refused(stopped, "chat_template.jinja has appeared")
    template.unlink()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "weights")
    refused(stopped, "model.safetensors is gone")


@pytest.mark.parametrize("changes, named", [
    (dict(lr=0.5), "step-000002 belongs to a run with another lr"), (dict(lr="fast"), "lr"),
    (dict(processes=2), "runs with 2 processes"), (dict(aux="up"), "aux"),
    (dict(data_sha256="0"), "words.jsonl has changed"), (dict(lam=None), "has no lam"),
    (dict(model_sha256=None), "model_sha256"), (dict(max_steps=7), "another max_steps")])
def test_a_record_that_was_changed_is_refused_by_name(stopped, changes, named):
    changed_json(stopped / "settings.json", **changes)
    refused(stopped, named)


@pytest.mark.parametrize("changes, named", [
    (dict(model=5), "has no model"), (dict(data=None), "has no data"),
    (dict(resumed=5), "has no resumed"), (dict(saved_sha256="0"), "has no saved_sha256")])
def test_a_record_of_another_form_is_refused_by_name(stopped, changes, named):
    changed_json(stopped / "settings.json", **changes)
    refused(stopped, named)
    with pytest.raises(ValueError, match=named):
        train.main(["--verify", str(stopped)])


def log_of(checkpoint):
    return checkpoint.parent.parent / "log.jsonl"


def record_of(checkpoint):
    return checkpoint.parent.parent / "settings.json"


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def other_tensors(path, change):
    tensors = load_file(path)
    name = sorted(tensors)[0]
    change(tensors, name)
    save_file(tensors, path)


DAMAGE = {
    "trained.safetensors cannot be read": lambda p: half(p / "trained.safetensors"),
    "optimizer.safetensors cannot be read": lambda p: half(p / "optimizer.safetensors"),
    "trained.safetensors .*missing": lambda p: (p / "trained.safetensors").unlink(),
    "optimizer.safetensors cannot be": lambda p: (p / "optimizer.safetensors").unlink(),
    "state.json is missing": lambda p: (p / "state.json").unlink(),
    "state.json, line 1: not valid": lambda p: (p / "state.json").write_text("{"),
    "state.json has no usable step, token": lambda p: (p / "state.json").write_text("{}"),
    "no usable good_steps": lambda p: changed_json(p / "state.json", good_steps="1"),
    "state.json has no usable step:": lambda p: changed_json(p / "state.json", step=3),
    "trained.safetensors does not fit the run: missing": lambda p: other_tensors(
        p / "trained.safetensors", lambda t, n: t.pop(n)),
    "optimizer.safetensors does not fit the run: missing": lambda p: other_tensors(
        p / "optimizer.safetensors", lambda t, n: t.pop(n)),
    "has shape": lambda p: other_tensors(
        p / "trained.safetensors", lambda t, n: t.update({n: t[n][:1].clone()})),
    "stored as torch.float16": lambda p: other_tensors(
        p / "optimizer.safetensors", lambda t, n: t.update({n: t[n].half()})),
    "log.jsonl ends with step 1": lambda p: log_of(p).write_text(
        log_of(p).read_text().splitlines()[0] + "\n"),
    "log.jsonl, line 1: the record of step 1 should": lambda p: log_of(p).write_text(
        log_of(p).read_text().replace('"ms": ', '"ms": "x", "was": ')),
    "log.jsonl, line 1: the record of step 1": lambda p: log_of(p).write_text(
        "\n".join(log_of(p).read_text().splitlines()[::-1]) + "\n"),
    "settings.json is missing": lambda p: record_of(p).unlink(),
    "settings.json has no accumulate": lambda p: record_of(p).write_text("{}"),
    "no such folder": lambda p: shutil.rmtree(p.parent.parent)}


@pytest.mark.parametrize("named", DAMAGE)
def test_what_is_damaged_is_one_line(stopped, named):
    DAMAGE[named](latest(stopped))
    refused(stopped, named)


def test_a_run_that_still_runs_is_not_resumed(stopped):
    pytest.importorskip("fcntl", reason="the lock is POSIX's")
    with folder.locked(stopped):
        refused(stopped, "is in use: another process trains there")
    resume(stopped)


@pytest.mark.parametrize("path", ["same", None])
def test_runs_that_start_in_one_moment_share_no_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    ready, got = threading.Barrier(8), []

    def take():
        ready.wait()
        try:
            got.append(folder.make_out(path, "lora"))
        except ValueError as error:
            assert "was just taken" in str(error)
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(got)) == len(got) == (1 if path else 8)


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "nothing"])
def test_a_sweeps_interrupted_run_ends_as_if_it_had_not_been(tmp_path, words, monkeypatch, saved):
    """Gone on with from its checkpoint; begun anew where it left none."""
    setting = {"model": str(words.with_name("model")), "data": str(words), "max-steps": "2",
               "max-len": "99", "device": "cpu"}
    ended_after(1, signal.SIGTERM, start, words, tmp_path / "run")
    if not saved:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr(jobs, "train_script", lambda: train)
    run = jobs.trained(setting, tmp_path)
    assert (run / "adapter_model.safetensors").is_file()
    assert len((run / "log.jsonl").read_text().splitlines()) == (5 if saved else 2), "its own steps"


# ---- --verify ----

def test_verify_says_what_is_no_longer_what_it_was(stopped, tmp_path, capsys):
    words = tmp_path / "words.jsonl"
    with pytest.raises(ValueError, match="the run has not finished"):
        train.main(["--verify", str(stopped)])
    resume(stopped)
    capsys.readouterr()
    train.main(["--verify", str(stopped)])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{stopped}: as recorded: model") and str(words) in line
    changes = {words: "data .*words.jsonl has changed",
               tmp_path / "model" / "model.safetensors": "model.safetensors has changed",
               stopped / "adapter_model.safetensors": "adapter_model.safetensors has changed"}
    for file, named in changes.items():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=named):
            train.main(["--verify", str(stopped)])
        file.write_bytes(whole)
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("")
    with pytest.raises(ValueError, match="model: chat_template.jinja has appeared"):
        train.main(["--verify", str(stopped)])
    template.unlink()
    (tmp_path / "model" / "README.md").write_text("nobody reads it")
    train.main(["--verify", str(stopped)])
    (stopped / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json is gone"):
        train.main(["--verify", str(stopped)])
    for more in ("--lam=3", f"--resume={stopped}", "--out=x"):
        with pytest.raises(ValueError, match=f"{more[:5]}.* has no part in --verify"):
            train.main(["--verify", str(stopped), more])


# ---- other processes ----

def logged(out):
    file = out / "log.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(happened, process=None, seconds=120):
    until = time.time() + seconds
    while not happened():
        assert time.time() < until and (process is None or process.poll() is None)
        time.sleep(0.005)


@pytest.mark.slow
def test_the_script_stops_at_signals_and_says_how_to_go_on(tmp_path, words):
    """Ctrl-C, then SIGTERM of the run that goes on by the very command that was printed."""
    out = tmp_path / "a run"
    command = [sys.executable, str(ROOT / "train.py"), *flags(words, out)]
    command[command.index("--max-steps") + 1] = "100000"
    for number in (signal.SIGINT, signal.SIGTERM):
        before = logged(out)
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        wait_for(lambda: logged(out) > before + 2, process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "Traceback" not in stderr
        done = int(latest(out).name[5:])
        assert before < done == logged(out)
        line = f"stopped after step {done}; go on with: "
        said = stderr.splitlines()[-1]
        assert said.startswith(line)
        words_of_it = shlex.split(said.removeprefix(line))
        assert words_of_it == ["python", "train.py", "--resume", str(out)]
        command = [sys.executable, *words_of_it[1:]]
    log.read(out, done)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path, script):
    process = subprocess.Popen([sys.executable, "-c", "import os, runpy, sys\n"
                                "class CtrlC:\n"
                                "    def find_spec(name, path, target=None):\n"
                                "        if name == 'torch.nn': os.kill(os.getpid(), 2)\n"
                                "sys.meta_path.insert(0, CtrlC)\n"
                                "runpy.run_path(sys.argv[1], run_name='__main__')",
                                str(ROOT / script), "--out", str(tmp_path / "out")],
                               stderr=subprocess.PIPE, text=True)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and stderr == ""


def forked(argv, kill_before=None):
    """The process id of a fork of this process that runs train.main(argv), silently. kill_before:
    kills itself before this operation on the disk, counted from 1."""
    child = os.fork()
    if child:
        return child
    code, count = 1, 0

    def counted(operation):
        def do(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return do
    try:
        for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        train.main(argv)
        code = 0
    finally:
        os._exit(code)


def check_whole(run):
    """What is called a checkpoint is whole, and its steps are logged."""
    for path in steps_in(run):
        weights, moments = (load_file(path / f"{name}.safetensors")
                            for name in ("trained", "optimizer"))
        assert len(moments) == 3 * len(weights) > 0
        log.read(run, read_state(path)["step"])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks this process")


@pytest.mark.slow
@needs_fork
def test_kill_9_at_50_random_moments_leaves_a_checkpoint_that_loads(tmp_path, words):
    """A checkpoint after every step, so that many a kill meets one being written. In the end the
    checkpoint is that of a run that nothing ever stopped."""
    out, rng, saving = tmp_path / "out", random.Random(0), 0
    start(words, tmp_path / "warm")  # what is loaded once is loaded before the forks
    argv = flags(words, out, "--save-every", "1")
    argv[argv.index("--max-steps") + 1] = "100000"
    for _ in range(50):
        before = logged(out)
        child = forked(argv if before == 0 else ["--resume", str(out)])
        wait_for(lambda: logged(out) > before or os.waitpid(child, os.WNOHANG)[0])  # must not end
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        saving += any((out / "checkpoints").glob("*.tmp"))
        check_whole(out)
    assert saving > 0
    done = int(latest(out).name[5:])
    ended_after(done + 1, signal.SIGTERM, resume, out)
    print(f"50 kills, {saving} of them while a checkpoint was written, {done} steps")
    argv[argv.index(str(out))] = str(tmp_path / "one")
    ended_after(done + 1, signal.SIGTERM, train.main, argv)
    assert not differences(tmp_path / "one", out)


@pytest.mark.slow
@needs_fork
def test_a_kill_before_any_operation_on_the_disk_is_survived(tmp_path, words):
    """Instead of random moments: before the first call that renames, synchronises or removes, then
    before the second one, and so on, from the folder's first file to the last checkpoint's removal.
    There is no adapter, or a whole one, and the run goes on to the same end."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--save-every", "1", "--max-steps", "3"]
    start(words, one, *more)
    model, survived = words.with_name("model"), 0
    while os.waitpid(forked(flags(words, two, *more), kill_before=survived + 1), 0)[1]:
        survived += 1
        if (two / "adapter_config.json").exists():
            load_adapter(load_model(model), two)
        check_whole(two)
        if (two / "settings.json").exists():
            resume(two)
            assert not differences(one, two)
        else:
            assert survived <= 3  # the folder has just been made
        shutil.rmtree(two, ignore_errors=True)
    print(f"killed before each of {survived} operations")
    assert survived > 30


# One process alone gets SIGTERM, after its second step.
STOPS = """
import os
import signal
import sys
import train
from lfu_min.engine import system
from lfu_min.training import checkpoints
honest = checkpoints.Checkpoints.after
def after(self, step):
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    honest(self, step)
checkpoints.Checkpoints.after = after
system.command_line(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "shard"])
def test_torchrun_stops_all_processes_and_goes_on(tmp_path, words, shard):
    if shard and torch.__version__ < (2, 9):
        pytest.skip("--shard on the CPU needs torch 2.9 or newer")
    (tmp_path / "stops.py").write_text(STOPS)
    more = [*ALL, *(["--shard", "--tune", "full", "--lr", "1e-3"] if shard else [])]

    def torchrun(*command):
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                               "2", *command], cwd=tmp_path, timeout=600, capture_output=True,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                              "PYTHONPATH": str(ROOT)})
    script = str(ROOT / "train.py")
    done = torchrun(script, *flags(words, tmp_path / "one", *more))
    assert done.returncode == 0, done.stderr
    done = torchrun("stops.py", *flags(words, tmp_path / "two", *more))
    assert done.returncode != 0
    assert ("stopped after step 2; go on with: torchrun --nproc-per-node 2 train.py --resume"
            in done.stderr), done.stderr
    assert latest(tmp_path / "two").name == "step-000002"
    refused(tmp_path / "two", "--shard needs several processes" if shard else
            "runs with 2 processes, not 1: torchrun --nproc-per-node 2")
    done = torchrun(script, "--resume", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert not differences(tmp_path / "one", tmp_path / "two")
