"""Claim: on a CUDA GPU the step gives the CPU's gradients, never waits for the GPU, and train.py's
default is float16 there: all auxiliary kinds, moves and distances of lfu_min/methods, and SFT.

Without a GPU, tensors without data stand in for one: those of device "meta" have no numbers to wait
for, and torch's fake tensors of a device that is not the CPU ("lazy") refuse an operation on two
devices, as a GPU's do. What they cannot show, CUDA's own numbers, is skipped.
"""
from dataclasses import replace
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import difference, tiny, tiny_batch
from lfu_min import model as model_module
from lfu_min.cost import bench, count
from lfu_min.engine import system
from lfu_min.engine.passes import make_batch
from lfu_min.lfu import lfu_step, sft_step
from lfu_min.methods import AUXILIARIES, DISTANCES, MOVES, lfu_backward
import train

pytestmark = pytest.mark.slow

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
AUX = (*AUXILIARIES, "none")
VARIANTS = [*((move, "mse") for move in MOVES),
            *(("ascent", name) for name in DISTANCES if name != "mse")]
SMALL = replace(bench.SHAPES["bundled"], num_hidden_layers=1)

# float32 casts less than float16 and has no loss scale: it seldom fails alone
both_dtypes = pytest.mark.parametrize("dtype", [
    torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
both_tuned = pytest.mark.parametrize("tune", ["lora", "full"])
each_aux = pytest.mark.parametrize("aux", AUX)
each_variant = pytest.mark.parametrize("move, compare", VARIANTS)


def batch_on(device, generator=None, loss_scale=16.0):
    """A Batch, and the other one that --move other-batch takes, made of labels on the CPU."""
    other = make_batch(*tiny_batch(seed=2, T=7), device, loss_scale=loss_scale)
    return make_batch(*tiny_batch(), device, loss_scale=loss_scale, generator=generator,
                      other=other)


def run_step(model, batch, aux="lora", move="ascent", compare="mse"):
    if aux == "none":
        return sft_step(model, batch)
    return lfu_step(model, batch, AUXILIARIES[aux], move=MOVES[move], compare=DISTANCES[compare])


def test_float16_is_the_default_on_cuda_and_float32_elsewhere():
    assert system.pick_dtype("auto", torch.device("cuda")) == ("fp16", torch.float16)
    assert system.pick_dtype("auto", torch.device("cpu")) == ("fp32", torch.float32)
    assert system.pick_dtype("bf16", torch.device("cuda")) == ("bf16", torch.bfloat16)


# ---- device "meta": asking for a number is waiting ----

@pytest.mark.slow
@both_dtypes
@both_tuned
@each_aux
@pytest.mark.parametrize("checkpointing", [
    True, pytest.param(False, marks=pytest.mark.slow)])  # a part of what True does
def test_a_step_asks_for_no_number_of_its_tensors(checkpointing, aux, tune, dtype):
    """.item(), float(), bool(), .cpu() and nonzero() all raise on meta. Labels may stay on the
    CPU."""
    model, (ids, labels) = tiny(tune, torch.float32, layers=1).to("meta"), tiny_batch()
    model.set_matmul_dtype(dtype)
    model.activation_checkpointing = checkpointing
    result = lfu_backward(model, ids.to("meta"), labels, aux=aux,
                          generator=torch.Generator().manual_seed(7),
                          ascent_batch=(ids.to("meta"), labels) if aux != "none" else None)
    assert all(tensor.device.type == "meta" for tensor in result.values())


@each_variant
def test_no_move_or_distance_asks_for_a_number(move, compare):
    model = tiny("lora", torch.float32, layers=1).to("meta")
    result = run_step(model, batch_on("meta"), "reps", move, compare)
    assert all(tensor.device.type == "meta" for tensor in result.values())


# ---- device "lazy": no operation on two devices ----

def step_on_another_device(aux, tune="lora", dtype=torch.float16, **variant):
    with FakeTensorMode():
        with torch.device("lazy"):  # nothing but the weights and the batches
            model = count.fresh_model(SMALL, torch.float32 if tune == "full" else dtype)
            batch = count.half_supervised(2, 16, dtype)
            batch.other = count.half_supervised(2, 16, dtype)
        return run_step(count.prepare(model, tune, dtype), batch, aux, **variant)


@pytest.mark.slow
@both_dtypes
@both_tuned
@each_aux
def test_a_step_stays_on_the_models_device(aux, tune, dtype):
    result = step_on_another_device(aux, tune, dtype)
    assert all(tensor.device.type == "lazy" for tensor in result.values())


@pytest.mark.slow
@each_variant
def test_moves_and_distances_stay_on_the_models_device(move, compare):
    result = step_on_another_device("reps", move=move, compare=compare)
    assert all(tensor.device.type == "lazy" for tensor in result.values())


def test_the_stand_ins_notice_a_tensor_left_on_the_cpu_and_a_wait(monkeypatch):
    tables = model_module.rope_tables

    def left_on_the_cpu(config, positions, dtype):
        return tables(config, torch.zeros_like(positions, device="cpu"), dtype)

    def waits(config, positions, dtype):
        return tables(config, positions + int(positions.max()), dtype)
    monkeypatch.setattr(model_module, "rope_tables", left_on_the_cpu)
    with pytest.raises(RuntimeError, match="(?i)device"):
        step_on_another_device("none")
    monkeypatch.setattr(model_module, "rope_tables", waits)
    with pytest.raises(RuntimeError, match="meta"):
        run_step(tiny("lora", torch.float32).to("meta"), batch_on("meta"), "none")


# ---- CUDA itself ----

def gradients_on(device, tune, *step):
    """({name: gradient}, numbers) in float64, on the CPU. Random numbers come from a CPU generator,
    so they are the same everywhere."""
    model, generator = tiny(tune).to(device), torch.Generator().manual_seed(7)
    result = run_step(model, batch_on(device, generator, loss_scale=1.0), *step)
    return ({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None},
            {name: value.cpu() for name, value in result.items()})


@needs_gpu
@both_tuned
@pytest.mark.parametrize("step", [*((aux,) for aux in AUX), *(("lora", *v) for v in VARIANTS)],
                         ids="-".join)
def test_the_step_gives_the_cpus_gradients(step, tune):
    (expected, on_cpu), (got, on_gpu) = (gradients_on(device, tune, *step)
                                         for device in ("cpu", "cuda"))
    assert difference(got, expected) <= 1e-8
    for name in on_cpu:
        torch.testing.assert_close(on_gpu[name], on_cpu[name])


def twice_without_waiting(step):
    """Call `step` once to warm up, then with an error wherever it waits for the GPU."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@each_aux
def test_nothing_in_a_step_waits_for_the_gpu(aux):
    model, (ids, labels) = tiny("lora", torch.float32).cuda(), tiny_batch()
    ids = ids.cuda()
    twice_without_waiting(lambda: lfu_backward(
        model, ids, labels, aux=aux, generator=torch.Generator("cuda").manual_seed(7)))


@needs_gpu
@each_variant
def test_no_move_or_distance_waits_for_the_gpu(move, compare):
    model = tiny("lora", torch.float32).cuda()
    batch = batch_on("cuda", torch.Generator("cuda").manual_seed(7))
    twice_without_waiting(lambda: run_step(model, batch, "lora", move, compare))


@needs_gpu
@pytest.mark.parametrize("flags", [["--aux", "lora"],
                                   ["--aux", "reps", "--activation-checkpointing"],
                                   ["--aux", "inplace", "--dtype", "bf16"],
                                   ["--aux", "lora", "--tune", "full", "--lr", "1e-4"]])
def test_train_py_learns_on_the_gpu(flags, tmp_path):
    out, log = train.main([*flags, "--device", "cuda", "--max-steps", "20", "--out",
                           str(tmp_path / "run")])
    dtype = json.loads((out / "settings.json").read_text())["dtype"]
    assert dtype == ("bf16" if "bf16" in flags else "fp16")
    assert sum(r["sft"] for r in log[-3:]) < sum(r["sft"] for r in log[:3])
