"""The engine room of a step: what the equations in lfu.py stand on, and what need not be read to
understand them.

A micro-batch as tensors (Batch), the states that count (states), the head in chunks (sft_loss),
float16's loss scale (backward_into), and the bookkeeping of `.grad` (adds_to_grad).
Letters: B batch, T tokens, N supervised positions, D hidden, V vocabulary, L layers.
Verified in tests/test_lfu.py against the definition written out slowly.
"""
from contextlib import contextmanager
from dataclasses import dataclass
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

HEAD_CHUNK = 128  # positions whose logits exist at one time: memory does not grow with N x V
TOKEN_SCALE = 16.0  # float16's loss scale a supervised token: it leaves room below 65504


# ---- a micro-batch ----

@dataclass
class Batch:
    """One micro-batch, on the model's device; make_batch builds it from labels."""
    input_ids: torch.Tensor  # (B, T) int64, padded on the right
    positions: torch.Tensor  # (N,) int64: the flattened (b, t) whose next token is supervised
    targets: torch.Tensor  # (N,) int64: these next tokens, y_t
    divisor: int  # of l_SFT: supervised tokens, of this micro-batch or of the optimizer step
    loss_scale: float = 1.0  # float16: losses are multiplied by it, gradients divided
    generator: torch.Generator = None  # draws whatever is random, as the auxiliary LoRA's A
    other: "Batch" = None  # a second batch, for the authors' way to take Eq 2's g


def make_batch(input_ids, labels, device=None, divisor=None, loss_scale=1.0, generator=None,
               other=None):
    """A Batch from input_ids and unshifted labels, (B, T) int64 each, -100 where not supervised.

    labels[b, t] is the token at t itself, so the state at t predicts labels[b, t + 1], and the
    last state predicts nothing. Where labels lie on the CPU nothing here waits for a GPU.
    device: where the batch goes (None: where input_ids are); divisor: None counts the targets.
    Raises ValueError for labels of another shape.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels {tuple(labels.shape)} should have the shape of input_ids, "
                         f"{tuple(input_ids.shape)}")
    device = input_ids.device if device is None else device
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B * T,)
    positions = (following != -100).nonzero().squeeze(1)  # (N,)
    targets = following[positions]  # (N,)
    ids, positions, targets = (x.to(device, non_blocking=True)
                               for x in (input_ids, positions, targets))
    divisor = max(len(targets), 1) if divisor is None else divisor
    return Batch(ids, positions, targets, divisor, loss_scale, generator, other)


def matmul_dtype(model):
    """The dtype in which the blocks' linear layers multiply."""
    return model.model.layers[0].self_attn.q_proj.compute_dtype


def round_stream(model, dtype):
    """Round the residual stream to `dtype` behind every block from now on, its gradient too, as
    models do whose stream is half (those round within a block as well). Returns the hooks' handles;
    remove() ends it."""
    return [block.register_forward_hook(lambda block, x, h: h.to(dtype).to(h.dtype))
            for block in model.model.layers]


@contextmanager
def added_to_embedding(model, noise):
    """Inside the block the embedding (B, T, D) is x + noise, by a forward hook."""
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, ids, x: x + noise.to(x.dtype))
    try:
        yield
    finally:
        hook.remove()


def trained(model):
    """th: the parameters that require a gradient. Raises ValueError where there is none."""
    if hasattr(model, "reshard"):  # --shard: after a forward alone some lie whole; th are the parts
        model.reshard()
    th = [p for p in model.parameters() if p.requires_grad]
    if not th:
        raise ValueError("no parameter of the model requires a gradient: add_lora(model), "
                         "or model.requires_grad_(True)")
    return th


# ---- forward ----

def states(model, batch):
    """The states that predict a supervised token (Eq 3): L+1 tensors (N, D), [0] the embedding."""
    return [h.flatten(0, 1)[batch.positions] for h in model.hidden_states(batch.input_ids)]


def last_state(model, batch):
    """states(...)[-1] without gathering the others: (N, D)."""
    return model.hidden_states(batch.input_ids)[-1].flatten(0, 1)[batch.positions]


@torch.no_grad()
def movement(h, h_aux, layers):
    """How far the ascent moved the states, RMS(h' - h) / RMS(h) of each compared layer: (K,)."""
    return torch.stack([(h_aux[l] - h[l]).norm() / h[l].norm() for l in layers])


