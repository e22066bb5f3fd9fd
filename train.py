"""Fine-tune a Llama with LfU, or with plain SFT to compare:  python train.py --aux lora

Without --model it takes the bundled model and its 256 word problems, and needs neither network nor
GPU. With --model it takes any Llama checkpoint folder, with the settings of the paper's authors.
`--aux none` is plain SFT.

The method itself is lfu_min/lfu.py; this file is settings, data, optimizer and log, from top to
bottom.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch

from lfu_min.files import data

from lfu_min.bundled import BUNDLED
from lfu_min.engine import distributed, system

from lfu_min.training import log as report
from lfu_min.files.adapter import save_adapter
from lfu_min.files.checkpoint import load_config, load_model, save_model
from lfu_min.scoring.generate import generate
from lfu_min.lfu import AUX_KINDS, lfu_backward, parse_layers
from lfu_min.lora import TARGET_MODULES, add_lora
from lfu_min.files.tokenizer import load_tokenizer

# Defaults that depend on the model. AUTHORS: the released scripts' recipe for an 8B Llama. BUNDLED:
# chosen for the bundled model on its validation split (RESULTS.md says how).
AUTHORS = dict(epochs=3.0, batch_size=4, accumulate=4, lr=1e-4, max_len=2048)
BUNDLED = dict(epochs=10.0, batch_size=16, accumulate=1, lr=5e-3, max_len=256,
               model=str(BUNDLED), data=str(BUNDLED / "data" / "word_problems_train.jsonl"))


def get_settings(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                epilog="Defaults stand in brackets; "
                                "where there are two: for the bundled model / with --model.")
    g = p.add_argument_group("model and data")
    g.add_argument("--model", help="Hugging Face folder of a Llama [the bundled one / required]")
    g.add_argument("--data", help=".json or .jsonl file of examples [256 word problems / required]")
    g.add_argument("--template", choices=data.TEMPLATES, default="plain",
                   help="how a question becomes a prompt [plain]")
    g.add_argument("--max-len", type=int, help="tokens; longer examples are dropped [256 / 2048]")
    g = p.add_argument_group("LfU")
    g.add_argument("--aux", choices=AUX_KINDS, default="lora",
                   help="auxiliary components; none = plain SFT [lora]")
    g.add_argument("--lam", type=float, default=5.0,
                   help="lambda, weight of the consistency loss; 0 = plain SFT [5]")
    g.add_argument("--alpha", type=float, default=0.1, help="length of the ascent step [0.1]")
    g.add_argument("--layers", default="all",
                   help="layers compared: all, early, middle, late or a-b (1-based) [all]")
    g.add_argument("--ascent-batch", choices=("same", "other"), default="same",
                   help="batch of the ascent's gradient; other = a second, shuffled one, as in "
                        "the authors' code [same]")
    g = p.add_argument_group("what is trained")
    g.add_argument("--tune", choices=("lora", "full"), default="lora",
                   help="train a LoRA, or all weights [lora]")
    g.add_argument("--r", type=int, default=8, help="LoRA rank [8]")
    g.add_argument("--lora-alpha", type=float, default=16, help="LoRA's scaling is this / r [16]")
    g.add_argument("--target-modules", nargs="+", choices=TARGET_MODULES,
                   default=list(TARGET_MODULES), metavar="NAME",
                   help="linear layers that get a LoRA [all: " + " ".join(TARGET_MODULES) + "]")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, help="passes over the data [10 / 3]")
    g.add_argument("--max-steps", type=int, help="optimizer steps, in place of --epochs")
    g.add_argument("--batch-size", type=int, help="examples a micro-batch [16 / 4]")
    g.add_argument("--accumulate", type=int, help="micro-batches an optimizer step [1 / 4]")
    g.add_argument("--group-by-length", action="store_true",
                   help="batches of similar length, sorted within windows of "
                   f"{data.WINDOW}: less padding")
    g.add_argument("--lr", type=float, help="peak learning rate [0.005 / 0.0001]")
    g.add_argument("--warmup", type=float, default=0.1,
                   help="share of the steps that warm up; then cosine to 0 [0.1]")
    g.add_argument("--clip", type=float, default=1.0,
                   help="largest norm of the gradient; inf = no clipping [1]")
    g = p.add_argument_group("the run")
    g.add_argument("--seed", type=int, default=42, help="[42]")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    g.add_argument("--dtype", choices=("auto", *system.DTYPES), default="auto",
                   help="of matrix products; auto = fp16 on CUDA, else fp32 [auto]")
    g.add_argument("--activation-checkpointing", nargs="?", const="both",
                   choices=("both", "first"), help="less memory, "
                   "one more forward a backward; first = only in the first pass: the second keeps "
                   "its activations")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile every block: a minute or more to start")
    g.add_argument("--shard", action="store_true",
                   help="with torchrun: every process holds a part of the model")
    g.add_argument("--out", help="folder for the run, new or empty [a new runs/<aux>-NNN]")
    g.add_argument("--ask", action="append", metavar="QUESTION",
                   help="answer this before and after; repeatable "
                   "[a word problem and one question of each category / none]")
    s = p.parse_args(argv)
    for name, value in (BUNDLED if s.model is None else AUTHORS).items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    if s.data is None:
        raise ValueError("--data is missing: with --model, name a .json or .jsonl file of examples")
    for name in ("r", "lora_alpha", "epochs", "max_steps", "batch_size", "accumulate", "lr",
                 "clip", "max_len"):
        value = getattr(s, name)
        if value is not None and not (0 < value < math.inf or name == "clip" and value == math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value} should be a positive number")
    if s.shard and s.aux == "inplace":
        raise ValueError("--shard --aux inplace: each process's ascent would move the one model "
                         "they share; "
                         "choose --aux lora or reps")
    if s.seed < 0:
        raise ValueError(f"--seed {s.seed} should be at least 0")
    for name, top in (("lam", math.inf), ("alpha", math.inf), ("warmup", 1 + 1e-9)):
        if not 0 <= getattr(s, name) < top:
            raise ValueError(f"--{name} {getattr(s, name)} should be at least 0 and "
                             f"{'at most 1' if top < 2 else 'finite'}")
    return s


def main(argv=None):
    """Run one fine-tuning. Returns the run's folder and its log, a list of dictionaries. Raises
    ValueError on bad input."""
    s = get_settings(argv)
    started = time.time()

    # ---- everything that can be wrong is looked at before anything slow starts
    # 0, 1, device without torchrun
    rank, world, device = distributed.join(system.pick_device(s.device))
    if s.shard:
        distributed.check_shard(world, device)
    say = print if rank == 0 else lambda *words, **options: None
    s.dtype, dtype = system.pick_dtype(s.dtype, device)
    system.check_out(s.out or "runs/new")
    config = load_config(s.model)
    compared = len(parse_layers(s.layers, config.num_hidden_layers))
    tokenizer = load_tokenizer(s.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{s.model}: the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                         f"{config.vocab_size} rows")
    if s.max_len > config.max_position_embeddings:
        s.max_len = config.max_position_embeddings
    examples, dropped = data.load_dataset(s.data, tokenizer, s.template, s.max_len)
    questions = s.ask if s.ask is not None else default_questions(s)

    # ---- model. Weights are in half precision only where they are frozen; trained ones stay in
    # float32.
    model = load_model(s.model, "cpu" if s.shard else device,
                       dtype if s.tune == "lora" else torch.float32)
    model.activation_checkpointing = bool(s.activation_checkpointing)
    if s.tune == "lora":
        add_lora(model, s.r, s.lora_alpha, s.target_modules,
                 generator=torch.Generator().manual_seed(s.seed))
    else:
        model.set_matmul_dtype(dtype)
    if s.shard:
        distributed.shard(model, device)
    if s.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    params = [p for p in model.parameters() if p.requires_grad]

    # ---- optimizer and schedule
    optimizer = torch.optim.AdamW(params, lr=s.lr, weight_decay=0.0,
                                  fused=device.type == "cuda" or None)
    per_step = s.batch_size * s.accumulate * world  # examples an optimizer step
    steps = s.max_steps or math.ceil(s.epochs * math.ceil(len(examples) / per_step))
    warmup = math.ceil(s.warmup * steps)
    def lr_at(step):  # step counts from 1
        return s.lr * (step / warmup if step <= warmup else
                       0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
    # The auxiliary LoRA draws from a generator of its own, seeded anew for every micro-batch: SFT
    # and LfU with one seed see the same batches and start from the same adapter.
    aux_generator = torch.Generator(device if device.type == "cuda" else "cpu")
    # Per supervised token, so that it does not depend on the batch; 16 leaves room below float16's
    # 65504 (lfu.py).
    loss_scale = 16.0 if s.dtype == "fp16" else None

    out, log, log_file, before = None, [], None, []
    if rank == 0:
        report.describe(s, model, params, examples, dropped, tokenizer, steps, per_step, device)
    if rank == 0 or s.shard:  # a sharded model runs on all or on none
        before = answers(model, tokenizer, questions, s)
    if rank == 0:
        out = system.make_out(s.out, s.aux)
        system.write_json(out / "settings.json", {
            **vars(s), "out": str(out), "device": str(device), "steps": steps,
            "examples": len(examples),
            "dropped": dropped, "processes": world, "data_sha256": data.data_hash(s.data),
            **system.environment()})
        log_file = open(out / "log.jsonl", "w", encoding="utf-8")

    # ---- the loop: one optimizer step a turn
    training = time.time()
    nothing = [tokenizer.eos_id] * 2, [-100] * 2
    lengths = [len(ids) for ids, _ in examples] if s.group_by_length else None
    for step in range(1, steps + 1):
        tic = time.perf_counter()
        chosen = data.batch_order(len(examples), per_step, s.seed, step - 1, lengths)
        # for --ascent-batch other
        others = data.batch_order(len(examples), per_step, s.seed + 1, step - 1, lengths)
        micro = range(0, len(chosen), s.batch_size)
        # supervised tokens in this step
        targets = sum(label != -100 for i in chosen for label in examples[i][1][1:])
        # Sharded, all must take part in every pass: whoever has no micro-batch left runs one with
        # nothing to learn from.
        turns = range(0, per_step, s.batch_size) if s.shard else micro
        results, tokens = [], 0
        for start in turns[rank::world]:
            aux_generator.manual_seed(1 + s.seed + 1_000_003 * ((step - 1) * per_step + start))
            batch = [examples[i] for i in chosen[start:start + s.batch_size]]
            ids, labels = data.collate(batch or [nothing], tokenizer.eos_id)
            tokens += ids.numel() if batch else 0
            other = None
            if s.ascent_batch == "other":
                other = data.collate([examples[i] for i in others[start:start + s.batch_size]]
                                     or [nothing], tokenizer.eos_id)
                other = other[0].to(device), other[1]
            # l_SFT is the mean over the whole step's supervised tokens, l_cons the mean over its
            # micro-batches.
            results.append(lfu_backward(
                model, ids.to(device, non_blocking=True), labels, s.aux, s.lam / len(micro),
                s.alpha, s.layers,
                aux_generator, num_target_tokens=targets, ascent_batch=other,
                loss_scale=loss_scale and loss_scale * targets,
                recompute=s.activation_checkpointing != "first"))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        distributed.add_up_gradients(params)
        # here a GPU is waited for
        grad_norm = distributed.whole(torch.nn.utils.clip_grad_norm_(params, s.clip)).item()
        record = report.summarise(
            results, s.lam, len(micro), tokens, compared, device, step=step,
            epoch=step / math.ceil(len(examples) / per_step),
            lr=lr_at(step), grad_norm=grad_norm, loss_scale=loss_scale, target_tokens=targets)
        if not math.isfinite(record["loss"]):
            raise ValueError(f"step {step}: the loss is {record['loss']}; try a smaller --lr"
                             + (", or --dtype bf16 or fp32: float16 may overflow"
                                if s.dtype == "fp16" else ""))
        if math.isfinite(grad_norm):
            optimizer.step()
        elif loss_scale and loss_scale > 2**-10:  # float16 overflow in a backward: skip, and
            loss_scale /= 2  # try smaller numbers from here on
        else:
            raise ValueError(f"step {step}: the gradient's norm is {grad_norm}; try a smaller --lr")
        optimizer.zero_grad(set_to_none=True)
        record["ms"] = 1000 * (time.perf_counter() - tic)
        log.append(record)
        if rank == 0:
            print(json.dumps({k: None if v in (math.inf, -math.inf) or v != v else v
                              for k, v in record.items()}),
                  file=log_file, flush=True)  # JSON has no inf and no nan
        if step in (1, steps) or step % max(1, steps // 20) == 0:
            say(report.step_line(record, steps, (time.time() - training) / step * (steps - step)),
                flush=True)
    after = answers(model, tokenizer, questions, s) if rank == 0 or s.shard else []
    weights = distributed.whole_state(model, only_trained=s.tune == "lora") if s.shard else None
    distributed.leave()
    if rank != 0:  # every process has the same weights
        return out, log
    log_file.close()

    # ---- save, and show what changed
    if s.tune == "lora":
        save_adapter(model, out, base_model_name_or_path=s.model, state_dict=weights)
    else:
        save_model(model, out, base_dir=s.model, state_dict=weights)
    for question, old, new in zip(questions, before, after):
        print(f"\nquestion  {question}\n  before  {old}\n  after   {new}")
    peak = system.peak_memory_mib(device)
    print(f"\nsaved {out}  ({system.duration(time.time() - started)}"
          + (f", peak memory {peak:.0f} MiB" if peak else "") + ")")
    return out, log


def default_questions(s):
    """For the bundled model: a word problem and one question of each category, all of them from
    validation splits."""
    if Path(s.model) != BUNDLED:
        return []
    names = ("word_problems", "math", "knowledge", "reasoning", "helpfulness")
    return [data.read_examples(BUNDLED / "data" / f"{name}_validation.jsonl")[0].prompt
            for name in names]


def answers(model, tokenizer, questions, s):
    prompts = [data.prompt_ids(tokenizer, question, s.template) for question in questions]
    replies = generate(model, prompts, max_new_tokens=80,
                       stop_ids=tokenizer.eos_ids) if prompts else []
    return [" / ".join(tokenizer.decode(reply).strip().splitlines()) for reply in replies]


if __name__ == "__main__":
    system.command_line(main)
