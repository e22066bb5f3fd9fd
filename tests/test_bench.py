"""Claim: lfu_min.cost.bench times what it says. Both sides do the same SFT work on the same weights
(gradients within 1e-5 of each other); in matmul operations the authors' step costs three of their
SFT steps less a head's backward, ours two of ours less a head; no step leaves a weight changed;
what is printed, returned and written to --json is the same.

Nothing here asserts a time: times are the benchmark's own result, and a busy machine must not fail
a test.
"""
from contextlib import contextmanager
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import difference, quiet_transformers
from lfu_min.cost import bench
from lfu_min import model
from lfu_min.bundled import BUNDLED
from lfu_min.engine import system
from lfu_min.lora import add_lora, lora_modules

TINY = ["--shape", "bundled", "--batch", "2", "--tokens", "16", "--repeats", "2", "--device",
        "cpu", "--dtype", "fp32",
        "--no-memory"]


def settings(*more):
    return bench.get_settings([*TINY, *more])


def needs_peft():
    quiet_transformers()
    pytest.importorskip("peft", reason="needs peft (requirements-dev.txt)")


def pair(tune="lora"):
    """Our model and transformers' on the same weights, the adapters' A and B the same too and B not
    zero."""
    s = settings()
    torch.manual_seed(0)
    ours = bench.random_weights(s.config, s.device, torch.float32)
    theirs = bench.transformers_model(s.config, ours.state_dict(), tune, s.device)
    if tune == "lora":
        add_lora(ours)
        named = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, module in lora_modules(ours):
                for ab, tensor in (("A", module.lora_A), ("B", module.lora_B)):
                    named[f"base_model.model.{name}.lora_{ab}.default.weight"].copy_(tensor.normal_(0.0, 0.1))
    return ours, theirs, bench.make_batches(s.config, 2, 2, 16, s.device)


