"""The first step of a training, told slowly:

    python -m lfu_min.teach.explain                               the bundled model
    python -m lfu_min.teach.explain --model DIR --data FILE       any other
    python -m lfu_min.teach.explain --kinds 4                     the numbers to watch, by kind

The step is lfu.lfu_step itself. Two of its parts take notes while it runs: a move that looks at the
model before and after Eq 2, and a distance that keeps h and h'. Batch, trained LoRA and auxiliary
draw are those of train.py's first step with the same flags, so l_SFT is that of its first log line
(where --accumulate is 1). Always in float32, half precision beside it. docs/lecture.ipynb calls
these functions; verified in tests/test_teach.py against train.py and tests/definitions.py.
"""
import torch

from ..engine import system
from ..engine.distributed import Team
from ..engine.passes import joint_norm, last_state, round_stream, sft_loss, states, trained
from ..files import data
from ..files.checkpoint import load_config, load_model
from ..files.tokenizer import check_fit, load_tokenizer
from ..lfu import ascend, lfu_step, mse
from ..lora import add_lora, aux_lora
from ..methods import AUXILIARIES
from ..training.loop import plan_step
from ..training.settings import get_settings

HALF = {  # column: dtype of matrix products, of the residual stream between the blocks
    "fp16": (torch.float16, torch.float32), "bf16": (torch.bfloat16, torch.float32),
    "bf16 stream": (torch.bfloat16, torch.bfloat16)}


# ---- the model and the batch of train.py's first step ----

def parser():
    p = system.Parser(prog="python -m lfu_min.teach.explain",
                      description="The first step of a training, told slowly.",
                      epilog="The flags mean what they mean in train.py.")
    p.add_argument("--model", help="Hugging Face folder [the bundled one]")
    p.add_argument("--data", help=".json or .jsonl file of examples [256 word problems]")
    p.add_argument("--template", choices=data.TEMPLATES, help="of the prompt [plain]")
    p.add_argument("--max-len", type=int, help="tokens; longer examples are dropped [256 / 2048]")
    p.add_argument("--batch-size", type=int, help="examples [16 / 4]")
    p.add_argument("--aux", choices=AUXILIARIES, help="what is made worse [lora]")
    p.add_argument("--lam", type=float, help="weight of the consistency loss [5]")
    p.add_argument("--alpha", type=float, help="length of the ascent step [0.1]")
    p.add_argument("--seed", type=int, help="[42]")
    p.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps [auto]")
    p.add_argument("--kinds", type=int, metavar="N", help="no story, but the numbers to watch, for "
                   "every --aux, over the first N batches")
    return p


def prepare(argv=None):
    """(settings, model with its LoRA, tokenizer, batches: the first, or --kinds of them) as
    train.py begins with them. ValueError on bad input."""
    own = parser().parse_args(argv)  # of train.py's flags, only those that matter here
    kinds = vars(own).pop("kinds")
    if kinds is not None and kinds < 1:
        raise ValueError(f"--kinds {kinds} should be at least 1")
    s = get_settings([f"{system.flag(name)}={value}" for name, value in vars(own).items()
                      if value is not None])
    for name in ("lam", "alpha"):
        if getattr(s, name) == 0:
            raise ValueError(f"--{name} 0 is plain SFT: there is nothing to compare")
    device = system.pick_device(s.device)
    config, tokenizer = load_config(s.model), load_tokenizer(s.model)
    check_fit(tokenizer, config, s.model)
    s.max_len = min(s.max_len, config.max_position_embeddings)
    examples, _ = data.load_dataset(s.data, tokenizer, s.template, s.max_len)
    model = load_model(s.model, device, torch.float32)
    add_lora(model, s.r, s.lora_alpha, generator=torch.Generator().manual_seed(s.seed))
    s.per_step, s.kinds = s.batch_size, kinds
    return s, model, tokenizer, [
        plan_step(s, examples, step, Team(0, 1, device), tokenizer.eos_id).batches[0]
        for step in range(1, (kinds or 1) + 1)]


# ---- what is seen in a step ----

