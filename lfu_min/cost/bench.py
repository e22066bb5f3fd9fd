"""What a step costs, beside what it costs elsewhere:  python -m lfu_min.cost.bench --shape SmolLM2-135M

Times one micro-batch, forward and backward, of plain SFT and of LfU with each auxiliary kind. Where
transformers and peft are installed, their SFT step and the LfU step of the paper's authors run
beside it, on the same weights and batches. All cases take turns in one process, so that a busy
machine slows them alike; peak memory is taken in a process of its own for each. Clipping and AdamW
are left out, as they are the same for all. tests/test_bench.py checks that both sides do the same
work.
"""
import argparse
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
import json
import os
from pathlib import Path
from statistics import median
import subprocess
import sys
import time

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..engine import system
from ..files.checkpoint import config_to_dict, load_config, load_model
from .count import count_step
from ..files.data import prompt_ids, read_examples
from ..scoring.generate import generate
from ..lfu import lfu_backward
from ..lora import TARGET_MODULES, add_lora
from ..model import Llama, LlamaConfig
from ..files.tokenizer import load_tokenizer

LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key/value heads, head_dim
    "bundled": LlamaConfig(896, 128, 384, 6, 4, 2, 32, tie_word_embeddings=True),
    "SmolLM2-135M": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5,
                                tie_word_embeddings=True),
    "Llama-3.2-1B": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5,
                                tie_word_embeddings=True,
                                rope_scaling=dict(factor=32.0, **LLAMA3)),
    "Llama-3.1-8B": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5,
                                rope_scaling=dict(factor=8.0, **LLAMA3)),
}
OURS = {"sft": "none", "lora": "lora", "reps": "reps", "inplace": "inplace"}  # case -> aux
THEIRS = ("their-sft", "their-lfu")
COMPARED = (("their-sft", "sft"), ("their-lfu", "lora"), ("their-lfu", "inplace"))


def random_weights(config, device, dtype):
    """A Llama with normal(0, 0.02) weights, drawn where they will live: an 8B model never passes
    through the CPU."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model = model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.02) if p.dim() > 1 else nn.init.ones_(p)
    return model


def make_batches(config, n, batch, tokens, device):
    """n micro-batches (input_ids, labels) of random tokens, (B, T) each, the second half of every
    row supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(config.vocab_size, (batch, tokens), generator=generator) for _ in range(n)]
    labels = [x.clone() for x in ids]
    for y in labels:
        y[:, :tokens // 2] = -100
    return [(x.to(device), y) for x, y in zip(ids, labels)]


def our_step(model, aux, recompute=True):
    """step(batch, other) of train.py; `other` is a second batch, which only the authors' step
    uses."""
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator(params[0].device).manual_seed(0)

    def step(batch, other):
        for p in params:
            p.grad = None
        lfu_backward(model, *batch, aux=aux, generator=generator, recompute=recompute)
    return step


def transformers_model(config, weights, tune, device):
    """transformers' Llama on the tensors of a state dict (shared, not copied), with peft's LoRA for
    tune = lora."""
    import peft
    import transformers
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_dict(config)))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # its table is no weight
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    if tune == "lora":
        model = peft.get_peft_model(model,
                                    peft.LoraConfig(r=8, lora_alpha=16,
                                                    target_modules=list(TARGET_MODULES)))
    return model.train()


def their_sft_step(model):
    """One SFT step as transformers' Trainer takes it: logits at all positions, in float32 for the
    loss."""
    params = [p for p in model.parameters() if p.requires_grad]

    def step(batch, other):
        for p in params:
            p.grad = None
        model(input_ids=batch[0], labels=batch[1].to(batch[0].device),
              use_cache=False).loss.backward()
    return step


