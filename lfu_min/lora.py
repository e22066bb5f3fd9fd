"""LoRA by hand: y = W x + (lora_alpha / r) B A x, with W frozen; and the auxiliary LoRA that LfU's
ascent step worsens.

The trained LoRA is peft's: same initialisation, scaling, gradients (tests/test_lora.py);
files/adapter.py reads and writes its files. The auxiliary one (paper, section 3.1: the auxiliary
model is th + LoRA) has the same form but lives for one micro-batch: attached by `aux_lora`, moved
by lfu.ascend, gone when its `with` block ends.

Both share one branch: [A; A_aux] and [B, B_aux] are stacked, which is the same sum (their scaling
is the same) and costs half of two branches. Adapters are float32 over half-precision weights and
otherwise in the weights' dtype.
"""
from contextlib import contextmanager

import torch
from torch import nn
import torch.nn.functional as F

from .model import Linear

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(Linear):
    """A Linear (its weight shared, not copied) with a trained LoRA, an auxiliary one, both, or
    none."""

    def __init__(self, linear, r, lora_alpha):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.matmul_dtype = linear.weight, linear.bias, linear.matmul_dtype
        self.lora_A = self.lora_B = None  # trained: Parameters (r, in) and (out, r)
        self.aux_A = self.aux_B = None  # auxiliary: plain tensors, no optimizer or file sees them
        self.r, self.lora_alpha = r, lora_alpha

    @property
    def scaling(self):
        return self.lora_alpha / self.r

    def forward(self, x):  # (..., in) -> (..., out)
        A, B = self.lora_A, self.lora_B
        if A is None:
            A, B = self.aux_A, self.aux_B
        elif self.aux_A is not None:  # one branch for both: A (2 r, in), B (out, 2 r)
            A, B = torch.cat([A, self.aux_A]), torch.cat([B, self.aux_B], dim=1)
        if A is None:
            return super().forward(x)
        # return W(x) + self.scaling * F.linear(F.linear(x, A), B)
        # is what follows; but there the product is added to W(x) in place, which saves a CPU 5 % of
        # an SFT step, and .contiguous() gives B's gradient a product in the fast order.
        rows = x.flatten(0, -2)  # (N, in)
        y = super().forward(rows).to(A.dtype)  # (N, out)
        y.addmm_(F.linear(rows.to(A.dtype), A), B.T.contiguous(), alpha=self.scaling)
        return y.unflatten(0, x.shape[:-1])


def draw_A(r, in_features, like, generator):
    """peft's initial A (r, in): uniform in +-1/sqrt(in) (kaiming_uniform_ with a = sqrt 5), drawn
    in float32."""
    A = torch.empty(r, in_features, dtype=torch.float32,
                    device="cpu" if generator is None else generator.device)
    A.uniform_(-in_features ** -0.5, in_features ** -0.5, generator=generator)
    return A.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def lora_modules(model):
    """[(name, LoRALinear)] of the modules that carry a trained LoRA, in the order of
    named_modules()."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)
            and m.lora_A is not None]


def check_rank(r, lora_alpha):
    numbers = type(r) is int and isinstance(lora_alpha, (int, float))
    if not numbers or not 0 < r < 2**16 or not 0 < lora_alpha < 1e30:
        raise ValueError(f"r = {r!r:.40}, lora_alpha = {lora_alpha!r:.40}: both must be positive "
                         "numbers, r a whole one below 65,536")


def replace_module(model, name, module):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def add_lora(model, r=8, lora_alpha=16, target_modules=TARGET_MODULES, generator=None):
    """Attach a trainable LoRA to every target module, in place, and freeze all other parameters.
    Returns the model.

    r: rank; lora_alpha: the scaling is lora_alpha / r; target_modules: leaf names; generator: for A
    (B starts at 0, so the model's output does not change). Raises ValueError: r or lora_alpha not
    positive, an unknown target, or a model that has a LoRA already.
    """
    unknown = [name for name in target_modules if name not in TARGET_MODULES]
    if unknown or not target_modules:
        raise ValueError(f"target_modules {list(target_modules)}: choose from "
                         f"{', '.join(TARGET_MODULES)}")
    check_rank(r, lora_alpha)
    if lora_modules(model):
        raise ValueError("the model has a LoRA already: remove_lora(model) first")
    model.requires_grad_(False)
    for module in wrap_linears(model, r, lora_alpha, target_modules):
        module.lora_A = nn.Parameter(draw_A(r, module.in_features, module.weight, generator))
        module.lora_B = nn.Parameter(module.lora_A.new_zeros(module.out_features, r))
    return model


def wrap_linears(model, r=8, lora_alpha=16, target_modules=TARGET_MODULES):
    """Put a LoRALinear in the place of every target module, still without any LoRA. Returns them in
    the model's order."""
    wrapped = []
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear) and name.rpartition(".")[2] in target_modules:
            wrapped.append(LoRALinear(linear, r, lora_alpha))
            replace_module(model, name, wrapped[-1])
    return wrapped


def remove_lora(model):
    """Take the trained LoRA off, in place; the base weights are as they were before add_lora, and
    stay frozen."""
    for name, module in lora_modules(model):
        linear = Linear(module.in_features, module.out_features, bias=module.bias is not None,
                        device="meta")
        for shared in ("weight", "bias", "matmul_dtype"):
            setattr(linear, shared, getattr(module, shared))
        replace_module(model, name, linear)


@contextmanager
def aux_lora(model, generator=None):
    """The auxiliary LoRA of Eq 2: attached at zero effect (A drawn, B = 0), removed when the `with`
    block ends.

    Yields the tensors the ascent may move: the B of every module, since with B = 0 the gradient on
    A is exactly zero. It sits where the trained LoRA sits, with its r and scaling; on a model
    without one, on all linear layers of all blocks with r 8, scaling 16 / 8. generator: draws A,
    module after module in the order of named_modules().
    """
    attached, linears = [m for m in model.modules() if isinstance(m, LoRALinear)], {}
    if not attached:  # full tuning
        linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
        attached = wrap_linears(model)
    try:
        for module in attached:
            module.aux_A = draw_A(module.r, module.in_features, module.weight, generator)
            module.aux_B = module.aux_A.new_zeros(module.out_features, module.r).requires_grad_()
        yield [module.aux_B for module in attached]
    finally:
        for module in attached:
            module.aux_A = module.aux_B = None
        for name, linear in linears.items():
            replace_module(model, name, linear)