def observe(model, batch, auxiliary=aux_lora, lam=5.0, alpha=0.1):
    """Take lfu_step, from empty `.grad`s, on a float32 model. Returns a dictionary of what it
    returned and of

    th, th_aux        (tensors, numbers in them)
    sft_of_th         l_SFT before anything is attached
    sft_attached      l_SFT with th_aux attached at zero effect
    sft_worse         l_SFT after the ascent; to first order sft_attached + alpha * ascent_norm
    moved             ||th_aux after - th_aux before||_2
    h, h_aux          the states, L+1 tensors (N, D) each
    share             of the gradient of lam * l_cons: its norm over the sum of both norms
    half_cosine       {column of HALF: (L,)} of h' - h computed in half precision: its cosine with
                      float32's, at the same th_aux
    half_ratio        {column of HALF: (L,)} and its mean square over float32's
    lam, alpha        as given
    """
    seen = dict(lam=lam, alpha=alpha, th=size(trained(model)), sft_of_th=sft_now(model, batch))
    model.zero_grad()

    def move(th_aux, g, alpha, model, batch):
        seen.update(th_aux=size(th_aux), sft_attached=sft_now(model, batch))
        start = [t.detach().clone() for t in th_aux]
        half = {name: states_in(*HALF[name], model, batch) for name in HALF}
        norm = ascend(th_aux, g, alpha)                                              # Eq 2
        seen.update(sft_worse=sft_now(model, batch),
                    moved=joint_norm(differences(start, th_aux)).item(),
                    half={name: differences(half[name], states_in(*HALF[name], model, batch))[1:]
                          for name in HALF})
        return norm

    def compare(h, h_aux, layers, model):
        seen.update(h=[x.detach() for x in h], h_aux=[x.detach() for x in h_aux])
        return mse(h, h_aux, layers)                                                 # Eq 5

    seen.update(lfu_step(model, batch, auxiliary, lam, alpha, move=move, compare=compare))

    exact = differences(seen["h"], seen["h_aux"])[1:]  # h' - h, L tensors (N, D)
    norms = [seen[name].item() for name in ("sft_grad_norm", "consistency_grad_norm")]
    half = seen.pop("half")
    return dict(
        seen, share=norms[1] / sum(norms),
        half_cosine={name: torch.stack([cosine([d], [e]) for d, e in zip(found, exact)])
                     for name, found in half.items()},
        half_ratio={name: torch.stack([(rms(d) / rms(e)) ** 2 for d, e in zip(found, exact)])
                    for name, found in half.items()})


@torch.no_grad()
def sft_now(model, batch):
    return sft_loss(model, last_state(model, batch), batch).item()


@torch.no_grad()
def states_in(products, stream, model, batch):
    """states(model, batch) with matrix products in one dtype and every block's output rounded to
    another (float32: as the model does it)."""
    hooks = round_stream(model, stream)
    model.set_matmul_dtype(products)
    try:
        return states(model, batch)
    finally:
        model.set_matmul_dtype(None)
        for hook in hooks:
            hook.remove()


def size(tensors):
    return len(tensors), sum(t.numel() for t in tensors)


@torch.no_grad()
def differences(before, after):
    return [b - a for a, b in zip(before, after)]


def rms(x):
    return x.square().mean().sqrt()


def cosine(a, b):
    """Of two lists of tensors, each as one long vector."""
    a, b = (torch.cat([t.flatten() for t in tensors]).cpu().double() for tensors in (a, b))
    return torch.cosine_similarity(a, b, dim=0)


def watched(model, batches, lam, alpha):
    """{kind: {name: (batches,) or (batches, layers)}}, of lfu_step's numbers those to watch, and of
    `rise`, by how much the ascent raises l_SFT (nats a token). The model is not trained in
    between."""
    found = {}

    def move(th_aux, g, alpha, model, batch):
        before = sft_now(model, batch)
        norm = ascend(th_aux, g, alpha)                                              # Eq 2
        rises.append(sft_now(model, batch) - before)
        return norm
    for aux, kind in AUXILIARIES.items():
        rises = []
        steps = [lfu_step(model, batch, kind, lam, alpha, move=move) for batch in batches]
        found[aux] = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        norms = [found[aux][name] for name in ("consistency_grad_norm", "sft_grad_norm")]
        found[aux] |= {"share": norms[0] / sum(norms), "rise": torch.tensor(rises)}
    return found


# ---- told ----