def their_lfu_step(model, lam=5.0, alpha=0.1):
    """One LfU step in the order of the authors' released trainer: three forwards, the backward of
    three graphs.

    The ascent's gradient comes from a second batch, the trained weights themselves are moved, and
    states are compared at the label positions of all L+1 entries. Restoring the weights before the
    last backward, through two graphs at once, makes its gradient inexact (README, "Paper and
    code"); it stays so here, since the cost is what is measured.
    """
    params = [p for p in model.parameters() if p.requires_grad]

    def step(batch, other):
        def forward(ids, labels):
            return model(input_ids=ids, labels=labels.to(ids.device), use_cache=False,
                         output_hidden_states=True)
        clean = forward(*batch)
        for p in params:
            p.grad = None
        forward(*other).loss.backward()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        before = [p.data.clone() for p in params]
        for p in params:
            p.data += alpha * p.grad / norm
        worse = forward(*batch)
        supervised = batch[1].to(batch[0].device) != -100
        consistency = sum(F.mse_loss(b[supervised], a.detach()[supervised])
                          for a, b in zip(clean.hidden_states,
                                          worse.hidden_states)) / len(clean.hidden_states)
        for p, old in zip(params, before):
            p.data.copy_(old)
            p.grad = None
        (clean.loss + lam * consistency).backward()
    return step


def build(s, cases):
    """{case: step(batch, other)} of one model of ours and, where asked for, one of transformers on
    the same weights."""
    dtype = torch.float32 if s.tune == "full" else s.torch_dtype  # trained weights stay in float32
    model = load_model(s.model, s.device,
                       dtype) if s.model else random_weights(s.config, s.device, dtype)
    steps = {}
    if set(cases) & set(THEIRS):
        theirs = transformers_model(s.config, model.state_dict(), s.tune, s.device)
        if s.activation_checkpointing:
            theirs.gradient_checkpointing_enable(dict(use_reentrant=False))
        half = torch.autocast(s.device.type, s.torch_dtype, enabled=dtype != s.torch_dtype)
        steps = {"their-sft": half(their_sft_step(theirs)),
                 "their-lfu": half(their_lfu_step(theirs))}
    if s.tune == "full":
        model.set_matmul_dtype(s.torch_dtype)
    else:
        add_lora(model)
    model.activation_checkpointing = bool(s.activation_checkpointing)
    if s.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    steps.update({case: our_step(model, aux, s.activation_checkpointing != "first")
                  for case, aux in OURS.items()})
    return {case: steps[case] for case in cases}


def timed(function, device, *args):
    """Milliseconds of function(*args), and of the work it leaves on a GPU."""
    wait = getattr(torch, device.type).synchronize  # torch.cpu's does nothing
    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return 1000 * (time.perf_counter() - start)


def time_cases(steps, batches, device, dtype):
    """({case: result}, matmul TFLOP/s) of the steps, in turns on the same batches; turn 0 warms up
    and counts FLOPs."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    ms, flops, matmul_ms = {case: [] for case in steps}, {}, []
    for i, batch in enumerate(batches):
        other = batches[i - 1]
        matmul_ms += [timed(torch.mm, device, a, b) for _ in range(3)]
        # back and forth: nobody always follows a
        for case, step in list(steps.items())[::1 if i % 2 else -1]:
            if i == 0:  # case that leaves the memory in disorder
                with FlopCounterMode(display=False) as counter:
                    step(batch, other)
                # matmuls; attention is not counted on a CPU
                flops[case] = counter.get_total_flops()
            else:
                ms[case].append(timed(step, device, batch, other))
    rate = 2 * side**3 / median(matmul_ms) / 1e9  # TFLOP/s
    results = {}
    for case, times in ms.items():
        # of one turn: neighbours in time
        ratios = [t / base for t, base in zip(times, ms.get("sft", times))]
        results[case] = dict(ms=median(times), ms_min=min(times), ms_max=max(times), ms_all=times,
                             tokens_per_s=1000 * batches[0][0].numel() / median(times),
                             ratio_to_sft=median(ratios),
                             ratio_min=min(ratios), ratio_max=max(ratios), tflop=flops[case] / 1e12,
                             share_of_matmul_rate=flops[case] / median(times) / 1e9 / rate)
    return results, rate


def peak_memory(s, case):
    """Peak memory in MiB of two steps of one case, in a process of its own: the whole process, or
    the GPU's allocator.

    It runs before the parent loads a model of its own, so that the two need not fit side by side.
    """
    argv = [sys.executable, "-m", "lfu_min.cost.bench", "--memory-of", case, "--device",
            str(s.device), "--dtype", s.dtype]
    for name in ("model", "shape", "batch", "tokens", "tune", "activation_checkpointing"):
        argv += [f"--{name.replace('_', '-')}", str(getattr(s, name))] if getattr(s, name) else []
    argv += ["--compile"] * s.compile
    path = os.pathsep.join([str(system.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(argv, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        return None  # out of memory, say: the other cases still count
    return float(done.stdout.split()[-1])


def profile(steps, batch, device):
    """Print torch.profiler's most expensive operations of one step of each case."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    for case, step in steps.items():
        step(batch, batch)
        with torch.profiler.profile(activities=activities) as p:
            step(batch, batch)
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(f"\n{case}\n" + p.key_averages().table(sort_by=order, row_limit=16,
                                                     max_name_column_width=50))