def gradients(model):
    """Trained parameters' gradients, under names that both sides share."""
    clean = lambda name: name.removeprefix("base_model.model.").replace(".default.weight", "")
    return {clean(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def flops(step, *args):
    with FlopCounterMode(display=False) as counter:
        step(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("tune", ("lora", "full"))
def test_their_sft_step_and_ours_give_the_same_gradients(tune):
    needs_peft()
    ours, theirs, batches = pair(tune)
    bench.our_step(ours, "none")(*batches)
    bench.their_sft_step(theirs)(*batches)
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys()
    assert max(difference(a[name], b[name]) for name in a) < 1e-5
    bench.their_sft_step(theirs)(batches[1], batches[0])  # the mistake: another batch
    c = gradients(theirs)
    assert min(difference(a[name], c[name]) for name in a) > 0.1


def test_without_a_step_the_authors_gradient_is_sfts_and_with_one_it_is_not():
    needs_peft()
    _, theirs, batches = pair()
    bench.their_sft_step(theirs)(*batches)
    sft = gradients(theirs)
    for alpha, same in ((0.0, True), (0.1, False)):
        bench.their_lfu_step(theirs, lam=5.0, alpha=alpha)(*batches)
        lfu = gradients(theirs)
        assert (max(difference(lfu[name], sft[name]) for name in sft) < 1e-5) == same


def test_the_authors_step_costs_three_of_their_sft_steps_less_one_backward_of_a_head():
    needs_peft()
    ours, theirs, batches = pair()
    # logits at all 2 x 16 positions
    head = 2 * 2 * 16 * ours.config.vocab_size * ours.config.hidden_size
    sft, lfu = (flops(make(theirs), *batches)
                for make in (bench.their_sft_step, bench.their_lfu_step))
    assert lfu == 3 * sft - head


@pytest.mark.parametrize("aux", ("lora", "reps", "inplace"))
def test_our_step_costs_two_of_our_sft_steps_less_a_head_and_a_wider_branch_for_lora(aux):
    s = settings()
    steps = bench.build(s, ["sft", aux])
    batches = bench.make_batches(s.config, 2, 2, 16, s.device)
    # both ways, at the supervised half alone
    head = 2 * 2 * (2 * 8) * s.config.vocab_size * s.config.hidden_size
    extra = flops(steps[aux], *batches) - (2 * flops(steps["sft"], *batches) - head)
    assert extra > 0 if aux == "lora" else extra == 0


@pytest.mark.parametrize("tune", ("lora", "full"))
def test_no_step_leaves_a_weight_changed(tune, monkeypatch):
    needs_peft()
    s, models = settings("--tune", tune), []
    for name in ("random_weights", "transformers_model"):
        make = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda *a,
                            make=make: models.append(make(*a)) or models[-1])
    steps = bench.build(s, [*bench.OURS, *bench.THEIRS])
    before = [p.detach().clone() for model in models for p in model.parameters()]
    for step in steps.values():
        step(*bench.make_batches(s.config, 2, 2, 16, s.device))
        assert all(torch.equal(p, old) for p, old in zip((p for model in models
                                                          for p in model.parameters()), before))


def test_a_batch_is_supervised_in_its_second_half_and_batches_differ():
    (ids, labels), (other, _) = bench.make_batches(bench.SHAPES["bundled"], 2, 3, 10,
                                                   torch.device("cpu"))
    assert ids.shape == (3, 10) and (labels[:,
                                            :5] == -100).all() and torch.equal(labels[:, 5:], ids[:, 5:])
    assert not torch.equal(ids, other)


def test_the_bundled_shape_is_the_bundled_model_and_the_others_have_their_names_sizes():
    bundled = BUNDLED / "config.json"
    if bundled.is_file():
        assert {**vars(bench.load_config(BUNDLED)), "max_position_embeddings": 0,
                "rms_norm_eps": 0} == \
            {**vars(bench.SHAPES["bundled"]), "max_position_embeddings": 0, "rms_norm_eps": 0}
    for name, millions in (("SmolLM2-135M", 134.5), ("Llama-3.2-1B", 1235.8),
                           ("Llama-3.1-8B", 8030.3)):
        with torch.device("meta"):
            model = bench.Llama(bench.SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_main_prints_returns_and_writes_the_same_results(tmp_path, capsys):
    file = tmp_path / "bench.json"
    out = bench.main([*TINY, "--cases", "reps", "inplace", "--json", str(file)])
    printed = capsys.readouterr().out
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(out))
    assert list(out["cases"]) == ["sft", "reps", "inplace"]  # sft always: the ratios need it
    for case, r in out["cases"].items():
        assert r["ms_min"] <= r["ms"] <= r["ms_max"] and len(r["ms_all"]) == 2
        assert r["tokens_per_s"] == pytest.approx(2 * 16 / r["ms"] * 1000)
        assert r["share_of_matmul_rate"] == pytest.approx(r["tflop"] / (r["ms"] / 1000) / out["matmul_tflops"])
        assert f"{case:10} {r['ms']:10.1f}" in printed
    assert out["cases"]["sft"]["ratio_to_sft"] == 1


@pytest.mark.slow
def test_sweep_and_profile_cover_each_case(capsys):
    out = bench.main([*TINY, "--cases", "reps", "--repeats", "1", "--sweep", "--profile"])
    assert [(row["what"], row["value"]) for row in out["sweep"]] == [
        ("tokens", 8), ("tokens", 16), ("tokens", 32), ("batch", 1), ("batch", 2), ("batch", 4),
        ("layers", 2), ("layers", 4), ("layers", 6)]
    assert all(set(row["ms"]) == {"sft", "reps"} for row in out["sweep"])
    assert capsys.readouterr().out.count("Self CPU time total") == 2


def test_without_transformers_our_own_steps_are_timed_and_a_line_says_so(monkeypatch, capsys):
    def absent(package):
        raise PackageNotFoundError(package)
    monkeypatch.setattr(bench, "version", absent)
    out = bench.main([*TINY, "--cases", "sft", "their-sft", "their-lfu"])
    assert list(out["cases"]) == ["sft"] and out["compared"] == []
    assert "transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("option, value",
                         [("--tokens", "1"), ("--batch", "0"), ("--repeats", "0"),
                          ("--device", "tpu")])
def test_bad_settings_are_named(option, value):
    with pytest.raises(ValueError, match=value):
        bench.main([*TINY, option, value])


@pytest.mark.slow
def test_the_command_line_measures_peak_memory_in_a_process_for_each_case(tmp_path):
    """Of 32 examples instead of one: their activations, at least 20 MiB more."""
    peaks = []
    for batch in ("1", "32"):
        file = tmp_path / f"{batch}.json"
        command = [sys.executable, "-m", "lfu_min.cost.bench", "--shape", "bundled", "--cases",
                   "lora", "--repeats", "1",
                   "--batch", batch, "--tokens", "64", "--device", "cpu", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(system.ROOT)})
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(file.read_text(encoding="utf-8"))["cases"])
    for case in ("sft", "lora"):
        assert peaks[1][case]["peak_mib"] > peaks[0][case]["peak_mib"] + 20


@pytest.mark.parametrize("kind, blocks", [(None, 2), ("both", 4), ("first", 3)])
def test_checkpointing_is_timed_as_train_py_does_it(kind, blocks):
    """Forwards of a block in one LfU step: two, each again where it is recomputed."""
    s = settings(*(["--activation-checkpointing", kind] if kind else []))
    batch, = bench.make_batches(s.config, 1, s.batch, s.tokens, s.device)
    with counted_blocks() as calls:
        bench.build(s, ["reps"])["reps"](batch, batch)
    assert len(calls) == blocks * s.config.num_hidden_layers


def test_evaluation_times_loading_tokenising_and_generation(tmp_path, capsys):
    data = BUNDLED / "data" / "word_problems_validation.jsonl"
    rows = bench.main(["--model", str(BUNDLED), "--evaluation", str(data), "--dtype",
                       "fp32", "--device", "cpu",
                       "--json", str(tmp_path / "out.json")])
    assert [r["what"] for r in rows] == ["loading", "tokenising 128 examples",
                                         "generating 8 x 64 tokens"]
    assert all(r["seconds"] > 0 and (r["faster"] is None or r["faster"] > 0) for r in rows)
    assert json.loads((tmp_path / "out.json").read_text())["evaluation"] == rows
    assert "generating 8 x 64 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--json no/where.json: the folder no does not exist"):
        settings("--json", "no/where.json")
    with pytest.raises(ValueError, match="--evaluation needs --model"):
        bench.main(["--evaluation", str(data)])


@contextmanager
def counted_blocks():
    calls, forward = [], model.Attention.forward
    try:
        model.Attention.forward = lambda self, *args: (calls.append(1), forward(self, *args))[1]
        yield calls
    finally:
        model.Attention.forward = forward
