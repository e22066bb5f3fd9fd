"""Claim: on a CUDA GPU the step gives the CPU's gradients, never waits for the GPU, and train.py's
default is float16 there.

Without a GPU, tensors without data stand in for one: those of device "meta" have no numbers to wait
for, and torch's fake tensors of a device that is not the CPU ("lazy") refuse an operation on two
devices, as a GPU's do. What they cannot show, CUDA's own numbers, is skipped.
"""
from dataclasses import replace
import json

import pytest
import torch

import train
from lfu_min import lfu_backward
from lfu_min.cost import bench, count
from lfu_min import model as model_module
from lfu_min.engine import system
from test_lfu import difference, tiny, tiny_batch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
AUX = ("lora", "reps", "inplace", "none")
SMALL = replace(bench.SHAPES["bundled"], num_hidden_layers=2)


def test_float16_is_the_default_on_cuda_and_float32_elsewhere():
    assert system.pick_dtype("auto", torch.device("cuda")) == ("fp16", torch.float16)
    assert system.pick_dtype("auto", torch.device("cpu")) == ("fp32", torch.float32)
    assert system.pick_dtype("bf16", torch.device("cuda")) == ("bf16", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux", AUX)
def test_a_step_asks_for_no_number_of_its_tensors(aux, tune, dtype):
    """Asking is waiting: .item(), float(), bool(), .cpu() and nonzero() all raise on meta. Labels
    may stay on the CPU."""
    model, (ids, labels) = tiny(tune, torch.float32).to("meta"), tiny_batch()
    model.set_matmul_dtype(dtype)
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        result = lfu_backward(model, ids.to("meta"), labels, aux=aux,
                              generator=torch.Generator().manual_seed(7),
                              ascent_batch=(ids.to("meta"), labels) if aux != "none" else None)
        assert all(tensor.device.type == "meta" for tensor in result.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux", AUX)
def test_a_step_stays_on_the_models_device(aux, tune, dtype):
    count.count_step(SMALL, aux, 2, 16, tune, dtype, device="lazy")


def test_the_stand_ins_notice_a_tensor_left_on_the_cpu_and_a_wait(monkeypatch):
    tables = model_module.rope_tables
    monkeypatch.setattr(model_module, "rope_tables",
                        lambda c, positions, dtype: tables(c, torch.zeros_like(
        positions, device="cpu"), dtype))
    with pytest.raises(RuntimeError, match="(?i)device"):
        count.count_step(SMALL, "none", 2, 16, device="lazy")
    monkeypatch.setattr(model_module, "rope_tables",
                        lambda c, positions, dtype: tables(c, positions + int(
        positions.max()), dtype))
    with pytest.raises(RuntimeError, match="meta"):
        lfu_backward(tiny("lora", torch.float32).to("meta"), tiny_batch()[0].to("meta"),
                     tiny_batch()[1], aux="none")


def step(model, ids, labels, aux):
    """The gradients of one step, on the CPU; the auxiliary LoRA's A comes from a CPU generator, so
    it is the same."""
    model.zero_grad()
    result = lfu_backward(model, ids.to(next(model.parameters()).device), labels, aux=aux,
                          generator=torch.Generator().manual_seed(7))
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}, result


@needs_gpu
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux", AUX)
def test_the_step_gives_the_cpus_gradients(aux, tune):
    model, batch = tiny(tune), tiny_batch()  # float64
    expected, on_cpu = step(model, *batch, aux)
    got, on_gpu = step(model.cuda(), *batch, aux)
    assert difference(got, expected) <= 1e-8
    for name in on_cpu:
        torch.testing.assert_close(on_gpu[name].cpu(), on_cpu[name])


@needs_gpu
@pytest.mark.parametrize("aux", AUX)
def test_nothing_in_a_step_waits_for_the_gpu(aux):
    model, (ids, labels) = tiny("lora", torch.float32).cuda(), tiny_batch()
    ids = ids.cuda()
    for mode in ("default", "error"):  # once to warm up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            lfu_backward(model, ids, labels, aux=aux,
                         generator=torch.Generator("cuda").manual_seed(7))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("flags", [["--aux", "lora"],
                                   ["--aux", "reps", "--activation-checkpointing", "first"],
                                   ["--aux", "inplace", "--dtype", "bf16"],
                                   ["--aux", "lora", "--tune", "full", "--lr", "1e-4"]])
def test_train_py_learns_on_the_gpu(flags, tmp_path):
    out, log = train.main([*flags, "--device", "cuda", "--max-steps", "20", "--out",
                           str(tmp_path / "run")])
    assert json.loads((out / "settings.json").read_text())["dtype"] == ("bf16" if "bf16" in flags else "fp16")
    assert sum(r["sft"] for r in log[-3:]) < sum(r["sft"] for r in log[:3])
