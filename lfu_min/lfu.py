"""Learning from the Undesirable (LfU, arXiv 2511.13052): one function, `lfu_backward`, is the
method.

Beside the SFT loss, LfU takes one normalised gradient-ASCENT step on auxiliary components, which
makes the model worse, and pulls the hidden states of that undesirable model back to the model's
own:

    l_LfU = l_SFT + lambda * l_cons                                                                    (Eq 6)

symbol       here            shape / unit           meaning                                            default
-----------  --------------  ---------------------  -------------------------------------------------  -------
th           params          -                      trained weights: those that require a gradient
th_aux       moved           -                      auxiliary tensors the ascent moves: B of a second   lora
                                                    LoRA, steering vectors d_l, or th itself
g            g               as th_aux              gradient of l_SFT with respect to th_aux (Eq 2)
alpha        alpha           -                      length of the ascent step, over all of th_aux        0.1
h_l,t        h               (N, D) for each layer  layer-l state that predicts y_t, from th (Eq 3)
h'_l,t       h_aux           as h                   the same from th and the moved th_aux (Eq 4)
K (paper)    layers          1..L                   layers compared; the last after the final norm       all
T (paper)    predicting      N positions            positions that predict a supervised token
l_SFT        sft             nats a token           mean cross-entropy of the answer's tokens (Eq 1)
l_cons       consistency     -                      mean squared difference of h' and h (Eq 5)
lambda       lam             -                      weight of l_cons                                     5.0

Why two passes are enough: every auxiliary component starts at zero effect, so until the ascent the
auxiliary model IS the model. The forward pass that gives h is also the ascent's, and one backward
of l_SFT gives the gradients of th and of th_aux. The authors' code takes three forwards, and
restores the weights before the backward that needs them; here each gradient is exact
(tests/test_lfu.py compares with the definition written out slowly).
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from .lora import aux_lora
from .steering import aux_steering

AUX_KINDS = ("lora", "reps", "inplace", "none")
HEAD_CHUNK = 128  # positions whose logits exist at one time: memory does not grow with T x V


def parse_layers(layers, L):
    """The 1-based layer numbers that `layers` names: all, early, middle, late (thirds), or an
    inclusive range a-b."""
    thirds = dict(zip(("early", "middle", "late"), np.array_split(range(1, L + 1), 3)))
    if layers == "all":
        return list(range(1, L + 1))
    if layers in thirds and len(thirds[layers]):
        return [int(l) for l in thirds[layers]]
    first, _, last = str(layers).partition("-")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= L:
        return list(range(int(first), int(last) + 1))
    raise ValueError(f"layers {layers!r}: write all, early, middle, late or a range a-b within "
                     f"1-{L}")


@contextmanager
def inplace(params):
    """The trained weights themselves as th_aux: whatever moved them is undone, bit for bit, when
    the block ends."""
    before = [p.detach().clone() for p in params]
    try:
        yield params
    finally:
        with torch.no_grad():
            for p, old in zip(params, before):
                p.copy_(old)


def auxiliary(kind, model, params, generator):
    """The context manager of one kind of th_aux. It attaches leaf tensors that require a gradient
    and leave the model's output as it is, yields them in a list, and takes them off. A new kind:
    write one, name it here and in AUX_KINDS."""
    if kind == "lora":
        return aux_lora(model, generator)
    if kind == "reps":
        return aux_steering(model)
    if kind == "inplace":
        return inplace(params)
    raise ValueError(f"aux {kind!r}: choose from {', '.join(AUX_KINDS)}")


@torch.no_grad()
def joint_norm(tensors):
    """||.||_2 over all tensors together, as if they were one long vector. A 0-d tensor; no tensors:
    0."""
    norms = [torch.linalg.vector_norm(t) for t in tensors if t is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    # --shard: the tensors lie in parts
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def ascend(moved, g, alpha):
    """Eq 2, in place: th_aux <- th_aux + alpha * g / ||g||_2, with ONE norm over all tensors.
    Returns ||g||_2.

    Plus, not minus: towards a HIGHER loss. Where g is zero, or not finite (float16 overflowed in
    the backward), there is no direction, and nothing moves: l_cons is 0 then, and the caller sees
    the overflow in the gradient alone.
    """
    norm = joint_norm(g)
    moves = (norm > 0) & norm.isfinite()
    for tensor, direction in zip(moved, g):
        if direction is not None:
            tensor.add_(torch.where(moves, direction * (alpha / norm), 0).to(tensor.dtype))
    return norm


def squared_difference(h, h_aux):
    """Eq 5, one term a layer: the mean over positions and channels of (h' - h)^2. A tensor
    (layers,).

    The paper sums the channels; like the authors' code we average them, because lambda = 5 is meant
    for that scale. h is a constant (detached in lfu_backward): the worsened model is pulled to the
    model, never the model to it. To try another distance, change the line below, and `l_cons` in
    tests/test_lfu.py, which is the definition all gradients are compared with; finite differences
    there check the gradient in any case.
    """
    return torch.stack([F.mse_loss(b, a, reduction="sum") / max(a.numel(), 1)
                        for a, b in zip(h, h_aux)])


def sft_backward(model, h, targets, divisor, scale=1.0, inputs=None):
    """Eq 1 and its backward: l_SFT = sum of cross-entropies / divisor, from the states h (N, D)
    that predict targets (N,).

    The head works through the positions in chunks, each with its own small graph, so that no more
    than HEAD_CHUNK rows of logits exist; then one backward takes the collected d l_SFT / d h
    through the blocks. Gradients, times `scale`, go to `.grad` (of `inputs` alone, where given).
    Returns l_SFT, detached.
    """
    leaf = h.detach().requires_grad_()
    sft = torch.zeros((), dtype=h.dtype, device=h.device)
    # no targets: one empty chunk, zero gradients
    for start in range(0, max(len(h), 1), HEAD_CHUNK):
        logits = model.lm_head(leaf[start:start + HEAD_CHUNK]).to(h.dtype)  # (chunk, V)
        part = F.cross_entropy(logits, targets[start:start + HEAD_CHUNK], reduction="sum") / divisor
        (scale * part).backward(inputs=None if inputs is None else [leaf, *inputs])
        sft += part.detach()
    if h.requires_grad:  # not so if only the head is trained
        h.backward(leaf.grad, inputs=inputs)
    return sft


@contextmanager
def own_gradients(params, loss_scale):
    """Inside the block `.grad` holds this micro-batch's gradient alone (the ascent of `inplace`
    needs it so), times loss_scale. After it the scale is divided out and what was there before is
    added; after an exception only that is."""
    earlier = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    except BaseException:
        for p, old in zip(params, earlier):
            p.grad = old
        raise
    for p, old in zip(params, earlier):
        if p.grad is None:
            p.grad = old
        else:
            if loss_scale != 1:
                p.grad /= loss_scale
            if old is not None:
                p.grad += old


@contextmanager
def measured_gradient(params):
    """Yields a list that holds, after the one backward in the block, the norms of what it added to
    each `.grad`."""
    norms = []
    # --shard: no hooks there; set aside what was there before
    if hasattr(params[0], "full_tensor"):
        with own_gradients(params, 1):
            yield norms
            norms.append(joint_norm([p.grad for p in params]))
        return
    hooks = [p.register_hook(lambda grad: norms.append(torch.linalg.vector_norm(grad.detach())))
             for p in params]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def lfu_backward(model, input_ids, labels, aux="lora", lam=5.0, alpha=0.1, layers="all",
                 generator=None,
                 num_target_tokens=None, ascent_batch=None, loss_scale=None, recompute=True):
    """Add the gradient of l_SFT + lam * l_cons on one micro-batch to `.grad` of the parameters that
    require one.

    The ascent direction and h are constants of that gradient; for aux="inplace" the consistency
    part is taken at the perturbed weights. Every weight is left as it was, bit for bit. lam = 0 and
    aux = "none" are plain SFT.

    input_ids, labels: (B, T) int64, padded on the right; labels unshifted, -100 where not
    supervised (transformers'
        convention). Labels may stay on the CPU beside a model on a GPU: then nothing here waits for
        the GPU.
    aux: th_aux, "lora", "reps" (steering vectors), "inplace" (the trained weights) or "none"; lam,
    alpha, layers: see the
        table above and parse_layers; generator: draws the auxiliary LoRA's A.
    num_target_tokens: l_SFT's divisor in place of this micro-batch's own count of supervised
    tokens. With gradient
        accumulation pass the whole step's count, and lam / (number of micro-batches).
    ascent_batch: (input_ids, labels) of another batch to take Eq 2's g from, as the authors' code
    does; costs a third pass.
    loss_scale: both losses are multiplied by it before their backwards, and the gradients divided
    by it after, so that
        float16 activations' gradients do not underflow; None: 16 times the divisor where matmuls
        are float16, else 1.
    recompute: False lets the second pass keep its activations under model.activation_checkpointing:
    faster, more memory.

    Returns a dict of detached tensors: sft, consistency (unweighted), ascent_norm (||g||),
    consistency_per_layer (layers,), sft_grad_norm and consistency_grad_norm (of lam * l_cons).
    Raises ValueError for settings out of range.
    """
    if aux not in AUX_KINDS:
        raise ValueError(f"aux {aux!r}: choose from {', '.join(AUX_KINDS)}")
    if not (0 <= lam < float("inf") and 0 <= alpha < float("inf")):
        raise ValueError(f"lam = {lam}, alpha = {alpha}: both must be finite and at least 0")
    compared = parse_layers(layers, model.config.num_hidden_layers)
    params = [p for p in model.parameters() if p.requires_grad]
    if aux == "inplace" and any(p.dtype in (torch.float16, torch.bfloat16) for p in params):
        raise ValueError("aux 'inplace' moves weights by less than half precision resolves: "
                         "keep trained weights in float32")
    if not params:
        raise ValueError("no parameter of the model requires a gradient: add_lora(model), or "
                         "model.requires_grad_(True)")
    predicting, targets = supervised(labels, input_ids.device)  # (N,), (N,)
    divisor = max(len(targets), 1) if num_target_tokens is None else num_target_tokens
    if loss_scale is None:
        q = model.model.layers[0].self_attn.q_proj
        loss_scale = 16.0 * divisor if (q.matmul_dtype or q.weight.dtype) == torch.float16 else 1.0

    def states(batch_ids, where, recompute=True):  # L+1 tensors (N, D), Eq 3's positions only
        return [state.flatten(0, 1)[where]
                for state in model.hidden_states(batch_ids, recompute=recompute)]

    if lam == 0 or aux == "none":  # plain SFT
        with own_gradients(params, loss_scale):
            h = model.hidden_states(input_ids)[-1].flatten(0, 1)[predicting]
            sft = sft_backward(model, h, targets, divisor, loss_scale)
            sft_grad_norm = joint_norm([p.grad for p in params]) / loss_scale
        nothing = torch.zeros_like(sft)
        return dict(sft=sft, consistency=nothing, ascent_norm=nothing,
                    consistency_per_layer=nothing.expand(len(compared)),
                    sft_grad_norm=sft_grad_norm, consistency_grad_norm=nothing)

    with own_gradients(params, loss_scale), auxiliary(aux, model, params, generator) as moved:
        # 0. Only for ascent_batch: g from another batch, before the own batch's gradient lies in
        # the same places.
        g = None
        if ascent_batch is not None:
            other, other_targets = supervised(ascent_batch[1], input_ids.device)
            h = states(ascent_batch[0], other)[-1]
            sft_backward(model, h, other_targets, max(len(other_targets), 1), loss_scale,
                         inputs=moved)
            g = [t.grad for t in moved]
            for t in moved:
                t.grad = None
        # 1. One forward, with th_aux at zero effect: h (Eq 3), whose last layer gives l_SFT in step
        # 2 (Eq 1).
        h = states(input_ids, predicting)
        # 2. One backward: the gradients of th and of th_aux.
        sft = sft_backward(model, h[-1], targets, divisor, loss_scale)
        h = [h[l].detach() for l in compared]  # constants from here on; the graph is gone
        sft_grad_norm = joint_norm([p.grad for p in params]) / loss_scale
        # 3. The ascent (Eq 2): from here on the model is the undesirable one.
        ascent_norm = ascend(moved, [t.grad for t in moved] if g is None else g, alpha) / loss_scale
        for t in moved:
            t.requires_grad_(aux == "inplace")  # a constant of l_cons, unless it is th
        # 4. A second forward, without the head: h' (Eq 4).
        h_aux = states(input_ids, predicting, recompute)
        per_layer = squared_difference(h, [h_aux[l] for l in compared])  # (layers,)
        consistency = per_layer.mean()  # Eq 5
        # 5. Its backward pulls h' to h, adding lambda * l_cons's gradient to l_SFT's in `.grad` (Eq
        # 6).
        with measured_gradient(params) as norms:
            # not so if no trained weight lies below the compared layers
            if consistency.requires_grad:
                (loss_scale * lam * consistency).backward()
        # 6. Leaving the `with` block drops th_aux: the model is itself again.
    return dict(sft=sft, consistency=consistency.detach(), ascent_norm=ascent_norm,
                consistency_per_layer=per_layer.detach(), sft_grad_norm=sft_grad_norm,
                consistency_grad_norm=joint_norm(norms) / loss_scale)


def supervised(labels, device):
    """(positions, targets), each (N,): the flattened positions t of (B, T) whose next token is
    supervised, and that token.

    labels[b, t] is the token at t itself, so the state at t predicts labels[b, t + 1]; the last
    state predicts nothing.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B * T,)
    positions = (following != -100).nonzero().squeeze(1)  # (N,)
    return positions.to(device, non_blocking=True), following[positions].to(device, non_blocking=True)
