"""What a step costs, beside what it costs elsewhere:

    python -m lfu_min.cost.bench --shape SmolLM2-135M

Times one micro-batch, forward and backward, of plain SFT and of LfU with each auxiliary kind. Where
transformers and peft are installed, their SFT step and the LfU step of the paper's authors
(peers.py) run beside it, on the same weights and batches. All cases take turns in one process, so
that a busy machine slows them alike; peak memory is taken in a process of its own for each.
Clipping and AdamW are left out, as they are the same for all. tests/test_bench.py checks that both
sides do the same work.
"""
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from statistics import median
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import peers
from .count import STEPS, count_step, fresh_model, prepare
from ..engine import system
from ..files import checkpoint, data, jsons, tokenizer
from ..methods import AUXILIARIES, lfu_backward
from ..model import LlamaConfig
from ..scoring.generate import generate

TIED = dict(tie_word_embeddings=True)
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key/value heads, head_dim
    "bundled": LlamaConfig(896, 128, 384, 6, 4, 2, 32, **TIED),
    "SmolLM2-135M": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, **TIED),
    "Llama-3.2-1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, **TIED),
    "Llama-3.1-8B": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128),
}
OURS = {"sft": "none", **{aux: aux for aux in AUXILIARIES}}  # case -> auxiliary kind
THEIRS = ("their-sft", "their-lfu")
COMPARED = (("their-sft", "sft"), ("their-lfu", "lora"), ("their-lfu", "inplace"))


def main(argv=None):
    """Run the benchmark and print its table. Returns what --json writes. Raises ValueError on bad
    input."""
    s = get_settings(argv)
    measure = evaluation if s.evaluation else count if s.count else compare
    settings = {**vars(s), "config": asdict(s.config), "device": str(s.device),
                "torch_dtype": str(s.torch_dtype)}
    out = dict(settings=settings, threads=torch.get_num_threads(), **system.environment(),
               **measure(s))
    if s.json:
        jsons.write_json(s.json, out)
    return out


# ---- settings ----

def parser():
    p = system.Parser(prog="python -m lfu_min.cost.bench", epilog="Defaults stand in brackets.",
                      description="What a step costs, beside what it costs elsewhere.")
    add, cases = p.add_argument, [*OURS, *THEIRS]
    add("--model", help="Hugging Face folder, in place of --shape's random weights")
    add("--shape", choices=SHAPES, default="SmolLM2-135M", help="[SmolLM2-135M]")
    add("--cases", nargs="+", choices=cases, default=cases, metavar="CASE",
        help=f"which of: {', '.join(cases)} [all]")
    add("--batch", type=int, default=4, help="examples a step [4]")
    add("--tokens", type=int, default=200, help="an example; the second half is supervised [200]")
    add("--repeats", type=int, default=5, help="timed steps of each case, after a first one [5]")
    add("--tune", choices=("lora", "full"), default="lora", help="[lora]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    add("--dtype", choices=("auto", *system.DTYPES), default="auto",
        help="of matrix products; auto = fp16 on CUDA, else fp32 [auto]")
    add("--activation-checkpointing", action="store_true", help="as in train.py; theirs, too")
    add("--no-memory", action="store_true", help="skip the process a case for its peak memory")
    add("--json", metavar="FILE", help="write all results there")
    add = p.add_mutually_exclusive_group().add_argument
    add("--profile", action="store_true", help="then print where a step of each case spends time")
    add("--count", action="store_true",
        help="instead: count operations and memory of our steps, without running them")
    add("--evaluation", metavar="FILE",
        help="instead: loading, tokenising FILE (.json, .jsonl), and generation")
    return p


def get_settings(argv=None):
    """The settings in argv (None: the command line). Raises ValueError."""
    s = parser().parse_args(argv)
    for name, least in (("batch", 1), ("tokens", 2), ("repeats", 1)):
        if getattr(s, name) < least:
            raise ValueError(f"--{name} {getattr(s, name)} should be at least {least}")
    if s.json:
        jsons.check_output("--json", s.json)
    if s.evaluation and not s.model:
        raise ValueError("--evaluation needs --model: random weights have no tokenizer")
    s.cases = ["sft"] + [case for case in s.cases if case != "sft"]  # the ratios need it
    s.device = system.pick_device(s.device)
    s.dtype, s.torch_dtype = system.pick_dtype(s.dtype, s.device)
    s.config = checkpoint.load_config(s.model) if s.model else SHAPES[s.shape]
    return s


def heading(s, *more):
    return ", ".join([f"{s.model or s.shape}: {s.batch} x {s.tokens} tokens", "half supervised",
                      f"tune {s.tune}", s.dtype, *more]
                     + ["checkpointing"] * s.activation_checkpointing)


# ---- what is measured: models, batches, steps ----

