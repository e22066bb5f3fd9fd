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
from lfu_min import lfu
from lfu_min.engine import system
from lfu_min.files.checkpoint import parse_config
from lfu_min.lora import add_lora

CONFIG = parse_config({**TINY, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160})


def real_step(counter, aux, tune, dtype, checkpointing):
    with mock.patch.object(lfu, "supervised", count.fake_positions), counter:
        model = count.empty_model(CONFIG, torch.float32 if tune == "full" else dtype)
        add_lora(model) if tune == "lora" else model.set_matmul_dtype(dtype)
        model.activation_checkpointing = bool(checkpointing)
        ids = torch.zeros(2, 24, dtype=torch.int64)
        lfu.lfu_backward(model, ids, ids, aux, recompute=checkpointing != "first")
    return counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux, checkpointing",
                         [("none", None), ("lora", None), ("reps", "both"), ("lora", "first"),
                                                ("inplace", None)])
def test_counting_and_running_agree_to_the_byte(aux, checkpointing, tune, dtype):
    flops, peak = count.count_step(CONFIG, aux, 2, 24, tune, dtype, checkpointing)
    assert peak == real_step(count.LiveBytes(), aux, tune, dtype, checkpointing).peak
    assert flops == real_step(FlopCounterMode(display=False), aux, tune, dtype,
                              checkpointing).get_total_flops()


def test_the_counted_step_is_the_benchmarks():
    """Half of its tokens are supervised; the head works on no others."""
    model, batches = add_lora(count.empty_model(CONFIG,
                                                torch.float32)), bench.make_batches(CONFIG, 2, 2, 24, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        bench.our_step(model, "lora")(*batches)
    assert count.count_step(CONFIG, "lora", 2, 24)[0] == counter.get_total_flops()


def test_bytes_are_counted_once_and_until_they_are_freed():
    with count.LiveBytes() as live:
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


def test_memory_behaves_as_the_flags_promise():
    # older torch: grouped heads keep T x T numbers on a CPU
    config = replace(CONFIG, num_key_value_heads=4)
    def peak(aux="lora", tokens=64, **how):
        return count.count_step(config, aux, 2, tokens, **how)[1]
    assert peak(checkpointing="both") < peak(checkpointing="first") <= peak()
    assert peak(aux="none") < peak(aux="reps") < peak(aux="lora")
    assert peak(dtype=torch.float16) < peak()
    growth = [peak(tokens=64 * n) for n in (1, 2, 3)]  # linear: no T x T of attention's is kept
    assert growth[2] - growth[1] == pytest.approx(growth[1] - growth[0], rel=0.05)


def test_the_default_dtype_survives_an_error():
    with pytest.raises(RuntimeError, match="x"), mock.patch.object(count, "Llama", side_effect=RuntimeError("x")):
        count.empty_model(CONFIG, torch.float16)
    assert torch.get_default_dtype() == torch.float32


def test_the_command_prints_and_writes_the_same(tmp_path, capsys):
    out = bench.main(["--shape", "bundled", "--batch", "2", "--tokens", "16", "--count", "--dtype",
                      "fp16", "--cases", "reps",
                      "lora", "their-sft", "--json", str(tmp_path / "count.json")])
    assert json.loads((tmp_path / "count.json").read_text())["count"] == out["count"]
    lines = capsys.readouterr().out.splitlines()
    assert "counted, not run" in lines[0] and [line.split()[0]
                                               for line in lines[2:]] == ["sft", "reps", "lora"]
    row = out["count"]["reps"]
    assert [float(x) for x in lines[3].split()[1:]] == pytest.approx([row["tflop"], row["ratio_to_sft"], row["peak_gib"]],
                                                                     abs=6e-3)
    assert 1.5 < row["ratio_to_sft"] < 2


GROWTH = """
import torch
from lfu_min.cost import bench, count
from lfu_min.engine import system
s = bench.get_settings(["--shape", "SmolLM2-135M", "--batch", "4", "--tokens", "200", "--dtype", "fp32", "--device", "cpu"])
model = bench.random_weights(s.config, s.device, torch.float32)
before = system.peak_memory_mib(s.device)
bench.add_lora(model)
bench.our_step(model, "lora")(*bench.make_batches(s.config, 2, 4, 200, s.device))
print(before, system.peak_memory_mib(s.device))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets glibc's malloc")
def test_a_process_grows_by_what_was_counted():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True,
                          cwd=system.ROOT,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    before, after = map(float, done.stdout.split())
    config = bench.SHAPES["SmolLM2-135M"]
    weights = 4 * sum(p.numel() for p in count.empty_model(config,
                                                           torch.float32).parameters()) / 2**20
    counted = count.count_step(config, "lora", 4, 200)[1] / 2**20 - weights
    print(f"counted {counted:.0f} MiB beside the weights; the process grew by "
          f"{after - before:.0f} MiB")
    assert 0.95 < (after - before) / counted < 1.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointing", [None, "both"])
def test_a_gpu_allocates_about_what_was_counted(checkpointing):
    config, device = bench.SHAPES["SmolLM2-135M"], torch.device("cuda")
    model = add_lora(bench.random_weights(config, device, torch.float16))
    model.activation_checkpointing = bool(checkpointing)
    torch.cuda.reset_peak_memory_stats()
    bench.our_step(model, "lora")(*bench.make_batches(config, 2, 4, 512, device))
    counted = count.count_step(config, "lora", 4, 512, dtype=torch.float16,
                               checkpointing=checkpointing)[1]
    assert 0.85 < torch.cuda.max_memory_allocated() / counted < 1.15
