"""torchrun with N processes of one micro-batch is one process with N micro-batches: two gloo processes on the CPU."""
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, name, launcher, *flags):
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), "--device", "cpu", "--batch-size", "4", "--max-steps", "3",
                           "--aux", "lora", "--alpha", "0.02", "--out", str(tmp_path / name), "--ask", "What is 1 + 1?", *flags],
                          cwd=tmp_path, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] if done.returncode == 0 else []
    return done, log


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_two_micro_batches(tmp_path):
    two, log_two = run(tmp_path, "two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    one, log_one = run(tmp_path, "one", [], "--accumulate", "2")
    alone, log_alone = run(tmp_path, "alone", [])                             # the planted mistake: gradients not shared
    assert two.returncode == one.returncode == alone.returncode == 0, two.stderr + one.stderr
    assert len(log_two) == len(log_one) == 3 and two.stdout.count("saved") == 1
    for a, b in zip(log_two, log_one):
        for name in ("loss", "sft", "consistency", "grad_norm", "tokens", "target_tokens", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    weights = [load_file(str(tmp_path / name / "adapter_model.safetensors")) for name in ("two", "one", "alone")]
    for key in weights[0]:
        # AdamW divides each gradient by its own size, so where it is next to nothing, its rounding becomes a part of a
        # step (lr 3e-3): the gradients' norms above agree to 1e-4, the weights to 1 % of a step.
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-3, atol=3e-5)
    assert any(not torch.allclose(weights[0][key], weights[2][key], rtol=1e-3, atol=3e-4) for key in weights[0])


@pytest.mark.slow
def test_bad_input_ends_all_processes_with_a_message(tmp_path):
    done, _ = run(tmp_path, "bad", ["-m", "torch.distributed.run", "--nproc-per-node", "2"], "--lr", "0")
    assert done.returncode != 0 and "error: --lr 0.0 should be a positive number" in done.stderr
    assert not (tmp_path / "bad").exists()


GRADIENTS = """
import sys, torch
from lfu_min import add_lora, distributed, lfu_backward
from lfu_min.checkpoint import random_model
from lfu_min.model import LlamaConfig
model = add_lora(random_model(LlamaConfig(31, 16, 24, 3, 4, 2, 4), std=0.3, dtype=torch.float64), r=2,
                 generator=torch.Generator().manual_seed(0))
torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.lora_B, generator=torch.Generator().manual_seed(1))
ids = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(2))
rank, world, _ = distributed.join(torch.device("cpu"))
for start in range(0, 4, 2)[rank::world]:
    lfu_backward(model, ids[start:start + 2], ids[start:start + 2], lam=2.5, num_target_tokens=32,
                 generator=torch.Generator().manual_seed(start))
params = [p for p in model.parameters() if p.requires_grad]
if "alone" not in sys.argv:
    distributed.add_up_gradients(params)
if rank == 0:
    torch.save([p.grad for p in params], sys.argv[1])
distributed.leave()
"""


@pytest.mark.slow
def test_the_gradients_of_two_processes_are_those_of_one(tmp_path):
    """Every gradient of an LfU step in float64, before any optimizer: equal up to rounding, and not without the sum."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    found = {}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"]),
                           ("alone", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        subprocess.run([sys.executable, *launcher, "gradients.py", f"{name}.pt", name], cwd=tmp_path, check=True, timeout=300,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        found[name] = torch.load(tmp_path / f"{name}.pt")
    for a, b in zip(found["two"], found["one"]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert any(not torch.allclose(a, b) for a, b in zip(found["alone"], found["one"]))
