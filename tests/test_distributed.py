"""torchrun with N processes of one micro-batch is one process with N micro-batches, also when the
model is sharded: two gloo processes on the CPU."""
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lfu_min.engine import distributed
from lfu_min.files.adapter import load_adapter
from lfu_min.files.checkpoint import load_model
from lfu_min.bundled import BUNDLED

shards = pytest.mark.skipif(torch.__version__ < (2, 9),
                            reason="--shard on the CPU needs torch 2.9 or newer")
ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, name, launcher, *flags):
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), "--device", "cpu",
                           "--batch-size", "4", "--max-steps", "3",
                           "--aux", "lora", "--alpha", "0.02", "--lr", "3e-3", "--out",
                           str(tmp_path / name), "--ask", "What is 1 + 1?", *flags],
                          cwd=tmp_path, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] if done.returncode == 0 else []
    return done, log


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_two_micro_batches(tmp_path):
    two, log_two = run(tmp_path, "two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    one, log_one = run(tmp_path, "one", [], "--accumulate", "2")
    alone, log_alone = run(tmp_path, "alone", [])  # the planted mistake: gradients not shared
    assert two.returncode == one.returncode == alone.returncode == 0, two.stderr + one.stderr
    assert len(log_two) == len(log_one) == 3 and two.stdout.count("saved") == 1
    for a, b in zip(log_two, log_one):
        for name in ("loss", "sft", "consistency", "grad_norm", "tokens", "target_tokens", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    weights = [load_file(str(tmp_path / name / "adapter_model.safetensors"))
               for name in ("two", "one", "alone")]
    for key in weights[0]:
        # AdamW divides each gradient by its own size, so where it is next to nothing, its rounding
        # becomes a part of a step (lr 3e-3): the gradients' norms above agree to 1e-4, the weights
        # to 1 % of a step.
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-3, atol=3e-5)
    assert any(not torch.allclose(weights[0][key], weights[2][key], rtol=1e-3, atol=3e-4)
               for key in weights[0])


@pytest.mark.slow
def test_bad_input_ends_all_processes_with_a_message(tmp_path):
    done, _ = run(tmp_path, "bad", ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
                  "--lr", "0")
    assert done.returncode != 0 and "error: --lr 0.0 should be a positive number" in done.stderr
    assert not (tmp_path / "bad").exists()


GRADIENTS = """
import sys, torch
from lfu_min import add_lora, lfu_backward
from lfu_min.engine import distributed
from lfu_min.files.checkpoint import random_model
from lfu_min.model import LlamaConfig
name, aux, tune, tied, checkpointing = sys.argv[1:]
model = random_model(LlamaConfig(31, 16, 24, 3, 4, 2, 4, tie_word_embeddings=tied == "tied"), std=0.3, dtype=torch.float64)
model.activation_checkpointing = checkpointing != "none"
if tune == "lora":
    add_lora(model, r=2, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.lora_B, generator=torch.Generator().manual_seed(1))
ids = torch.randint(31, (6, 9), generator=torch.Generator().manual_seed(2))
rank, world, device = distributed.join(torch.device("cpu"))
if name == "shard":
    distributed.shard(model, device)
for start in range(0, 8 if name == "shard" else 6, 2)[rank::world]:           # sharded, the second process idles once
    own = ids[start:start + 2] if start < 6 else ids[:1]
    labels = own.clone() if start < 6 else torch.full_like(own, -100)
    labels[:, :4] = -100
    found = lfu_backward(model, own, labels, aux=aux, lam=2.5, num_target_tokens=30,
                         generator=torch.Generator().manual_seed(start), recompute=checkpointing != "first")
params = {n: p for n, p in model.named_parameters() if p.requires_grad}
if name != "alone":
    distributed.add_up_gradients(list(params.values()))
grads = {n: distributed.whole(p.grad) for n, p in params.items()}
assert aux == "none" or found["consistency_grad_norm"] > 0 or name == "shard" and rank == 1     # idle: no consistency
if name == "shard":                                                           # each process holds its part of everything
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert all(p.grad.to_local().numel() < p.numel() for p in params.values() if p.dim() > 1)
if rank == 0:
    torch.save(grads, name + ".pt")
distributed.leave()
"""


def gradients(tmp_path, name, *settings):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    launcher = [] if name == "one" else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, *launcher, "gradients.py", name, *settings],
                          cwd=tmp_path, timeout=300, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                    "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / f"{name}.pt")


