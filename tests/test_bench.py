"""Claim: lfu_min.cost.bench times what it says. Both sides do the same SFT work on the same weights
(gradients within 1e-5 of each other); in matmul operations the authors' step costs three of their
SFT steps less a head's backward, ours two of ours less a head; no step leaves a weight changed;
what is printed, returned and written to --json is the same.

Nothing here asserts a time: times are the benchmark's own result, and a busy machine must not fail
a test.
"""
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import difference, quiet_transformers
from lfu_min import model
from lfu_min.bundled import BUNDLED
from lfu_min.cost import bench, count, peers
from lfu_min.engine import system
from lfu_min.files.checkpoint import load_config
from lfu_min.lora import add_lora, lora_modules

pytestmark = pytest.mark.slow

TINY = ["--shape", "tiny", "--batch", "2", "--tokens", "16", "--repeats", "2", "--device", "cpu",
        "--dtype", "fp32", "--no-memory"]
DATA = BUNDLED / "data" / "word_problems_validation.jsonl"


@pytest.fixture(autouse=True)
def two_layers(monkeypatch):
    """The bundled shape with fewer layers, as --shape tiny."""
    config = replace(bench.SHAPES["bundled"], num_hidden_layers=2)
    monkeypatch.setitem(bench.SHAPES, "tiny", config)


def settings(*more):
    return bench.get_settings([*TINY, *more])


def two_batches():
    return bench.make_batches(bench.SHAPES["tiny"], 2, 2, 16, torch.device("cpu"))


def needs_peft():
    quiet_transformers()
    pytest.importorskip("peft", reason="needs peft (requirements-dev.txt)")


@torch.no_grad()
def pair(tune="lora"):
    """Our model and transformers' on the same weights, the adapters' A and B the same too and B not
    zero."""
    needs_peft()
    s = settings()
    torch.manual_seed(0)
    ours = count.fresh_model(s.config, torch.float32)
    theirs = peers.transformers_model(s.config, ours.state_dict(), tune, s.device)
    if tune == "lora":
        named = dict(theirs.named_parameters())
        for name, module in lora_modules(add_lora(ours)):
            for ab in "AB":
                tensor = getattr(module, f"lora_{ab}").normal_(0.0, 0.1)
                named[f"base_model.model.{name}.lora_{ab}.default.weight"].copy_(tensor)
    return ours, theirs


