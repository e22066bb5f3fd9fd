"""Fine-tune a model with LfU, or with plain SFT to compare:  python train.py --aux lora

Without --model it takes the bundled model and its 256 word problems, and needs neither network nor
GPU. With --model it takes a folder of a Llama, Mistral or Qwen, with the settings of the paper's
authors. `--aux none` is plain SFT, `--resume RUN` goes on with a run that was interrupted. The
method is lfu_min/lfu.py; this file is the way there and the loop.
"""
import math
import signal
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch

from lfu_min.engine import distributed, system
from lfu_min.engine.passes import TOKEN_SCALE, trained
from lfu_min.files import data
from lfu_min.files.adapter import save_adapter
from lfu_min.files.checkpoint import load_config, load_model, save_model
from lfu_min.files.tokenizer import check_fit, load_tokenizer
from lfu_min.lfu import lfu_step
from lfu_min.lora import add_lora
from lfu_min.methods import AUXILIARIES, BASELINES, DISTANCES, MOVES, parse_layers, prompt_examples
from lfu_min.training import folder, log
from lfu_min.training.checkpoints import Checkpoints
from lfu_min.training.loop import LossScale, learning_rate, plan_step, usable
from lfu_min.training.settings import get_settings, method_settings
from lfu_min.training.validation import Validation

WARMUP = 0.1  # share of the steps in which the learning rate rises; then a cosine to 0
CLIP = 1.0  # largest norm of the gradient


def main(argv=None):
    """Run one fine-tuning. Returns the run's folder and its log, a list of dictionaries. Raises
    ValueError on bad input, before anything is written."""
    s, started = get_settings(argv), time.time()
    if s.verify:
        return folder.verify(s.verify, s.model, s.data)
    team = distributed.join(system.pick_device(s.device))  # rank 0 of 1 process, but for torchrun
    if s.shard:
        distributed.check_shard(team.world, team.device)
    s.dtype, dtype = system.pick_dtype(s.dtype, team.device)
    s.processes = team.world
    if s.resume and folder.finished(s.resume):
        return folder.say_finished(s, team)
    if team.rank == 0:
        folder.check(s)
    config, tokenizer = load_config(s.model), load_tokenizer(s.model)
    layers = parse_layers(s.layers, config.num_hidden_layers)
    examples, dropped = load_examples(s, config, tokenizer)
    validation = Validation(s, tokenizer, team)
    model = load(s, team.device, dtype)

    s.per_step = s.batch_size * s.accumulate * team.world  # examples an optimizer step
    s.per_epoch = math.ceil(len(examples) / s.per_step)  # optimizer steps
    s.steps = s.max_steps or math.ceil(s.epochs * s.per_epoch)
    out, asked, before, after = None, log.questions(s), [], []
    runs_model = team.rank == 0 or s.shard  # a sharded model runs in all processes or in none
    if team.rank == 0:
        log.describe(s, model, examples, dropped, tokenizer, team.device)
        validation.describe()
    if runs_model:
        before = log.answers(model, tokenizer, asked, s.template)
    if team.rank == 0:
        out = folder.begin(s, team.device, examples=len(examples), dropped=dropped)
    with folder.locked(out), system.stop_signals() as stop:
        checkpoints = train(s, model, examples, layers, tokenizer.eos_id, out, team, stop,
                            validation)
        with checkpoints.rescue():
            save(s, model, out)
    if runs_model:
        after = log.answers(model, tokenizer, asked, s.template)
    distributed.leave()
    if team.rank == 0:
        for question, old, new in zip(asked, before, after):
            print(f"\nquestion  {log.shown(question)}\n  before  {old}\n  after   {new}")
        peak = system.peak_memory_mib(team.device)
        print(f"\nsaved {out}  ({system.duration(time.time() - started)}"
              + (f", peak memory {peak:.0f} MiB" if peak else "") + ")")
    return out, log.read(out, s.steps)[0] if out else []


