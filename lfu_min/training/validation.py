"""--eval-data: the loss on examples that are not trained on, while a run goes on.

It changes no number of the run: no gradient is taken and nothing is drawn. Verified in
tests/test_validation.py.
"""
import torch

from ..engine import distributed
from ..engine.passes import last_state, make_batch, sft_loss
from ..files import data, hashes
from . import log

PARTS = 10  # of the run, after each of which it is measured


class Validation:
    """The examples of --eval-data; without that flag nothing is ever measured."""

    def __init__(self, s, tokenizer, team):
        """Reads the file. Raises ValueError, as data.load_dataset does. s: settings."""
        self.s, self.team, self.pad_id, self.before = s, team, tokenizer.eos_id, None
        self.examples, self.dropped = [], 0
        if s.eval_data:
            s.eval_data_sha256 = hashes.file_hash(s.eval_data)
            self.examples, self.dropped = data.load_dataset(s.eval_data, tokenizer, s.template,
                                                            s.max_len, log.encoding())

    def describe(self):
        if self.examples:
            print(f"eval     {log.short(self.s.eval_data)}: {len(self.examples)} examples kept, "
                  f"{self.dropped} dropped (longer than {self.s.max_len} tokens)")

    def begin(self, model):
        """What is measured before the first step."""
        if self.examples:
            self.before = self.loss(model)
            self.say("before the first step", self.before)

    def after(self, model, record):
        """Put the loss into a step's record, if one is due: `eval_loss`, in the first step also
        `eval_loss_before`."""
        step, steps = record["step"], self.s.steps
        if self.before is not None and step == 1:
            record["eval_loss_before"] = self.before
        if self.examples and step * PARTS // steps > (step - 1) * PARTS // steps:
            record["eval_loss"] = self.loss(model)
            self.say(f"after step {step}", record["eval_loss"])

    def say(self, when, loss):
        if self.team.rank == 0:
            print(f"eval     {when}: {loss:.4f} nats a supervised token", flush=True)

    @torch.no_grad()
    def loss(self, model):
        """Mean cross-entropy of all supervised tokens, in nats. Processes share the work; sharded,
        all take part in every forward, whoever has no batch left with nothing to predict."""
        size, rank, world = self.s.batch_size, self.team.rank, self.team.world
        nothing = [([self.pad_id] * 2, [data.IGNORE] * 2)]
        nats, tokens = 0.0, 0
        for start in range(0, len(self.examples), size * world):
            own = start + size * rank
            rows = self.examples[own:own + size] or nothing
            batch = make_batch(*data.collate(rows, self.pad_id), self.team.device, divisor=1)
            nats += sft_loss(model, last_state(model, batch), batch).item()
            tokens += len(batch.targets)
        sums = torch.tensor([nats, tokens], device=self.team.device)
        distributed.add_up([sums])
        if hasattr(model, "reshard"):  # --shard: a forward alone leaves some weights whole
            model.reshard()
        return (sums[0] / sums[1]).item()