def gradients(model):
    """Trained parameters' gradients, under names that both sides share."""
    clean = lambda name: name.removeprefix("base_model.model.").replace(".default.weight", "")
    return {clean(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def flops(step, batches):
    with FlopCounterMode(display=False) as counter:
        step(*batches)
    return counter.get_total_flops()


# ---- both sides do the work they are said to do ----

@pytest.mark.slow
@pytest.mark.parametrize("tune", ("lora", "full"))
def test_their_sft_step_and_ours_give_the_same_gradients(tune):
    ours, theirs = pair(tune)
    one, other = two_batches()
    bench.our_step(ours, "none")(one, other)
    peers.their_sft_step(theirs)(one, other)
    a = gradients(ours)
    assert difference(a, gradients(theirs)) < 1e-5
    peers.their_sft_step(theirs)(other, one)  # the mistake: another batch
    c = gradients(theirs)
    assert min(difference(a[name], c[name]) for name in a) > 0.1


def test_without_a_step_the_authors_gradient_is_sfts_and_with_one_it_is_not():
    _, theirs = pair()
    peers.their_sft_step(theirs)(*two_batches())
    sft = gradients(theirs)
    for alpha, same in ((0.0, True), (0.1, False)):
        peers.their_lfu_step(theirs, lam=5.0, alpha=alpha)(*two_batches())
        assert (difference(gradients(theirs), sft) < 1e-5) == same


def test_the_authors_step_costs_three_of_their_sft_steps_less_one_backward_of_a_head():
    ours, theirs = pair()
    # logits at all 2 x 16 positions
    head = 2 * 2 * 16 * ours.config.vocab_size * ours.config.hidden_size
    sft, lfu = (flops(make(theirs), two_batches())
                for make in (peers.their_sft_step, peers.their_lfu_step))
    assert lfu == 3 * sft - head


@pytest.mark.parametrize("aux", ("lora", "reps", "inplace"))
def test_our_step_costs_two_of_our_sft_steps_less_a_head_and_a_wider_branch_for_lora(aux):
    s = settings()
    steps = bench.build(s, ["sft", aux])
    # both ways, at the supervised half alone
    head = 2 * 2 * (2 * 8) * s.config.vocab_size * s.config.hidden_size
    sft, lfu = (flops(step, two_batches()) for step in steps.values())
    extra = lfu - (2 * sft - head)
    assert extra > 0 if aux == "lora" else extra == 0


@pytest.mark.parametrize("tune", ("lora", "full"))
def test_no_step_leaves_a_weight_changed(tune, monkeypatch):
    needs_peft()
    models = []
    for module, name in ((bench, "fresh_model"), (peers, "transformers_model")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, make=make:
                            models.append(make(*args)) or models[-1])
    steps = bench.build(settings("--tune", tune), [*bench.OURS, *bench.THEIRS])
    weights = [p for model in models for p in model.parameters()]
    before = [p.detach().clone() for p in weights]
    assert len(models) == 2 and len(steps) == 6
    for step in steps.values():
        step(*two_batches())
        assert all(torch.equal(p, old) for p, old in zip(weights, before))


def test_a_batch_is_supervised_in_its_second_half_and_batches_differ():
    batches = bench.make_batches(bench.SHAPES["bundled"], 2, 3, 10, torch.device("cpu"))
    (ids, labels), (other, _) = batches
    assert ids.shape == (3, 10) and (labels[:, :5] == -100).all()
    assert torch.equal(labels[:, 5:], ids[:, 5:])
    assert not torch.equal(ids, other)


def test_the_bundled_shape_is_the_bundled_model_and_the_others_have_their_names_sizes():
    rest = dict(max_position_embeddings=0, rms_norm_eps=0)
    assert {**vars(load_config(BUNDLED)), **rest} == {**vars(bench.SHAPES["bundled"]), **rest}
    for name, millions in (("SmolLM2-135M", 134.5), ("Llama-3.2-1B", 1235.8),
                           ("Llama-3.1-8B", 8030.3)):
        with torch.device("meta"):
            sizes = [p.numel() for p in model.Llama(bench.SHAPES[name]).parameters()]
        assert sum(sizes) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("flags, passes", [([], 2), (["--activation-checkpointing"], 4)])
def test_checkpointing_is_timed_as_train_py_does_it(flags, passes, monkeypatch):
    """Forwards of a block in one LfU step: two, each again where it is recomputed."""
    calls, forward, s = [], model.Attention.forward, settings(*flags)
    monkeypatch.setattr(model.Attention, "forward",
                        lambda self, *args: calls.append(1) or forward(self, *args))
    bench.build(s, ["reps"])["reps"](*two_batches())
    assert len(calls) == passes * s.config.num_hidden_layers


# ---- the command ----

def test_main_prints_returns_and_writes_the_same_results(tmp_path, capsys):
    file = tmp_path / "bench.json"
    out = bench.main([*TINY, "--cases", "reps", "inplace", "--json", str(file)])
    printed = capsys.readouterr().out
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(out))
    assert list(out["cases"]) == ["sft", "reps", "inplace"]  # sft always: the ratios need it
    rate = out["matmul_tflops"]
    for case, r in out["cases"].items():
        least, most = sorted(r["ms_all"])  # two turns
        assert least <= r["ms"] <= most
        assert r["tokens_per_s"] == pytest.approx(2 * 16 / r["ms"] * 1000)
        assert r["share_of_matmul_rate"] == pytest.approx(r["tflop"] / (r["ms"] / 1000) / rate)
        assert f"{case:10} {r['ms']:10.1f} ({least:.1f} - {most:.1f})" in printed
    assert out["cases"]["sft"]["ratio_to_sft"] == 1


def test_the_table_has_the_form_that_the_documents_quote(capsys):
    """Two turns of 1 and 3 s, of a case that takes half as long as the authors' step."""
    cases = {case: bench.result([ms, 3 * ms], [1000.0, 3000.0], 2e11, 800, 0.25)
             for case, ms in (("sft", 1000.0), ("lora", 2000.0), ("their-lfu", 4000.0))}
    for r, peak in zip(cases.values(), (1000, 1100, 2200)):
        r["peak_mib"] = peak
    cases["sft"]["peak_mib"] = None
    bench.print_table(cases, 0.25)
    bench.print_factor(cases, "their-lfu", "lora")
    head = "case            ms a step (min - max)  tokens/s     x sft (min - max)    TFLOP"
    assert capsys.readouterr().out.splitlines() == [
        "measured matmul rate 0.250 TFLOP/s", "", head + "  of rate  peak MiB",
        "sft            2000.0 (1000.0 - 3000.0)      400     1.00 (1.00 - 1.00)    0.200"
        "      40%       nan",
        "lora           4000.0 (2000.0 - 6000.0)      200     2.00 (2.00 - 2.00)    0.200"
        "      20%      1100",
        "their-lfu      8000.0 (4000.0 - 12000.0)      100     4.00 (4.00 - 4.00)    0.200"
        "      10%      2200",
        "lora is 2.00x (2.00 - 2.00) as fast as their-lfu, with 0.50x its peak memory"]


@pytest.mark.slow
def test_profile_covers_each_case(capsys):
    bench.main([*TINY, "--cases", "reps", "--repeats", "1", "--profile"])
    assert capsys.readouterr().out.count("Self CPU time total") == 2


def test_without_transformers_our_own_steps_are_timed_and_a_line_says_so(monkeypatch, capsys):
    def absent(package):
        raise PackageNotFoundError(package)
    monkeypatch.setattr(bench, "version", absent)
    out = bench.main([*TINY, "--cases", "sft", "their-sft", "their-lfu"])
    assert list(out["cases"]) == ["sft"] and out["compared"] == []
    assert "transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--tokens", "1"], "--tokens 1 should be at least 2"),
    (["--batch", "0"], "--batch 0 should be at least 1"),
    (["--repeats", "0"], "--repeats 0 should be at least 1"), (["--device", "tpu"], "'tpu'"),
    (["--json", "no/where.json"], "--json no/where.json: the folder no does not exist"),
    (["--evaluation", str(DATA)], "--evaluation needs --model"),
    (["--profile", "--count"], "--count: not allowed with argument --profile"),
    (["--cases", "sgd"], "invalid choice: 'sgd'")])
