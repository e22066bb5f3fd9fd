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
