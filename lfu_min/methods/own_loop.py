"""`lfu_backward`: the step for your own training loop, in place of loss.backward().

It takes names and plain tensors, checks them, and calls lfu.lfu_step or lfu.sft_step.
"""
from numbers import Real

import numpy as np
import torch

from ..engine.passes import TOKEN_SCALE, make_batch, matmul_dtype
from ..lfu import lfu_step, sft_step
from ..model import Llama
from .auxiliaries import AUXILIARIES, IN_PLACE
from .distances import DISTANCES
from .moves import MOVES


def parse_layers(layers, L):
    """The 1-based layer numbers that `layers` names: all, early, middle, late (thirds), or an
    inclusive range a-b."""
    layers = str(layers)
    thirds = dict(zip(("early", "middle", "late"), np.array_split(range(1, L + 1), 3)))
    if layers == "all":
        return list(range(1, L + 1))
    if layers in thirds:
        if not len(thirds[layers]):
            raise ValueError(f"layers {layers!r}: of {L} layers none are {layers}; write all, or "
                             f"a range a-b within 1-{L}")
        return [int(l) for l in thirds[layers]]
    first, _, last = layers.partition("-")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= L:
        return list(range(int(first), int(last) + 1))
    raise ValueError(f"layers {layers!r}: write all, early, middle, late or a range a-b "
                     f"within 1-{L}")


def check_model(model):
    if not isinstance(model, Llama):
        raise ValueError(f"the model is a {type(model).__name__}: load it with lfu_min.load_model")


def lfu_backward(model, input_ids, labels, aux="lora", lam=5.0, alpha=0.1, layers="all",
                 generator=None, num_target_tokens=None, ascent_batch=None, loss_scale=None,
                 move="ascent", compare="mse"):
    """Add the gradient of l_SFT + lam * l_cons on one micro-batch to `.grad` of the parameters
    that require one.

    The ascent direction and h are constants of that gradient; for aux="inplace" the consistency
    part is taken at the perturbed weights. Every weight is left as it was, bit for bit. lam = 0
    and aux = "none" are plain SFT.

    input_ids, labels: (B, T) int64, padded on the right; labels unshifted, -100 where not
        supervised (transformers' convention). Labels may stay on the CPU beside a model on a GPU:
        then nothing here waits for the GPU.
    aux: th_aux, "lora", "reps" (steering vectors), "inplace" (the trained weights) or "none";
        lam, alpha: see the table in lfu.py; layers: see parse_layers; generator: draws the
        auxiliary LoRA's A, and what move "random" needs.
    num_target_tokens: l_SFT's divisor in place of this micro-batch's own count of supervised
        tokens, and no smaller. With gradient accumulation pass the whole step's count, and
        lam / (number of micro-batches).
    ascent_batch: (input_ids, labels) of another batch to take Eq 2's g from, as the authors' code
        does (move "other-batch"); costs a third pass.
    loss_scale: both losses are multiplied by it before their backwards, and the gradients divided
        by it after, so that float16 activations' gradients do not underflow; None: 16 times the
        divisor where matmuls are float16, else 1.
    move, compare: Eq 2 and Eq 5, by their names in moves.py and distances.py.

    Returns a dict of detached tensors: sft, consistency (unweighted), ascent_norm (||g||),
    consistency_per_layer and movement (layers,), sft_grad_norm, consistency_grad_norm (of lam *
    l_cons) and gradient_cosine; for plain SFT all but sft's are zero.
    Raises ValueError for settings out of range, and for another library's model.
    """
    check_model(model)
    for name, value, known in (("aux", aux, (*AUXILIARIES, "none")), ("move", move, MOVES),
                               ("compare", compare, DISTANCES)):
        if value not in known:
            raise ValueError(f"{name} {value!r}: choose from {', '.join(known)}")
    move = "other-batch" if ascent_batch and move == "ascent" else move
    if (move == "other-batch") != (ascent_batch is not None):
        raise ValueError(f"move {move!r}: an ascent_batch goes with other-batch, and only with it")
    if not all(isinstance(x, Real) and 0 <= x < float("inf") for x in (lam, alpha)):
        raise ValueError(f"lam = {lam}, alpha = {alpha}: both must be finite and at least 0")
    if compare == "logit-kl" and aux in IN_PLACE and model.lm_head.weight.requires_grad:
        raise ValueError(f"compare logit-kl, aux {aux}: the head that makes the logits would move "
                         "itself; leave it untrained, or choose aux lora or reps")
    compared = parse_layers(layers, model.config.num_hidden_layers)
    half = matmul_dtype(model) == torch.float16

    def batch_of(ids, labels, divisor=None, other=None):
        batch = make_batch(ids, labels, input_ids.device, divisor, generator=generator, other=other)
        scale = TOKEN_SCALE * batch.divisor if half else 1.0
        batch.loss_scale = scale if loss_scale is None else loss_scale
        return batch
    other = None if ascent_batch is None else batch_of(*ascent_batch)
    batch = batch_of(input_ids, labels, num_target_tokens or None, other)
    if num_target_tokens is not None and not (
            len(batch.targets) <= num_target_tokens < float("inf")):
        raise ValueError(f"num_target_tokens = {num_target_tokens}: the step's supervised tokens "
                         f"are at least this micro-batch's own, {len(batch.targets)}")
    if lam == 0 or aux == "none":
        result = sft_step(model, batch)
        nothing = torch.zeros_like(result["sft"])
        names = ("consistency", "ascent_norm", "consistency_grad_norm", "gradient_cosine")
        by_layer = dict.fromkeys(("consistency_per_layer", "movement"),
                                 nothing.expand(len(compared)))
        return result | dict.fromkeys(names, nothing) | by_layer
    return lfu_step(model, batch, AUXILIARIES[aux], lam, alpha, compared, MOVES[move],
                    DISTANCES[compare])