def test_bad_settings_are_named_in_one_line(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        bench.main([*TINY, *flags])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_line_measures_peak_memory_in_a_process_for_each_case(tmp_path):
    """Of 32 examples instead of one: their activations, at least 20 MiB more."""
    peaks = []
    for batch in ("1", "32"):
        file = tmp_path / f"{batch}.json"
        command = [sys.executable, "-m", "lfu_min.cost.bench", "--shape", "bundled", "--cases",
                   "lora", "--repeats", "1", "--batch", batch, "--tokens", "64", "--device", "cpu",
                   "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(system.ROOT)})
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(file.read_text(encoding="utf-8"))["cases"])
    for case in ("sft", "lora"):
        assert peaks[1][case]["peak_mib"] > peaks[0][case]["peak_mib"] + 20


@pytest.mark.slow
def test_a_case_that_runs_out_of_memory_has_no_peak():
    """The other cases still count."""
    s = settings("--batch", str(10**14))
    assert bench.peak_memory(s, "sft") is None


@pytest.mark.slow
def test_evaluation_times_loading_tokenising_and_generation(tmp_path, capsys):
    file = tmp_path / "out.json"
    out = bench.main(["--model", str(BUNDLED), "--evaluation", str(DATA), "--dtype", "fp32",
                      "--device", "cpu", "--repeats", "1", "--json", str(file)])
    rows = out["evaluation"]
    assert [r["what"] for r in rows] == ["loading", "tokenising 128 examples",
                                         "generating 8 x 64 tokens"]
    assert all(r["seconds"] > 0 and (r["faster"] is None or r["faster"] > 0) for r in rows)
    assert json.loads(file.read_text())["evaluation"] == rows
    assert "generating 8 x 64 tokens" in capsys.readouterr().out
