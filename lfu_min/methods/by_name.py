"""`backward`: any method by its name on plain tensors, to check or compare methods from outside
(nothing here calls it but its tests).

It checks names and settings, makes the batch, and calls baselines.BASELINES or lfu_backward.
"""
import inspect
from numbers import Real

import torch

from ..engine.passes import TOKEN_SCALE, make_batch, matmul_dtype
from .baselines import BASELINES, real_lengths
from .own_loop import check_model, lfu_backward

SETTINGS = {name: list(inspect.signature(step).parameters)[2:] for name, step in BASELINES.items()}
SETTINGS["lfu"] = ["aux", "lam", "alpha", "layers"]
NUMBERS = ("alpha", "beta", "rho", "lam")


def check(name, settings):
    """Raise ValueError for a method or setting that is not there, or a number out of range."""
    if name not in SETTINGS:
        raise ValueError(f"method {name!r}: choose from {', '.join(SETTINGS)}")
    for setting, value in settings.items():
        if setting not in SETTINGS[name]:
            raise ValueError(f"{setting!r} is no setting of {name}; its settings: "
                             f"{', '.join(SETTINGS[name]) or 'none'}")
        if setting in NUMBERS and not (isinstance(value, Real) and 0 <= value < float("inf")):
            raise ValueError(f"{setting} = {value!r} should be a finite number, at least 0")
    if settings.get("beta") == 0:
        raise ValueError("beta = 0: q would be a softmax of z / 0; it should be above 0")


def backward(name, model, input_ids, labels, generator=None, attention_mask=None, **settings):
    """Add the gradient of method `name` on one micro-batch to `.grad` of the parameters that
    require one. Every weight is left as it was, bit for bit.

    name and settings (defaults: the steps' of baselines.py, and lfu_backward's):
        sft; neftune: alpha, padded; prompt; gem: beta, h ("linear" or "logsigmoid"); sam: rho;
        l1, l2: lam; logit_kl, attached: lam, alpha; lfu: aux, lam, alpha, layers
    input_ids, labels: (B, T) int64, padded on the right; labels unshifted, -100 where not
        supervised. generator: draws neftune's noise and the auxiliary LoRA's A.
    attention_mask: (B, T), 1 for real tokens and 0 for padding, on the right. None: what follows a
        row's last supervised token is padding, and so is a row without any. Only neftune and
        prompt ask what is padding: no real token sees it.

    Returns a dict of detached tensors: `loss`, the value whose gradient was added (for sam and
    lfu aux="inplace", of which a part is taken at moved weights: the value there), and the step's
    numbers, which baselines.py and lfu_backward list. Raises ValueError in one line.
    """
    check(name, settings)
    check_model(model)
    lengths = None if attention_mask is None else mask_lengths(attention_mask, input_ids)
    if name == "lfu":
        result = lfu_backward(model, input_ids, labels, generator=generator, **settings)
        return dict(result, loss=result["sft"] + settings.get("lam", 5.0) * result["consistency"])
    batch = make_batch(input_ids, labels, input_ids.device, generator=generator)
    if lengths is None:
        lengths = real_lengths(batch)
    if name == "prompt":
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        batch = make_batch(input_ids, input_ids.where(real, -100), generator=generator)
    if name == "neftune":
        settings = {"lengths": lengths, **settings}
    if matmul_dtype(model) == torch.float16:
        batch.loss_scale = TOKEN_SCALE * batch.divisor
    result = BASELINES[name](model, batch, **settings)
    return dict(loss=result["sft"]) | result


def mask_lengths(attention_mask, input_ids):
    """(B,) int64, real tokens of each row. Raises ValueError for another shape, or unless padding
    is on the right."""
    attention_mask = torch.as_tensor(attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids "
                         f"{tuple(input_ids.shape)}")
    real = attention_mask.to(input_ids.device).bool()
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("attention_mask: padding must be on the right, behind all real tokens")
    return real.sum(1)
