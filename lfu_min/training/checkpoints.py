"""Checkpoints of a run, for --resume: what a step leaves behind for the next one.

    RUN/checkpoints/step-000037/trained.safetensors    the trained weights, by name
                                optimizer.safetensors  AdamW's step, exp_avg and exp_avg_sq of each
                                state.json             step, loss scale, and which run this is

Nothing else is needed: the order of the data, the learning rate and every draw are functions of the
seed and the step (loop.plan_step). Written under another name, brought to disk, then renamed, so
that what is called step-... is whole. Verified in tests/test_resume.py: a run that was interrupted
and resumed is the uninterrupted one, bit for bit.
"""
from contextlib import contextmanager, suppress
import os
from pathlib import Path
import re
import shlex
import shutil
import sys

import torch

from ..engine import distributed
from ..files.checkpoint import check_shapes, open_weights, read_shapes, write_tensors
from ..files.jsons import read_json, to_disk, write_json
from . import folder, log
from .settings import decisive

MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoints:
    """The checkpoints of one run. Sharded, all processes call its methods together."""

    def __init__(self, s, out, team, model, optimizer, scale, stop):
        """s: settings; out: the run folder, None in all processes but 0; scale: loop.LossScale;
        stop: of system.stop_signals."""
        self.s, self.out, self.team, self.stop = s, out, team, stop
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer, self.scale = optimizer, scale

    def restore(self):
        """With --resume, put everything back to where the run's last checkpoint has it. Returns the
        next step and the seconds that those before it took: 1 and 0 in a new run, or without a
        checkpoint.

        Raises ValueError for a checkpoint or a log that is damaged, or another run's.
        """
        if not self.s.resume:
            return 1, 0.0
        done, path = 0, latest(self.s.resume)
        if path:
            state = read_state(path, decisive(self.s) if self.out else None)
            self.load(path)
            done, self.scale.value = state["step"], state["token_scale"]
            self.scale.good = state["good_steps"]
        log.read(self.s.resume, done)  # what is wrong there, all processes say
        if self.out is None:
            return done + 1, 0.0
        folder.going_on(self.s, done, self.team.device)
        folder.remove_half_written(self.out / "checkpoints")
        print(f"resumed  {self.out} after step {done} of {self.s.steps}\n", flush=True)
        return done + 1, sum(r["ms"] for r in log.cut(self.out, done)) / 1000

    def load(self, path):
        """Weights and optimizer state, from the folder of a checkpoint."""
        weights = read_tensors(path / "trained.safetensors",
                               {name: tuple(p.shape) for name, p in self.params.items()})
        file, wanted = path / "optimizer.safetensors", {}
        stepped = {name.rpartition(".")[0] for name in read_shapes(file)}
        for name, p in self.params.items():
            if name in stepped:  # none is before the first good step
                wanted |= {f"{name}.step": (), **{f"{name}.{m}": tuple(p.shape) for m in MOMENTS}}
        moments, state = read_tensors(file, wanted), {}
        for i, (name, p) in enumerate(self.params.items()):
            with torch.no_grad():
                p.copy_(distributed.in_parts(weights[name], p))
            if name in stepped:
                state[i] = {"step": moments[f"{name}.step"].clone(),
                            **{m: distributed.in_parts(moments[f"{name}.{m}"], p)
                               for m in MOMENTS}}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def after(self, step):
        """What follows a step: a checkpoint where --save-every or a signal asks for one; after a
        signal, in any process, all leave with its exit status."""
        code = distributed.largest(self.stop.code, self.team.device)
        every = self.s.save_every
        if code or (every and step % every == 0 and step < self.s.steps):
            self.save(step)
        if code:
            distributed.leave()
            if self.out is not None:
                print(f"stopped after step {step}; go on with: {self.command()}", file=sys.stderr,
                      flush=True)
            sys.exit(code)

    @contextmanager
    def rescue(self):
        """An error in the block, of saving what was trained, leaves a checkpoint of it, where one
        can be written, and says how to go on."""
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.s.shard:  # in parts, all processes would have to write it
                with suppress(ValueError):
                    self.save(self.s.steps)
            last = latest(self.out)
            raise ValueError(f"{error}; the run is not finished, " + (
                f"its last checkpoint is {last.name}: {self.command()}" if last else
                "and has no checkpoint to go on from: train again")) from None

    def command(self):
        """The command line that goes on with this run."""
        world = self.team.world
        program = "python" if world == 1 else f"torchrun --nproc-per-node {world}"
        return f"{program} train.py --resume {shlex.quote(str(self.out))}"

    def save(self, step):
        """Write a checkpoint, then remove those that --keep does not keep. Raises ValueError where
        that fails (full disk, folder gone); earlier ones are as they were."""
        weights = {n: self.gathered(p) for n, p in self.params.items()}
        moments = {f"{n}.{m}": self.gathered(value) for n, p in self.params.items()
                   for m, value in self.optimizer.state.get(p, {}).items()}
        if self.out is None:
            return
        path = self.out / "checkpoints" / name_of(step)
        aside = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            folder.remove_half_written(path.parent)
            aside.mkdir()
            write_tensors(aside / "trained.safetensors", weights)
            write_tensors(aside / "optimizer.safetensors", moments)
            write_json(aside / "state.json", {
                "step": step, "token_scale": self.scale.value, "good_steps": self.scale.good,
                "run": decisive(self.s)})
            for written in (self.out / "log.jsonl", aside):
                to_disk(written)
            os.rename(aside, path)
            to_disk(path.parent)
            self.prune()
        except (OSError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
            last = latest(self.out)
            raise ValueError(f"{path} cannot be written: {reason}; the last whole checkpoint is "
                             f"{last.name if last else 'none'}: {self.command()}") from None

    def gathered(self, tensor):
        """The whole tensor, on the CPU; of a sharded one only process 0 keeps it."""
        whole = distributed.whole(tensor.detach())
        return whole.cpu() if self.out is not None else None

    def prune(self):
        """Remove all but the latest checkpoints, each under another name first: what is called
        step-... is whole at any moment."""
        for old in steps_in(self.out)[:-(self.s.keep or 1)]:
            os.rename(old, old.with_name(f"{old.name}.tmp"))
        folder.remove_half_written(self.out / "checkpoints")


def name_of(step):
    return f"step-{step:06d}"


def steps_in(run):
    """The checkpoints of a run, oldest first."""
    found = [(int(p.name[5:]), p) for p in Path(run).glob("checkpoints/step-*")
             if re.fullmatch(r"step-\d+", p.name)]
    return [path for _, path in sorted(found)]


def latest(run):
    """The last checkpoint of a run, or None."""
    return (steps_in(run) or [None])[-1]


def read_state(path, run=None):
    """The checkpoint's state.json. run: decisive(settings) of the run that goes on from it; a
    setting, file or number of processes that was another one is named in a ValueError, like a file
    of another form."""
    state = read_json(path / "state.json")
    kinds = {"step": int, "token_scale": (int, float, type(None)), "good_steps": int, "run": dict}
    wrong = [name for name, kind in kinds.items()
             if name not in state or not isinstance(state[name], kind)]
    if wrong or name_of(state["step"]) != path.name:
        raise ValueError(f"{path / 'state.json'} has no usable {', '.join(wrong) or 'step'}: no "
                         "checkpoint of this train.py, or one of an earlier version")
    for name in sorted({*run, *state["run"]} if run else ()):
        ours, theirs = run.get(name), state["run"].get(name)
        if ours != theirs:
            raise ValueError(f"{path} belongs to a run with another {name}"
                             + ("" if isinstance(ours, dict) else f": {theirs!r}, here {ours!r}"))
    return state


def read_tensors(file, shapes):
    """{name: float32 tensor} of a safetensors file that has exactly these shapes. Raises
    ValueError naming what is missing, unexpected, or of another shape or dtype."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    check_shapes(read_shapes(file), shapes, f"{file} does not fit the run")
    with open_weights(file) as reader:
        tensors = {name: reader.get_tensor(name) for name in shapes}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{file}: {name} is stored as {tensor.dtype}, not float32")
    return tensors
