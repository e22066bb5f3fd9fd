"""torchrun with N processes of one micro-batch is one process with N micro-batches, also when the
model is sharded: two gloo processes on the CPU."""
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file
import torch

from conftest import difference
from lfu_min.bundled import BUNDLED
from lfu_min.engine import distributed
from lfu_min.engine.system import ROOT
from lfu_min.files.adapter import load_adapter
from lfu_min.files.checkpoint import load_model
import train

shards = pytest.mark.skipif(torch.__version__ < (2, 9),
                            reason="--shard on the CPU needs torch 2.9 or newer")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
FLAGS = ["--device", "cpu", "--batch-size", "4", "--aux", "lora"]


def python(tmp_path, *command):
    """The finished process of `python command...`, in tmp_path."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, timeout=900,
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def run(tmp_path, name, launcher, *flags):
    """(finished process, log) of train.py for three steps."""
    done = python(tmp_path, *launcher, ROOT / "train.py", *FLAGS, "--max-steps", "3", "--alpha",
                  "0.02", "--lr", "3e-3", "--out", tmp_path / name, *flags)
    log = tmp_path / name / "log.jsonl"
    return done, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def check_same_log(log, other):
    assert len(log) == len(other) == 3
    for a, b in zip(log, other):
        for name in ("loss", "sft", "consistency", "grad_norm", "tokens", "target_tokens", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def check_same_weights(weights, others):
    """AdamW divides each gradient by its own size, so where it is next to nothing, its rounding
    becomes a part of a step (lr 3e-3): the gradients' norms agree to 1e-4, weights to 1 % of a
    step."""
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], rtol=1e-3, atol=3e-5)


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_two_micro_batches(tmp_path):
    two, log_two = run(tmp_path, "two", TORCHRUN)
    one, log_one = run(tmp_path, "one", [], "--accumulate", "2")
    alone, _ = run(tmp_path, "alone", [])  # the planted mistake: gradients not shared
    assert two.returncode == one.returncode == alone.returncode == 0, two.stderr + one.stderr
    assert two.stdout.count("saved") == 1
    check_same_log(log_two, log_one)
    two, one, alone = (load_file(tmp_path / name / "adapter_model.safetensors")
                       for name in ("two", "one", "alone"))
    check_same_weights(two, one)
    assert any(not torch.allclose(two[key], alone[key], rtol=1e-3, atol=3e-4) for key in two)


@pytest.mark.slow
def test_bad_input_ends_all_processes_with_a_message(tmp_path):
    done, _ = run(tmp_path, "bad", TORCHRUN, "--lr", "0")
    assert done.returncode != 0 and "error: --lr 0.0 should be a positive number" in done.stderr
    assert not (tmp_path / "bad").exists()


# Writes {settings: {name: gradient}} of three micro-batches: of all in one process ("one"), of this
# process's own, summed ("two") or not ("alone"), or on parts of the model ("shard").
GRADIENTS = """
import sys
import torch
from lfu_min.engine import distributed
from lfu_min.engine.passes import make_batch
from lfu_min.files.checkpoint import random_model
from lfu_min.lfu import lfu_step, sft_step
from lfu_min.lora import add_lora
from lfu_min.methods import AUXILIARIES, DISTANCES, MOVES
from lfu_min.model import LlamaConfig

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def gradients(name, aux, tune, head, checkpointing, move, compare):
    config = LlamaConfig(31, 16, 24, 3, 4, 2, 4, tie_word_embeddings=head == "tied",
                         qkv_bias=head == "biases", qk_norm=head == "biases")
    model = random_model(config, std=0.3, dtype=torch.float64)
    model.activation_checkpointing = checkpointing == "checkpointing"
    if tune == "lora":
        add_lora(model, r=2, generator=seeded(0))
        torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.lora_B, generator=seeded(1))
    if name == "shard":
        distributed.shard(model, device)
    ids = torch.randint(31, (6, 9), generator=seeded(2))
    starts = (0, 2, 4, 6) if name == "shard" else (0, 2, 4)  # in the end process 1 idles
    for start in starts[rank::world]:
        own = ids[start:start + 2] if start < 6 else ids[:1]
        labels = own.clone() if start < 6 else torch.full_like(own, -100)
        labels[:, :4] = -100
        batch = make_batch(own, labels, divisor=30, generator=seeded(start))
        if aux == "none":
            found = sft_step(model, batch)
            continue
        found = lfu_step(model, batch, AUXILIARIES[aux], lam=2.5, move=MOVES[move],
                         compare=DISTANCES[compare])
        assert (found["consistency_grad_norm"] > 0) == (start < 6)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if name != "alone":
        distributed.add_up_gradients(list(params.values()))
    if name == "shard":  # each process holds its part of everything
        held = sum(p.to_local().numel() for p in model.parameters())
        assert held < 0.6 * sum(p.numel() for p in model.parameters())
        assert all(p.grad.to_local().numel() < p.numel() for p in params.values() if p.dim() > 1)
    return {n: distributed.whole(p.grad) for n, p in params.items()}