def make_batches(config, n, batch, tokens, device):
    """n micro-batches (input_ids, labels) of random tokens, (B, T) each, the second half of every
    row supervised."""
    ids = torch.randint(config.vocab_size, (n, batch, tokens),
                        generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :, :tokens // 2] = -100
    return list(zip(ids.to(device), labels))


def our_step(model, aux):
    """step(batch, other) of train.py; `other` is a second batch, which only the authors' step
    uses."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(0)

    def step(batch, other):
        model.zero_grad()
        lfu_backward(model, *batch, aux=aux, generator=generator)
    return step


def build(s, cases):
    """{case: step(batch, other)} of one model of ours and, where asked for, one of transformers on
    the same weights."""
    dtype = torch.float32 if s.tune == "full" else s.torch_dtype  # trained weights stay in float32
    if s.model:
        model = checkpoint.load_model(s.model, s.device, dtype)
    else:
        with torch.device(s.device):  # drawn where they will live: 8B never passes through the CPU
            model = fresh_model(s.config, dtype)
    steps = peers.their_steps(s, model.state_dict()) if set(cases) & set(THEIRS) else {}
    prepare(model, s.tune, s.torch_dtype, s.activation_checkpointing)
    steps.update({case: our_step(model, aux) for case, aux in OURS.items()})
    return {case: steps[case] for case in cases}


# ---- time and memory of all cases ----

def compare(s):
    """Print the table of all cases, and how they compare. Returns the results as JSON values."""
    cases = s.cases
    try:
        versions = {package: version(package) for package in ("transformers", "peft")}
    except PackageNotFoundError as error:
        cases, versions = [case for case in cases if case in OURS], {}
        print(f"without the comparison ({error.name} is not installed): pip install -r "
              "requirements-dev.txt")
    where = (torch.cuda.get_device_name(s.device) if s.device.type == "cuda"
             else f"{torch.get_num_threads()} threads")
    print(heading(s, f"{s.device} ({where})", f"torch {torch.__version__}",
                  *(f"{package} {v}" for package, v in versions.items())), flush=True)
    peaks = {case: None if s.no_memory else peak_memory(s, case) for case in cases}
    batches = make_batches(s.config, s.repeats + 1, s.batch, s.tokens, s.device)
    steps = build(s, cases)
    results, rate = time_cases(steps, batches, s.device, s.torch_dtype)
    for case in cases:
        results[case]["peak_mib"] = peaks[case]
    print_table(results, rate)
    factors = [print_factor(results, theirs, ours) for theirs, ours in COMPARED
               if theirs in results and ours in results]
    if s.profile:
        profile(steps, batches[0], s.device)
    return dict(compared_with=versions, matmul_tflops=rate, cases=results, compared=factors)


def timed(function, device, *args):
    """Milliseconds of function(*args), and of the work it leaves on a GPU."""
    wait = getattr(torch, device.type).synchronize  # torch.cpu's does nothing
    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return 1000 * (time.perf_counter() - start)


def time_cases(steps, batches, device, dtype):
    """({case: result}, matmul TFLOP/s) of the steps, in turns on the same batches; the first batch
    warms up and counts FLOPs."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    ms, flops, matmul_ms = {case: [] for case in steps}, {}, []
    for case, step in steps.items():
        with FlopCounterMode(display=False) as counter:  # attention is not counted on a CPU
            step(batches[0], batches[-1])
        flops[case] = counter.get_total_flops()
    for i in range(1, len(batches)):
        matmul_ms += [timed(torch.mm, device, a, b) for _ in range(3)]
        # back and forth: no case always follows the one that leaves the memory in disorder
        for case in list(steps)[::1 if i % 2 else -1]:
            ms[case].append(timed(steps[case], device, batches[i], batches[i - 1]))
    rate, tokens = 2 * side**3 / median(matmul_ms) / 1e9, batches[0][0].numel()
    return {case: result(ms[case], ms.get("sft", ms[case]), flops[case], tokens, rate)
            for case in steps}, rate


def result(ms, sft_ms, flops, tokens, rate):
    """One case's row of the table. ms, sft_ms: of every turn; rate: of matmuls, in TFLOP/s."""
    ratios = [t / sft for t, sft in zip(ms, sft_ms)]  # of one turn: neighbours in time
    return dict(ms=median(ms), ms_all=ms, tokens_per_s=1000 * tokens / median(ms),
                ratio_to_sft=median(ratios), ratio_all=ratios, tflop=flops / 1e12,
                share_of_matmul_rate=flops / median(ms) / 1e9 / rate)


def peak_memory(s, case):
    """Peak memory in MiB of two steps of one case, in a process of its own; None where that fails,
    out of memory, say: the other cases still count.

    It runs before the parent loads a model of its own, so that the two need not fit side by side.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(peak_of_two_steps, s, case).result()
        except RuntimeError:
            return None


def peak_of_two_steps(s, case):
    """Of the whole process, or of the GPU's allocator."""
    batches, step = make_batches(s.config, 2, s.batch, s.tokens, s.device), build(s, [case])[case]
    step(*batches)
    step(*batches[::-1])
    return system.peak_memory_mib(s.device)


def spread(values, digits, width=0):
    """'median (smallest - largest)'"""
    middle, least, most = (f"{x:.{digits}f}" for x in (median(values), min(values), max(values)))
    return f"{middle:>{width}} ({least} - {most})"


def print_table(results, rate):
    print(f"measured matmul rate {rate:.3f} TFLOP/s\n\n{'case':10} {'ms a step (min - max)':>26} "
          f"{'tokens/s':>9} {'x sft (min - max)':>21} {'TFLOP':>8} {'of rate':>8} {'peak MiB':>9}")
    for case, r in results.items():
        print(f"{case:10} {spread(r['ms_all'], 1, 10):27}{r['tokens_per_s']:9.0f} "
              f"{spread(r['ratio_all'], 2, 8)} {r['tflop']:8.3f} "
              f"{r['share_of_matmul_rate']:8.0%} {r['peak_mib'] or float('nan'):9.0f}", flush=True)


def print_factor(results, theirs, ours):
    """Print how many times as fast as `theirs` the case `ours` is. Returns it as JSON values."""
    a, b = results[theirs], results[ours]
    faster = [t / o for t, o in zip(a["ms_all"], b["ms_all"])]
    memory = b["peak_mib"] / a["peak_mib"] if a["peak_mib"] and b["peak_mib"] else None
    print(f"{ours} is {spread(faster, 2).replace(' (', 'x (', 1)} as fast as {theirs}"
          + (f", with {memory:.2f}x its peak memory" if memory else ""))
    return dict(theirs=theirs, ours=ours, faster=median(faster), faster_all=faster,
                memory_ratio=memory)


def profile(steps, batch, device):
    """Print torch.profiler's most expensive operations of one step of each case."""
    order = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
    for case, step in steps.items():
        with torch.profiler.profile() as p:
            step(batch, batch)
        table = p.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=50)
        print(f"\n{case}\n{table}")


