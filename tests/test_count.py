"""Claim: bench --count says what a step takes without running it: the same bytes at the peak and
the same FLOPs as the real step on the CPU, to the byte; and a process that runs the step grows by
about as much.

The last is no equality, as libraries need memory, too; and glibc keeps freed blocks of its heap,
half a GiB here, unless large ones are mapped one by one.
"""
from dataclasses import replace
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY
from lfu_min.cost import bench, count
from lfu_min.engine import system
from lfu_min.files.checkpoint import parse_config
from lfu_min.lora import add_lora

pytestmark = pytest.mark.slow

CONFIG = parse_config({**TINY, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 160})
DEEPER = replace(CONFIG, num_hidden_layers=2)


def real_step(counter, config, aux, tune, dtype, checkpointing):
    with counter:
        model = count.prepared_model(config, tune, dtype, checkpointing)
        count.STEPS[aux](model, count.half_supervised(2, 24, dtype))
    return counter


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("config, dtype", [
    (CONFIG, torch.float16), slow(DEEPER, torch.float16), slow(DEEPER, torch.float32)],
    ids=["1 layer fp16", "2 layers fp16", "2 layers fp32"])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux, checkpointing", [("none", False), ("lora", False), ("reps", True),
                                                ("inplace", False)])
def test_counting_and_running_agree_to_the_byte(aux, checkpointing, tune, config, dtype):
    """And on the FLOPs, which torch's own counter takes of the real step."""
    _, flops, peak = count.count_step(config, count.STEPS[aux], 2, 24, tune, dtype, checkpointing)
    step = config, aux, tune, dtype, checkpointing
    assert peak == real_step(count.Meter(), *step).peak
    assert flops == real_step(FlopCounterMode(display=False), *step).get_total_flops()


def test_the_counted_step_is_the_benchmarks():
    """Half of its tokens are supervised; the head works on no others."""
    model = add_lora(count.fresh_model(CONFIG, torch.float32))
    batches = bench.make_batches(CONFIG, 2, 2, 24, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        bench.our_step(model, "lora")(*batches)
    assert count.count_step(CONFIG, count.STEPS["lora"], 2, 24)[1] == counter.get_total_flops()


def test_bytes_are_counted_once_and_until_they_are_freed():
    with count.Meter() as live:
        a = torch.zeros(1000)
        assert live.now == live.peak == 4000
        view, same = a[10:], a.detach()  # no new memory
        a.add_(1)
        assert live.now == live.peak == 4000
        b = (a + 1) * 2  # two new ones, of which one stays
        assert live.now == 8000 and live.peak == 12000
        del a, view, b
        assert live.now == 4000  # `same` still holds the first
    assert live.peak == 12000 and same is not None


def peak(aux="lora", tokens=24, config=CONFIG, dtype=torch.float16, **how):
    return count.count_step(config, count.STEPS[aux], 2, tokens, dtype=dtype, **how)[2]


@pytest.mark.slow
def test_memory_behaves_as_the_flags_promise():
    assert peak("none") < peak("reps") < peak("lora") < peak("lora", dtype=torch.float32)
    assert peak("none", config=DEEPER, checkpointing=True) < peak("none", config=DEEPER)


@pytest.mark.slow
def test_memory_of_lfu_grows_linearly_with_the_tokens_and_shrinks_with_checkpointing():
    """No T x T numbers of attention's are kept (older torch keeps them for grouped heads)."""
    config = replace(DEEPER, num_key_value_heads=4)
    one, two, three = (peak(tokens=64 * n, config=config) for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=0.05)
    assert peak(tokens=64, config=config, checkpointing=True) < one


def test_the_default_dtype_survives_an_error():
    broken = mock.patch.object(count, "Llama", side_effect=RuntimeError("x"))
    with pytest.raises(RuntimeError, match="x"), broken:
        count.fresh_model(CONFIG, torch.float16)
    assert torch.get_default_dtype() == torch.float32


def test_the_command_prints_and_writes_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", CONFIG)
    file = tmp_path / "count.json"
    out = bench.main(["--shape", "tiny", "--batch", "2", "--tokens", "24", "--count", "--dtype",
                      "fp16", "--cases", "reps", "lora", "their-sft", "--json", str(file)])
    assert json.loads(file.read_text())["count"] == out["count"]
    heading, names, *lines = capsys.readouterr().out.splitlines()
    assert "counted, not run" in heading and names.split()[0] == "case"
    assert [line.split()[0] for line in lines] == ["sft", "reps", "lora"]
    row = out["count"]["reps"]
    expected = [row["tflop"], row["ratio_to_sft"], row["peak_gib"]]
    assert [float(x) for x in lines[1].split()[1:]] == pytest.approx(expected, abs=6e-3)
    assert 1.5 < row["ratio_to_sft"] < 2


@pytest.mark.slow
def test_the_module_itself_says_what_to_call():
    done = subprocess.run([sys.executable, "-m", "lfu_min.cost.count"], capture_output=True,
                          text=True, cwd=system.ROOT)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "python -m lfu_min.cost.bench --count" in done.stderr


GROWTH = """
from pathlib import Path
import torch
from lfu_min.cost import bench, count
from lfu_min.engine import system
config, cpu = bench.SHAPES["SmolLM2-135M"], torch.device("cpu")
model = count.fresh_model(config, torch.float32)
before = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**10
count.prepare(model, "lora", torch.float32)
bench.our_step(model, "lora")(*bench.make_batches(config, 2, 4, 200, cpu))
print(before, system.peak_memory_mib(cpu))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets glibc's malloc")
def test_a_process_grows_by_what_was_counted():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True,
                          cwd=system.ROOT,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    before, after = map(float, done.stdout.split())
    config = bench.SHAPES["SmolLM2-135M"]
    model = count.fresh_model(config, torch.float32)
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    counted = count.count_step(config, count.STEPS["lora"], 4, 200)[2] / 2**20 - weights
    print(f"counted {counted:.0f} MiB beside the weights; the process grew by "
          f"{after - before:.0f} MiB")
    assert 0.95 < (after - before) / counted < 1.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_allocates_about_what_was_counted(checkpointing):
    config, device = bench.SHAPES["SmolLM2-135M"], torch.device("cuda")
    with device:
        model = count.prepared_model(config, "lora", torch.float16, checkpointing)
    torch.cuda.reset_peak_memory_stats()
    bench.our_step(model, "lora")(*bench.make_batches(config, 2, 4, 512, device))
    counted = count.count_step(config, count.STEPS["lora"], 4, 512, dtype=torch.float16,
                               checkpointing=checkpointing)[2]
    assert 0.85 < torch.cuda.max_memory_allocated() / counted < 1.15