name, *settings = sys.argv[1:]
rank, world, device = distributed.join(torch.device("cpu"))
found = {each: gradients(name, *each.split("/")) for each in settings}
if rank == 0:
    torch.save(found, name + ".pt")
distributed.leave()
"""


def gradients(tmp_path, name, settings):
    """{settings: {name of a weight: gradient}}"""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    launcher = [] if name == "one" else TORCHRUN
    done = python(tmp_path, *launcher, "gradients.py", name, *settings)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / f"{name}.pt")


@pytest.mark.slow
def test_the_gradients_of_two_processes_are_those_of_one(tmp_path):
    """Every gradient of an LfU step in float64, before any optimizer: equal up to rounding, and not
    without the sum."""
    settings = ["lora/lora/untied/none/ascent/mse"]
    one, two, alone = (gradients(tmp_path, name, settings)[settings[0]]
                       for name in ("one", "two", "alone"))
    assert difference(two, one) <= 1e-10
    assert difference(alone, one) > 0.1


@pytest.mark.slow
@shards
def test_the_gradients_of_a_sharded_model_are_those_of_a_whole_one(tmp_path):
    """Three micro-batches on two processes that hold half of the weights each, against one
    process; one of the two idles in the end. All that --shard allows, by itself."""
    settings = ["/".join(each) + "/ascent/mse" for each in itertools.product(
        ("lora", "reps", "none"), ("lora", "full"), ("tied", "untied"), ("none", "checkpointing"))]
    settings += ["lora/full/tied/none/descent/cosine", "reps/lora/untied/none/random/logit-kl"]
    # biases and norms as in Qwen 2.5 and 3
    settings += ["lora/lora/biases/none/ascent/mse", "lora/full/biases/none/ascent/mse"]
    one, shard = (gradients(tmp_path, name, settings) for name in ("one", "shard"))
    for each in settings:
        print(f"{each}: largest difference {difference(shard[each], one[each]):.1e}")
        assert difference(shard[each], one[each]) <= 1e-10


@pytest.mark.slow
@shards
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_sharded_run_saves_what_an_ordinary_one_saves(tune, tmp_path):
    flags = "--tune", tune, *(["--lr", "1e-4"] if tune == "full" else [])
    shard, log_shard = run(tmp_path, "shard", TORCHRUN, "--shard", *flags)
    one, log_one = run(tmp_path, "one", [], "--accumulate", "2", *flags)
    assert shard.returncode == one.returncode == 0, shard.stderr + one.stderr
    assert shard.stdout.count("saved") == 1
    assert shard.stdout.count("before") == one.stdout.count("before") > 0
    check_same_log(log_shard, log_one)
    assert sorted(os.listdir(tmp_path / "shard")) == sorted(os.listdir(tmp_path / "one"))
    file = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    check_same_weights(*(load_file(tmp_path / name / file) for name in ("shard", "one")))
    model = load_model(tmp_path / "shard" if tune == "full" else BUNDLED)
    if tune == "lora":
        load_adapter(model, tmp_path / "shard")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    """Process 1 is killed at its third step, as by the system when memory runs out; process 0 must
    not wait forever."""
    (tmp_path / "dies.py").write_text("""
import os
import signal
import sys
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
train.main(sys.argv[1:])
""")
    done = python(tmp_path, *TORCHRUN, "dies.py", *FLAGS, "--max-steps", "50", "--out", "run")
    assert done.returncode != 0
    assert "dies.py FAILED" in done.stderr and "Signal 9 (SIGKILL) received" in done.stderr
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags, message", [
    (["--shard", "--aux", "inplace"], "--shard --aux inplace"),
    (["--shard"], "--shard needs several processes: torchrun --nproc-per-node N"),
])
def test_sharding_that_cannot_be_is_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main([*FLAGS, *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


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