# ---- what else can be measured ----

def count(s):
    """Print TFLOP, their ratio to SFT's and peak GiB of our steps, counted on tensors without data
    (count.py). Returns them as JSON values."""
    cases, rows = [case for case in s.cases if case in OURS], {}
    wait = system.duration(len(cases) * s.config.num_hidden_layers / 4)
    print(f"{heading(s)}; counted, not run (may take {wait})\n"
          f"{'case':10} {'TFLOP':>9} {'x sft':>7} {'peak GiB':>9}", flush=True)
    for case in cases:
        _, flops, peak = count_step(s.config, STEPS[OURS[case]], s.batch, s.tokens, s.tune,
                                    s.torch_dtype, s.activation_checkpointing)
        tflop, gib = flops / 1e12, peak / 2**30
        ratio = tflop / rows["sft"]["tflop"] if rows else 1.0
        rows[case] = dict(tflop=tflop, ratio_to_sft=ratio, peak_gib=gib)
        print(f"{case:10} {tflop:9.3f} {ratio:7.2f} {gib:9.2f}", flush=True)
    return dict(count=rows)


def evaluation(s):
    """Print and return medians of --repeats in turns: loading --model, tokenising all of the file
    --evaluation, and greedy generation of 64 tokens after its first eight questions; beside
    transformers (None where it is not installed)."""
    examples = data.read_examples(s.evaluation, questions=True)
    encoder = tokenizer.load_tokenizer(s.model)
    texts = [e.prompt + "\n" + e.answer for e in examples]
    prompts = [data.prompt_ids(encoder, e.prompt, "plain") for e in examples[:8]]
    load = lambda: checkpoint.load_model(s.model, s.device, s.torch_dtype)
    model = load()
    ours = {"loading": load,
            f"tokenising {len(texts)} examples": lambda: [encoder.encode(t) for t in texts],
            f"generating {len(prompts)} x 64 tokens": lambda: generate(model, prompts, 64)}
    theirs, rows = peers.their_evaluation(s, texts, prompts), []
    for i, what in enumerate(ours):
        functions = ours[what], *theirs[i:i + 1]
        times = [[timed(f, s.device) / 1000 for f in functions] for _ in range(s.repeats)]
        seconds, their = (median(t[end] for t in times) for end in (0, -1))
        faster = median(t[-1] / t[0] for t in times)
        rows.append(dict(what=what, seconds=seconds, their_seconds=their if theirs else None,
                         faster=faster if theirs else None))
        print(f"{what:26} {seconds:8.2f} s" + (f"   transformers {their:8.2f} s   {faster:.2f}x "
                                               "as fast" if theirs else ""), flush=True)
    return dict(evaluation=rows)


if __name__ == "__main__":
    system.command_line(main)