def load_examples(s, config, tokenizer):
    """(encoded examples, number dropped), after checking that tokenizer and model fit together."""
    check_fit(tokenizer, config, s.model)
    s.max_len = min(s.max_len, config.max_position_embeddings)
    examples, dropped = data.load_dataset(s.data, tokenizer, s.template, s.max_len, log.encoding())
    if s.method == "prompt":
        examples[:] = prompt_examples(examples)
    return examples, dropped


def load(s, device, dtype):
    """The model, ready to be trained. Weights are in half precision only where they are frozen;
    trained ones stay in float32."""
    model = load_model(s.model, "cpu" if s.shard else device,
                       dtype if s.tune == "lora" else torch.float32)
    system.spare_threads(sum(p.numel() for p in model.parameters()))
    model.activation_checkpointing = s.activation_checkpointing
    if s.tune == "lora":
        add_lora(model, s.r, s.lora_alpha, generator=torch.Generator().manual_seed(s.seed))
    else:
        model.set_matmul_dtype(dtype)
    if s.shard:
        distributed.shard(model, device)
    return model


def train(s, model, examples, layers, pad_id, out, team, stop, validation):
    """The loop: one optimizer step a turn, of which process 0 writes the log. After a signal (stop,
    see system.stop_signals) it saves a checkpoint and exits. Returns the Checkpoints."""
    th = trained(model)
    fused = team.device.type == "cuda" or None  # None: torch's choice
    optimizer = torch.optim.AdamW(th, lr=s.lr, weight_decay=0.0, fused=fused)
    scale = LossScale(TOKEN_SCALE if s.dtype == "fp16" else None)
    checkpoints = Checkpoints(s, out, team, model, optimizer, scale, stop)
    first, seconds = checkpoints.restore()  # 1, or with --resume what follows what is done
    if first == 1:
        validation.begin(model)
    started = time.time() - seconds
    for step in range(first, s.steps + 1):
        tic = time.perf_counter()
        plan = plan_step(s, examples, step, team, pad_id, scale.value)
        results = []
        for batch in plan.batches:
            if s.method == "lfu":
                # forward: h and l_SFT (Eq 3, 1); backward: g and l_SFT's gradient; ascent (Eq 2);
                # forward: h' (Eq 4) and the MSE (Eq 5); backward (Eq 6). See lfu_min/lfu.py.
                # lam / count: l_cons is the mean over the step's micro-batches; l_SFT is divided by
                # the step's supervised tokens already (batch.divisor).
                result = lfu_step(model, batch, AUXILIARIES[s.aux], s.lam / plan.count, s.alpha,
                                  layers, MOVES[s.move], DISTANCES[s.compare])
            else:  # plain SFT, or another of what LfU is compared with
                result = BASELINES[s.method](model, batch, **method_settings(s, plan.count))
            results.append(result)
        distributed.add_up_gradients(th)
        norm = torch.nn.utils.clip_grad_norm_(th, CLIP)
        grad_norm = distributed.whole(norm).item()  # here a GPU is waited for
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, s.steps, s.lr, WARMUP)

        record = log.summarise(step, results, s, plan, len(layers), team.device, lr=lr,
                               epoch=step / s.per_epoch, grad_norm=grad_norm,
                               loss_scale=scale.value, target_tokens=plan.targets)
        if usable(record, scale, plan, results):  # no float16 overflow
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record["ms"] = 1000 * (time.perf_counter() - tic)
        validation.after(model, record)
        if team.rank == 0:
            log.write(out, record)
            if step in (first, s.steps) or step % max(1, s.steps // 20) == 0:
                print(log.step_line(record, s.steps, started), flush=True)
        checkpoints.after(step)
    return checkpoints


def save(s, model, out):
    """The adapter as peft writes it, or a Hugging Face folder. out: None in all processes but 0."""
    weights = None
    if s.shard:  # all put it together, process 0 gets it
        weights = distributed.whole_state(model, only_trained=s.tune == "lora")
    if out is None:
        return
    if s.tune == "lora":
        save_adapter(model, out, base_model_name_or_path=s.model, state_dict=weights)
    else:
        save_model(model, out, base_dir=s.model, state_dict=weights)
    folder.finish(s, out)


if __name__ == "__main__":
    system.command_line(main)
