"""What a step takes, counted without taking it:

    python -m lfu_min.cost.bench --shape Llama-3.1-8B --dtype fp16 --count

The step runs on torch's fake tensors, which have a shape and a dtype but no data: nothing is
computed and nothing allocated, so a laptop can tell in half a minute whether an 8B model fits on a
GPU. tests/test_count.py checks that a real step on the CPU makes and keeps exactly the same bytes.
A GPU differs a little: other kernels, their workspaces, rounded blocks.
"""
from functools import partial
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..engine.passes import TOKEN_SCALE, Batch
from ..lfu import lfu_step, sft_step
from ..lora import add_lora
from ..methods import AUXILIARIES
from ..model import Llama


class Meter(TorchDispatchMode):
    """Counts, inside the block: `flops` of the matrix products; `now`, the bytes of the tensors
    that operations have made and that still live; `peak`, the most there ever were. A tensor's
    memory counts once, however many views share it."""

    def __init__(self):
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.sizes = {}  # address of a live storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            storage = isinstance(tensor, torch.Tensor) and tensor.untyped_storage()
            if storage and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, address):
        self.now -= self.sizes.pop(address)


def fresh_model(config, dtype):
    """A Llama with torch's initial weights, made in `dtype` at once: .to(dtype) of fake parameters
    fails in some torch versions."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Llama(config)
    finally:
        torch.set_default_dtype(default)


def prepare(model, tune, dtype, checkpointing=False):
    """Make `model` what train.py has before the first step, in place. Returns the model."""
    if tune == "lora":
        add_lora(model)
    else:
        model.set_matmul_dtype(dtype)
    model.activation_checkpointing = checkpointing
    return model


def prepared_model(config, tune, dtype, checkpointing=False):
    weights = torch.float32 if tune == "full" else dtype  # trained weights stay in float32
    return prepare(fresh_model(config, weights), tune, dtype, checkpointing)


def half_supervised(batch, tokens, dtype):
    """A Batch of batch x tokens zeros, half of them supervised. Made without labels: which ones
    are supervised is data, and fake tensors have none."""
    ids, N = torch.zeros(batch, tokens, dtype=torch.int64), batch * tokens // 2
    scale = TOKEN_SCALE * N if dtype == torch.float16 else 1.0
    return Batch(ids, ids.flatten()[:N], ids.flatten()[:N], N, scale)


STEPS = {"none": sft_step, **{aux: partial(lfu_step, auxiliary=kind)
                              for aux, kind in AUXILIARIES.items()}}


def count_step(config, step=lfu_step, batch=4, tokens=512, tune="lora", dtype=torch.float32,
               checkpointing=False):
    """(forwards, FLOPs of the matrix products, peak bytes of all tensors) of one step
    step(model, batch): of STEPS, or another.

    batch x tokens ids, half of them supervised. dtype: of the matrix products, and of frozen
    weights. The bytes are weights, adapter, gradients and activations, without AdamW's state
    (8 bytes a trained weight). Attention's own products are not among the FLOPs, as torch does not
    count its CPU kernel.
    """
    forwards = []
    with FakeTensorMode(), Meter() as meter:
        model = prepared_model(config, tune, dtype, checkpointing)
        model.model.norm.register_forward_hook(lambda *args: forwards.append(1))
        step(model, half_supervised(batch, tokens, dtype))
    return len(forwards), meter.flops, meter.peak


if __name__ == "__main__":
    sys.exit("counting is an option of the benchmark: python -m lfu_min.cost.bench --count")