def row(batch, b=0):
    """(ids, supervised) of example b: its ids without padding, and the places t of its supervised
    tokens. batch.positions are those of the states that predict them, t - 1."""
    T = batch.input_ids.shape[1]
    supervised = [p + 1 - b * T for p in batch.positions.tolist() if p // T == b]
    return batch.input_ids[b, :max(supervised) + 1].tolist(), supervised


def example(tokenizer, batch):
    """The batch's first example as text, its supervised part in >>> <<<."""
    ids, supervised = row(batch)
    prompt, answer = ids[:min(supervised)], [ids[t] for t in supervised]
    return f"{tokenizer.decode(prompt)}>>>{tokenizer.decode(answer)}<<<"


def border(tokenizer, batch, around=3):
    """A table of the tokens where the first example's answer begins: which states count."""
    ids, supervised = row(batch)
    text = [repr(tokenizer.decode([i])) for i in ids]
    first, lines = min(supervised), [f"{'t':>4}  {'token':14}  {'label':14}  the state predicts"]
    for t in range(max(0, first - around), min(first + around, len(ids) - 1)):
        label = text[t] if t in supervised else "-100"
        predicts = f"{text[t + 1]}, and counts" if t + 1 in supervised else "nothing that counts"
        lines.append(f"{t:4}  {text[t]:14}  {label:14}  {predicts}")
    return "\n".join(lines)


def bars(values, width=40):
    """A line of # for each value, the longest of `width`."""
    longest = max(values)
    return ["#" * round(width * float(v / longest)) for v in values]


def the_batch(tokenizer, batch):
    B, T = batch.input_ids.shape
    return (f"input_ids and labels ({B}, {T}), padded on the right. Of {B * T} states "
            f"{len(batch.positions)} predict a\nsupervised token; only these count. The first "
            "example, its supervised part in >>> <<<:\n\n"
            f"{example(tokenizer, batch)}\n\n{border(tokenizer, batch)}")


def first_pass(seen):
    N, D = seen["h"][0].shape
    return (f"th      {seen['th'][0]:4} tensors, {seen['th'][1]:,} numbers: trained\n"
            f"th_aux  {seen['th_aux'][0]:4} tensors, {seen['th_aux'][1]:,} numbers: auxiliary\n"
            f"h       {len(seen['h']):4} tensors ({N}, {D}): the embedding and every layer\n"
            f"l_SFT of th                 {seen['sft_of_th']:.6f}\n"
            f"l_SFT with th_aux attached  {seen['sft_attached']:.6f}   still the same model\n"
            f"norm of l_SFT's gradient    {seen['sft_grad_norm']:.4f} with respect to th, "
            f"{seen['ascent_norm']:.4f} to th_aux: ||g||")


def the_ascent(seen):
    return (f"th_aux moved by            {seen['moved']:.4f}   alpha is {seen['alpha']:g}\n"
            f"l_SFT after                {seen['sft_worse']:.6f}   "
            f"{seen['sft_worse'] - seen['sft_attached']:+.4f}\n"
            f"expected to first order    alpha * ||g||   "
            f"{seen['alpha'] * seen['ascent_norm']:+.4f}")


def second_pass(seen):
    terms = seen["consistency_per_layer"]
    lines = [f"   {l:5}  {term:13.2e}  {size:16.2%}   {bar}" for l, (term, size, bar)
             in enumerate(zip(terms, seen["movement"], bars(terms)), 1)]
    return "\n".join([
        "   layer  mean (h'-h)^2  RMS(h'-h)/RMS(h)", *lines,
        f"l_cons, their mean, {seen['consistency']:.3e}; lambda * l_cons "
        f"{seen['lam'] * seen['consistency']:.4f}"])


def both_gradients(seen):
    return (f"norm of l_SFT's gradient            {seen['sft_grad_norm']:.4f}\n"
            f"norm of lambda * l_cons's gradient  {seen['consistency_grad_norm']:.4f}, "
            f"a share of {seen['share']:.0%}\n"
            f"cosine of the two                   {seen['gradient_cosine']:.3f}")


def half_precision(seen):
    columns = [seen[name][kind] for name in ("half_cosine", "half_ratio") for kind in HALF]
    heads = "".join(f"{kind:>12}" for kind in (*HALF, *HALF))
    lines = [f"{l:5}" + "".join(f"{x:12.3f}" for x in values)
             for l, values in enumerate(zip(*columns), 1)]
    return "\n".join([f"{'':5}{'  cosine with float32':36}  mean square over float32's",
                      f"layer{heads}", *lines])


def by_kind(found):
    """What `watched` found as a table; a - b is the smallest and the largest value."""
    shown = {"||g||": ("ascent_norm", ".3f"), "rise": ("rise", "+.3f"),
             "l_cons": ("consistency", ".1e"), "movement": ("movement", ".2%"),
             "share": ("share", ".0%"), "cosine": ("gradient_cosine", ".2f")}
    rows = [["--aux", *shown]] + [
        [aux] + [f"{values[name].min():{form}} - {values[name].max():{form}}"
                 for name, form in shown.values()] for aux, values in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([aux.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                     for aux, *cells in rows)


def story(tokenizer, batch, seen):
    """The whole step as text."""
    return "\n\n".join([
        "1. THE BATCH", the_batch(tokenizer, batch),
        "2. FIRST FORWARD AND BACKWARD (Eq 1, 3), th_aux attached at zero effect", first_pass(seen),
        "3. ASCENT (Eq 2): th_aux <- th_aux + alpha * g / ||g||", the_ascent(seen),
        "4. SECOND FORWARD: h' (Eq 4), compared with h layer by layer (Eq 5)", second_pass(seen),
        "5. SECOND BACKWARD: the gradient of lambda * l_cons is added (Eq 6)", both_gradients(seen),
        "6. WHAT HALF PRECISION DOES to h' - h, at the same th_aux: matrix products in fp16 or\n"
        "   bf16 with the stream between the blocks in float32, and in bf16 with the stream\n"
        "   rounded to bf16 as well", half_precision(seen)])


def main(argv=None):
    """Print the story of the first step. Returns what `observe` saw (--kinds: `watched`)."""
    s, model, tokenizer, (batch, *more) = prepare(argv)
    if s.kinds:
        found = watched(model, [batch, *more], s.lam, s.alpha)
        print(by_kind(found))
        return found
    seen = observe(model, batch, AUXILIARIES[s.aux], s.lam, s.alpha)
    print(system.on_screen(story(tokenizer, batch, seen)))
    return seen


if __name__ == "__main__":
    system.command_line(main)
