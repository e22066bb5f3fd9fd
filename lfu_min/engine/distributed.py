"""Data parallelism for `torchrun --nproc-per-node N train.py ...`, on torch.distributed.

Every process holds the whole model, computes the gradients of its own micro-batches, and all
gradients are summed before the optimizer step. The ascent belongs to a micro-batch, so auxiliary
tensors are never communicated. Hence N processes with 1 micro-batch each do what 1 process does
with N (tests/test_distributed.py). Without torchrun all but the functions for --shard do nothing.

With --shard no process holds the whole model: parameters, gradients and optimizer state are cut
into N parts, and torch's `fully_shard` brings a block's weights together when that block runs.
"""
import datetime
import os
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..lora import LoRALinear, wrap_linears

# to wait for another process; torchrun ends the rest at once where one dies
PATIENCE = datetime.timedelta(minutes=10)


class Team(NamedTuple):
    rank: int  # this process's number, from 0
    world: int  # how many processes there are
    device: torch.device  # this process's


def join(device):
    """Join the other processes that torchrun started. Returns the Team."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Team(0, 1, device)
    if "LOCAL_RANK" not in os.environ or device.type == "mps":
        raise ValueError(f"WORLD_SIZE is {world}: start several processes with torchrun, on the "
                         "CPU or on CUDA")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Team(dist.get_rank(), world, device)


def leave():
    """Part from the other processes, all at one time.

    The pause: to let go of its last tensor, a thread of gloo's may need Python's lock. It must not
    ask for it while destroy_process_group holds the lock and waits for the thread (a hang, with
    torch 2.6), nor when Python has ended (an abort, with torch 2.13).
    """
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.5)
        dist.destroy_process_group()


@torch.no_grad()
def add_up(tensors):
    """Sum each tensor over all processes, in place, in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def add_up_gradients(params):
    """Sum `.grad` over all processes; a process without a micro-batch in this step contributes
    zero.

    Sharded gradients were averaged by fully_shard already, in the backward: their number makes a
    sum of them.
    """
    if dist.is_initialized() and hasattr(params[0], "full_tensor"):
        for p in params:
            p.grad *= dist.get_world_size()
    elif dist.is_initialized():
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_up([p.grad for p in params])


def check_shard(world, device):
    """Raises ValueError where --shard cannot work."""
    if world == 1:
        raise ValueError("--shard needs several processes: torchrun --nproc-per-node N train.py "
                         "--shard ...")
    # torch 2.6 stops there; in 2.7 and 2.8 gloo sums the gradients where fully_shard asks for their
    # mean, without a word.
    if device.type == "cpu" and torch.__version__ < (2, 9):
        raise ValueError("--shard on the CPU needs torch 2.9 or newer; this is torch "
                         f"{torch.__version__}")


def shard(model, device):
    """Cut a model's parameters into one part a process, on `device`; the model may come from the
    CPU. In place.

    Blocks are units, and the embedding, the last norm and the head together are another. Every
    process must run the same forwards and backwards from here on. `.grad` and a new optimizer's
    state are parts, too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    if not any(isinstance(m, LoRALinear) for m in model.modules()):
        wrap_linears(model)  # full tuning: an auxiliary LoRA must find its places before the cut
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")


def whole(tensor):
    """The tensor itself, put together where it lies in parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_parts(tensor, like):
    """A copy of a whole tensor on the device of `like`, cut into parts where `like` is; all
    processes have the same one, and call this together."""
    tensor = tensor.to(like.device, copy=True)
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def largest(number, device):
    """The largest `number`, an int, of all processes."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def whole_state(model, only_trained):
    """{name: tensor} of a sharded model, put together on the CPU of process 0; the others get an
    empty one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained))