def sft_loss(model, h, batch):
    """Eq 1: mean cross-entropy of the head's predictions from h (N, D), the last layer's states.
    0-d. "Mean" is the sum over the N positions, divided by batch.divisor."""
    head, scale = model.lm_head, batch.loss_scale / batch.divisor
    # no_grad does not reach needs_input_grad below, and a trained head's gradient is large
    weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
    return ChunkedCrossEntropy.apply(h, weight, batch.targets, scale,
                                     head.compute_dtype) / batch.divisor


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of h (N, D) @ weight (V, D).T with targets (N,), 0-d.

    The gradients are taken in the forward, HEAD_CHUNK positions at a time, while their logits
    exist. `scale` is the gradient that will arrive (loss scale / divisor): multiplied in already
    there, because float16 could not hold the small numbers without it.
    """
    @staticmethod
    def forward(ctx, h, weight, targets, scale, dtype):
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if needs_h else None
        dw = torch.zeros_like(weight) if needs_weight else None
        total, w = h.new_zeros(()), weight.to(dtype)
        for start in range(0, len(h), HEAD_CHUNK):
            rows = slice(start, start + HEAD_CHUNK)
            x, y = h[rows].to(dtype), targets[rows, None]  # (n, D), (n, 1)
            log_p = F.linear(x, w).to(h.dtype).log_softmax(-1)  # (n, V)
            total -= log_p.gather(1, y).sum()
            p = log_p.exp_()  # (n, V); the gradient of the cross-entropy is p - onehot(y)
            p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype))
            d_logits = p.mul_(scale).to(dtype)
            if needs_h:
                dh[rows] = F.linear(d_logits, w.T)
            if needs_weight:
                dw += F.linear(d_logits.T, x.T)
            del log_p, p, d_logits  # before the next chunk's
        ctx.save_for_backward(dh, dw)
        ctx.scale = scale
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, arriving):
        dh, dw = (None if d is None else d * (arriving / ctx.scale) for d in ctx.saved_tensors)
        return dh, dw, None, None, None


# ---- backward ----

@torch.no_grad()
def joint_norm(tensors):
    """||.||_2 over all tensors together, as if they were one long vector. 0-d; no tensors: 0."""
    if not tensors:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # --shard: lies in parts


def cosine_of_parts(both, a, b):
    """The cosine of two vectors of norms a and b whose sum has the norm `both`; 0 where a or b is
    0. 0-d tensors. From squares: rounding leaves about 1e-7 * max(a, b) / min(a, b) of it."""
    cosine = (both ** 2 - a ** 2 - b ** 2) / (2 * a * b)
    return torch.nan_to_num(cosine, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)


def over_norm(g, norm):
    """g / norm; zero where that is no number: g is zero, or float16 overflowed on the way to g."""
    return torch.nan_to_num(g / norm, nan=0.0, posinf=0.0, neginf=0.0)


def grads_of(tensors):
    """Their `.grad`, zero where no backward has come by."""
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def backward_into(loss, batch, th, th_aux=()):
    """loss.backward() into `.grad` of th and th_aux, and of nothing else. Returns the norm of
    what it added to th (0-d).

    The loss is multiplied by batch.loss_scale and every gradient divided by it as it arrives, so
    that small numbers survive float16 on the way; `.grad` itself is never scaled.
    """
    loss_scale = batch.loss_scale
    if not loss.requires_grad:  # no trained weight lies below it: only the head is trained, say
        return torch.zeros_like(loss)
    if hasattr(th[0], "full_tensor"):
        return _backward_sharded(loss, th, th_aux, loss_scale)
    norms, own = [], {id(p) for p in th}

    def arrive(grad, counts):
        grad = grad if loss_scale == 1 else grad / loss_scale
        if counts:
            norms.append(torch.linalg.vector_norm(grad))
        return grad
    leaves = {id(p): p for p in (*th, *th_aux)}  # of `inplace`, th_aux is th: each once
    hooks = [p.register_hook(functools.partial(arrive, counts=key in own))
             for key, p in leaves.items()]
    try:
        (loss_scale * loss).backward(inputs=list(leaves.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return joint_norm(norms)


def _backward_sharded(loss, th, th_aux, loss_scale):
    """backward_into where parameters lie in parts: fully_shard knows neither hooks nor inputs."""
    earlier = [p.grad for p in (*th, *th_aux)]
    for p in (*th, *th_aux):
        p.grad = None
    (loss_scale * loss).backward()
    for p in (*th, *th_aux):
        if p.grad is not None:
            p.grad /= loss_scale
    norm = joint_norm([p.grad for p in th if p.grad is not None])
    _add(th, earlier)
    return norm


def _add(tensors, earlier):
    """Add what was in `.grad` before to what is there now."""
    for t, old in zip(tensors, earlier):
        if t.grad is None:
            t.grad = old
        elif old is not None:
            t.grad += old


@contextmanager
def empty_grad(tensors):
    """Inside the block every `.grad` begins empty; after it, what was there before is added. After
    an exception only that is there."""
    earlier = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    try:
        yield
    except BaseException:
        for t, old in zip(tensors, earlier):
            t.grad = old
        raise
    _add(tensors, earlier)


def adds_to_grad(step):
    """Decorator of a step(model, batch, ...) that leaves its gradient in empty `.grad`s: makes it
    add to what is there, as loss.backward() does. (The ascent of `inplace` reads `.grad`, which
    must be this micro-batch's alone.) The results are detached, those of a step with two gradients
    get their cosine, `gradient_cosine`. A batch without targets adds zero and returns zeros."""
    @functools.wraps(step)
    def added(model, batch, *args, **kwargs):
        if not torch.is_grad_enabled():
            raise ValueError("gradients are off here (torch.no_grad or inference_mode), and the "
                             "step is made of them")
        th = trained(model)
        with empty_grad(th):
            result = step(model, batch, *args, **kwargs)
            if "consistency_grad_norm" in result:
                both = joint_norm([p.grad for p in th if p.grad is not None])
                result["gradient_cosine"] = cosine_of_parts(
                    both, result["sft_grad_norm"], result["consistency_grad_norm"])
        empty = not len(batch.targets)  # means over nothing would be nan
        return {name: torch.zeros_like(x) if empty else x.detach() for name, x in result.items()}
    return added
