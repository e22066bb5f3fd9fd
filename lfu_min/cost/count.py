"""What a step takes, counted without taking it:  python -m lfu_min.cost.bench --shape Llama-3.1-8B --dtype fp16 --count

The step runs on torch's fake tensors, which have a shape and a dtype but no data: nothing is
computed and nothing allocated, so a laptop can tell in half a minute whether an 8B model fits on a
GPU. tests/test_count.py checks that a real step on the CPU makes and keeps exactly the same bytes.
A GPU differs a little: other kernels, their workspaces, rounded blocks.
"""
from unittest import mock
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .. import lfu
from ..lora import add_lora
from ..model import Llama


class LiveBytes(TorchDispatchMode):
    """Inside the block, `now` is the bytes of the tensors that operations have made and that still
    live, `peak` the most there ever were. A tensor's memory counts once, however many views share
    it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}  # address of a live storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, address):
        self.now -= self.sizes.pop(address)


def empty_model(config, dtype):
    """A Llama made in `dtype` at once: .to(dtype) of fake parameters fails in some torch
    versions."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Llama(config)
    finally:
        torch.set_default_dtype(default)


def fake_positions(labels, device):
    """lfu.supervised for `count_step`'s labels, half of which are supervised: which ones are is
    data, and fake tensors have none."""
    N = labels.numel() // 2
    return torch.zeros(N, dtype=torch.int64,
                       device=device), torch.zeros(N, dtype=torch.int64, device=device)


def count_step(config, aux="lora", batch=4, tokens=512, tune="lora", dtype=torch.float32,
               checkpointing=None, device="cpu"):
    """(FLOPs of the matrix products, peak bytes of all tensors) of one lfu_backward, forward and
    backward.

    batch x tokens ids, half of them supervised. dtype: of the matrix products, and of frozen
    weights. checkpointing: None, "both" or "first", as in train.py. The bytes are weights, adapter,
    gradients and activations, without AdamW's state (8 bytes a trained weight). Attention's own
    products are not among the FLOPs, as torch does not count its CPU kernel.
    """
    counts = []
    # one at a time: the first keeps tensors alive
    for counter in (FlopCounterMode(display=False), LiveBytes()):
        with FakeTensorMode(), mock.patch.object(lfu, "supervised", fake_positions), counter:
            with torch.device(device):
                model = empty_model(config, torch.float32 if tune == "full" else dtype)
                ids = torch.zeros(batch, tokens, dtype=torch.int64)
            if tune == "lora":
                add_lora(model)
            else:
                model.set_matmul_dtype(dtype)
            model.activation_checkpointing = bool(checkpointing)
            lfu.lfu_backward(model, ids, ids, aux, recompute=checkpointing != "first")
        counts.append(counter.peak if isinstance(counter, LiveBytes) else counter.get_total_flops())
    return tuple(counts)
