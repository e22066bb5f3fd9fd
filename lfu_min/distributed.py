"""Data parallelism for `torchrun --nproc-per-node N train.py ...`, on torch.distributed.

Every process holds the whole model, computes the gradients of its own micro-batches, and all gradients are summed before
the optimizer step. The ascent belongs to a micro-batch, so auxiliary tensors are never communicated. Hence N processes
with 1 micro-batch each do what 1 process does with N (tests/test_distributed.py). Without torchrun every function here
does nothing.
"""
import os

import torch
import torch.distributed as dist


def join(device):
    """Join the other processes that torchrun started. Returns (rank, number of processes, this process's device)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device
    if "LOCAL_RANK" not in os.environ or device.type == "mps":
        raise ValueError(f"WORLD_SIZE is {world}: start several processes with torchrun, on the CPU or on CUDA")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def add_up(tensors):
    """Sum each tensor over all processes, in place, in one message."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def add_up_gradients(params):
    """Sum `.grad` over all processes; a process without a micro-batch in this step contributes zero."""
    if dist.is_initialized():
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_up([p.grad for p in params])