@pytest.mark.slow
def test_the_gradients_of_two_processes_are_those_of_one(tmp_path):
    """Every gradient of an LfU step in float64, before any optimizer: equal up to rounding, and not
    without the sum."""
    settings = "lora", "lora", "untied", "none"
    one, two, alone = (gradients(tmp_path, name, *settings) for name in ("one", "two", "alone"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-14)
    assert any(not torch.allclose(alone[name], one[name]) for name in one)


@pytest.mark.slow
@shards
@pytest.mark.parametrize("settings",
                         [("lora", "lora", "tied", "both"), ("reps", "lora", "untied", "first"),
                                      ("lora", "full", "untied", "none"),
                          ("reps", "full", "tied", "none")],
                         ids="-".join)
def test_the_gradients_of_a_sharded_model_are_those_of_a_whole_one(settings, tmp_path):
    """Three micro-batches on two processes that hold half of the weights each, against one
    process."""
    one, two = (gradients(tmp_path, name, *settings) for name in ("one", "shard"))
    worst = max(((two[n] - one[n]).abs().max() / one[n].abs().max().clamp(min=1e-30)).item()
                for n in one)
    print(f"largest difference {worst:.1e}")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@shards
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_sharded_run_saves_what_an_ordinary_one_saves(tune, tmp_path):
    flags = "--tune", tune, *(["--lr", "1e-4"] if tune == "full" else [])
    shard, log_shard = run(tmp_path, "shard",
                           ["-m", "torch.distributed.run", "--nproc-per-node", "2"], "--shard",
                           *flags)
    one, log_one = run(tmp_path, "one", [], "--accumulate", "2", *flags)
    assert shard.returncode == one.returncode == 0, shard.stderr + one.stderr
    assert shard.stdout.count("saved") == 1 and shard.stdout.count("before") == 1
    for a, b in zip(log_shard, log_one, strict=True):
        for name in ("loss", "sft", "consistency", "grad_norm", "tokens", "target_tokens", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert sorted(os.listdir(tmp_path / "shard")) == sorted(os.listdir(tmp_path / "one"))
    file = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    a, b = (load_file(str(tmp_path / name / file)) for name in ("shard", "one"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=3e-5)
    model = load_model(tmp_path / "shard" if tune == "full" else BUNDLED)
    if tune == "lora":
        load_adapter(model, tmp_path / "shard")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    """Process 1 is killed at its third step, as by the system when memory runs out; process 0 must
    not wait forever."""
    (tmp_path / "dies.py").write_text("""
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train
from lfu_min.engine import distributed
count, add_up_gradients = 0, distributed.add_up_gradients
def dying(params):
    global count
    count += 1
    if count == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    add_up_gradients(params)
distributed.add_up_gradients = dying
train.main(sys.argv[2:])
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "dies.py", str(ROOT),
                           "--device", "cpu", "--batch-size", "4", "--max-steps", "50", "--out",
                           "run", "--ask", "hello"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "dies.py FAILED" in done.stderr and "Signal 9 (SIGKILL) received" in done.stderr
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags, message", [
    (["--shard", "--aux", "inplace"], "--shard --aux inplace"),
    (["--shard"], "--shard needs several processes: torchrun --nproc-per-node N"),
])
def test_sharding_that_cannot_be_is_refused(flags, message, tmp_path):
    done, _ = run(tmp_path, "out", [], *flags)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


def test_sharding_on_the_cpu_of_an_older_torch_is_refused(monkeypatch):
    """Its gradients would be N times too large."""
    for version in ("2.6.0+cu124", "2.8.1"):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        distributed.check_shard(2, torch.device("cuda"))
        with pytest.raises(ValueError, match="torch 2.9 or newer; this is torch "
                                             f"{re.escape(version)}$"):
            distributed.check_shard(2, torch.device("cpu"))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    distributed.check_shard(2, torch.device("cpu"))