def sweep(s, cases):
    """Rows (what, value, {case: ms}) on random weights, with one of tokens, batch and layers
    changed at a time."""
    rows, L = [], s.config.num_hidden_layers
    for what, values in (("tokens", (s.tokens // 2, s.tokens, 2 * s.tokens)),
                         ("batch", (1, s.batch, 2 * s.batch)),
                         ("layers", (L // 3, 2 * L // 3, L))):
        for value in sorted({max(2, v) if what == "tokens" else max(1, v) for v in values}):
            t = argparse.Namespace(**{**vars(s), what: value, "model": None})
            t.config = replace(s.config, num_hidden_layers=t.layers)
            batches = make_batches(t.config, s.repeats + 1, t.batch, t.tokens, s.device)
            results, _ = time_cases(build(t, cases), batches, s.device, s.torch_dtype)
            rows.append(dict(what=what, value=value,
                             ms={case: r["ms"] for case, r in results.items()}))
            print(f"  {what:6} {value:5}  " + "  ".join(f"{case} {r['ms']:9.1f} ms "
                                                        f"({r['ratio_to_sft']:.2f}x)"
                                                         for case, r in results.items()), flush=True)
    return rows


def count(s, cases):
    """{case: TFLOP, their ratio to SFT's, GiB} of our steps, counted on tensors without data
    (count.py)."""
    rows = {}
    print(f"{'case':10} {'TFLOP':>9} {'x sft':>7} {'peak GiB':>9}")
    for case in cases:
        flops, peak = count_step(s.config, OURS[case], s.batch, s.tokens, s.tune, s.torch_dtype,
                                 s.activation_checkpointing)
        ratio = flops / 1e12 / rows["sft"]["tflop"] if rows else 1.0
        rows[case] = dict(tflop=flops / 1e12, ratio_to_sft=ratio, peak_gib=peak / 2**30)
        print(f"{case:10} {flops / 1e12:9.3f} {ratio:7.2f} {peak / 2**30:9.2f}", flush=True)
    return rows


def evaluation(s):
    """Rows (what, unit, ours, theirs, times as fast), medians of --repeats in turns: loading
    --model, tokenising all of the file --evaluation, and greedy generation of 64 tokens after its
    first eight questions. `theirs` is transformers (None where it is not installed), its tokenizer
    called once with all texts, which it spreads over the cores."""
    examples = read_examples(s.evaluation)
    texts, tokenizer = [e.prompt + "\n" + e.answer for e in examples], load_tokenizer(s.model)
    prompts = [prompt_ids(tokenizer, e.prompt, "plain") for e in examples[:8]]
    model = load_model(s.model, s.device, s.torch_dtype)
    tasks = {"loading": [lambda: load_model(s.model, s.device, s.torch_dtype)],
             f"tokenising {len(texts)} examples": [lambda: [tokenizer.encode(text)
                                                            for text in texts]],
             f"generating {len(prompts)} x 64 tokens": [lambda: generate(model, prompts, 64)]}
    try:
        import transformers
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(s.model)
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=s.torch_dtype).to(s.device).eval()
        theirs = load()
        theirs.generation_config.eos_token_id = None  # both make all 64 tokens
        padded = their_tokenizer.pad(dict(input_ids=prompts), padding_side="left",
                                     return_tensors="pt").to(s.device)
        for ours, their in zip(tasks.values(),
                               (load, lambda: their_tokenizer(texts), lambda: theirs.generate(
                **padded, max_new_tokens=64, do_sample=False, pad_token_id=0))):
            ours.append(their)
    except ImportError:
        pass
    rows = []
    for what, functions in tasks.items():
        times = [[timed(function, s.device) for function in functions] for _ in range(s.repeats)]
        ours, *their = (median(column) / 1000 for column in zip(*times))
        faster = median(b / a for a, b in times) if their else None
        rows.append(dict(what=what, seconds=ours, their_seconds=their[0] if their else None,
                         faster=faster))
        print(f"{what:26} {ours:8.2f} s" + (f"   transformers {their[0]:8.2f} s   {faster:.2f}x "
                                            "as fast" if their else ""), flush=True)
    return rows


def get_settings(argv):
    p = argparse.ArgumentParser(prog="python -m lfu_min.cost.bench",
                                description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", help="Hugging Face folder of a Llama, in place of --shape's random "
                                   "weights")
    p.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M")
    p.add_argument("--cases", nargs="+", choices=(*OURS, *THEIRS), default=[*OURS, *THEIRS],
                   metavar="CASE",
                   help="which of: " + ", ".join((*OURS, *THEIRS)))
    p.add_argument("--batch", type=int, default=4, help="examples a step")
    p.add_argument("--tokens", type=int, default=200,
                   help="tokens an example, the second half supervised")
    p.add_argument("--repeats", type=int, default=5,
                   help="timed steps of each case, after one to warm up")
    p.add_argument("--tune", choices=("lora", "full"), default="lora")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--dtype", choices=("auto", *system.DTYPES), default="auto",
                   help="auto = fp16 on CUDA, else fp32")
    p.add_argument("--activation-checkpointing", choices=("both", "first"),
                   help="as in train.py; theirs, too")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile our blocks; the untimed turn bears the compilation")
    p.add_argument("--no-memory", action="store_true",
                   help="skip the process a case that measures its peak memory")
    p.add_argument("--count", action="store_true",
                   help="instead: count operations and memory of our steps without running "
                   "them, for any --shape and --dtype, on any machine")
    p.add_argument("--profile", action="store_true",
                   help="then print where one step of each case spends its time")
    p.add_argument("--sweep", action="store_true",
                   help="then show how our steps grow with tokens, batch and layers")
    p.add_argument("--evaluation", metavar="FILE",
                   help="instead: loading, tokenising FILE (.json, .jsonl), and generation")
    p.add_argument("--json", metavar="FILE", help="write all results there")
    p.add_argument("--memory-of", choices=(*OURS, *THEIRS), help=argparse.SUPPRESS)
    s = p.parse_args(argv)
    for name, least in (("batch", 1), ("tokens", 2), ("repeats", 1)):
        if getattr(s, name) < least:
            raise ValueError(f"--{name} {getattr(s, name)} should be at least {least}")
    if s.json and not Path(s.json).absolute().parent.is_dir():
        raise ValueError(f"--json {s.json}: the folder {Path(s.json).parent} does not exist")
    if s.evaluation and not s.model:
        raise ValueError("--evaluation needs --model: random weights have no tokenizer")
    s.device = system.pick_device(s.device)
    s.dtype, s.torch_dtype = system.pick_dtype(s.dtype, s.device)
    s.config = load_config(s.model) if s.model else SHAPES[s.shape]
    s.layers = s.config.num_hidden_layers
    return s


def printable(s):
    return {**vars(s), "config": asdict(s.config), "device": str(s.device),
            "torch_dtype": str(s.torch_dtype)}


def main(argv=None):
    """Run the benchmark and print its table. Returns what --json writes. Raises ValueError on bad
    input."""
    s = get_settings(argv)
    if s.evaluation:
        rows = evaluation(s)
        if s.json:
            system.write_json(s.json, dict(evaluation=rows, threads=torch.get_num_threads(),
                                           **system.environment()))
        return rows
    cases = ["sft"] + [case for case in s.cases if case != "sft"]  # the ratios need it
    if s.count:
        print(f"{s.model or s.shape}: {s.batch} x {s.tokens} tokens, half supervised, tune "
              f"{s.tune}, {s.dtype}"
              + (f", checkpointing {s.activation_checkpointing}" if s.activation_checkpointing
                 else "") + "; counted, not run")
        out = dict(settings=printable(s), count=count(s, [case for case in cases if case in OURS]))
        if s.json:
            system.write_json(s.json, out)
        return out
    batches = make_batches(s.config, s.repeats + 1, s.batch, s.tokens, s.device)
    if s.memory_of:
        step = build(s, [s.memory_of])[s.memory_of]
        for i in range(2):
            step(batches[i], batches[i - 1])
        peak = system.peak_memory_mib(s.device)
        print(peak)
        return peak
    try:
        versions = {package: version(package) for package in ("transformers", "peft")}
    except PackageNotFoundError as error:
        cases, versions = [case for case in cases if case in OURS], {}
        print(f"without the comparison ({error.name} is not installed): pip install -r "
              "requirements-dev.txt")
    where = torch.cuda.get_device_name(s.device) if s.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{s.model or s.shape}: {s.batch} x {s.tokens} tokens, half supervised, tune {s.tune}, "
          f"{s.dtype}, {s.device} "
          f"({where}), torch {torch.__version__}"
          + (f", checkpointing {s.activation_checkpointing}" if
          s.activation_checkpointing else "") + ", compiled" * s.compile
          + "".join(f", {name} {v}" for name, v in versions.items()),
          flush=True)
    peaks = {case: None if s.no_memory else peak_memory(s, case) for case in cases}
    steps = build(s, cases)
    results, rate = time_cases(steps, batches, s.device, s.torch_dtype)
    print(f"measured matmul rate {rate:.3f} TFLOP/s\n\n{'case':10} {'ms a step (min - max)':>26} "
          f"{'tokens/s':>9} "
          f"{'x sft (min - max)':>21} {'TFLOP':>8} {'of rate':>8} {'peak MiB':>9}")
    for case, r in results.items():
        r["peak_mib"] = peaks[case]
        print(f"{case:10} {r['ms']:10.1f} ({r['ms_min']:.1f} - {r['ms_max']:.1f})".ljust(38) +
              f"{r['tokens_per_s']:9.0f} {r['ratio_to_sft']:8.2f} ({r['ratio_min']:.2f} - "
              f"{r['ratio_max']:.2f}) "
              f"{r['tflop']:8.3f} {r['share_of_matmul_rate']:8.0%} "
              f"{r['peak_mib'] or float('nan'):9.0f}", flush=True)
    out = dict(settings=printable(s), threads=torch.get_num_threads(), **system.environment(),
               compared_with=versions,
               matmul_tflops=rate, cases=results, compared=[])
    for theirs, ours in COMPARED:
        if theirs in results and ours in results:
            a, b = results[theirs], results[ours]
            faster = [t / o for t, o in zip(a["ms_all"], b["ms_all"])]
            memory = b["peak_mib"] / a["peak_mib"] if a["peak_mib"] and b["peak_mib"] else None
            out["compared"].append(dict(theirs=theirs, ours=ours, faster=median(faster),
                                        faster_min=min(faster),
                                        faster_max=max(faster), memory_ratio=memory))
            print(f"{ours} is {median(faster):.2f}x ({min(faster):.2f} - {max(faster):.2f}) as "
                  f"fast as {theirs}"
                  + (f", with {memory:.2f}x its peak memory" if memory else ""))
    if s.profile:
        profile(steps, batches[0], s.device)
    if s.sweep:
        print("\ngrowth")
        del steps
        out["sweep"] = sweep(s, [case for case in cases if case in OURS])
    if s.json:
        system.write_json(s.json, out)
    return out


if __name__ == "__main__":
    system.command_line(main)
