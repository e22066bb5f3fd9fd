"""What train.py's loop needs in a step, besides the method: the learning rate, the micro-batches,
and the guard of the optimizer step."""
import math
from typing import NamedTuple

import torch

from ..engine.passes import make_batch
from ..files import data

GROW = 1000  # good steps after which float16's halved loss scale is doubled
SHOWN = 20  # examples that an error names


def learning_rate(step, steps, peak, warmup):
    """Rises linearly over the first `warmup` (a share) of the steps, then a cosine to 0. Steps
    count from 1."""
    rising = math.ceil(warmup * steps)
    if step <= rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def micro_batch_seed(seed, number):
    """Seeds the auxiliary draws of the micro-batch that begins with example `number`, counted over
    all steps: each has a generator of its own, so SFT and LfU with one seed see the same data and
    start."""
    return 1 + seed + 1_000_003 * number


class Plan(NamedTuple):
    """What one optimizer step works on."""
    batches: list  # this process's micro-batches
    tokens: int  # in them, padding included
    count: int  # micro-batches of all processes
    targets: int  # supervised tokens in them: l_SFT's divisor
    numbers: list  # a list for each of `batches`: which of the file's examples it has, from 1
    chosen: list  # the same of the whole step


def plan_step(s, examples, step, team, pad_id, token_scale=None):
    """The Plan of a step (from 1), a function of the settings s and the step alone.

    Sharded, all processes must take part in every pass: whoever has no micro-batch left gets one
    with nothing to learn from.
    """
    chosen = data.batch_order(len(examples), s.per_step, s.seed, step - 1)
    others = s.move == "other-batch" and data.batch_order(len(examples), s.per_step, s.seed + 1,
                                                          step - 1)
    targets = sum(label != -100 for i in chosen for label in examples[i][1][1:])
    starts = range(0, len(chosen), s.batch_size)
    own = (range(0, s.per_step, s.batch_size) if s.shard else starts)[team.rank::team.world]
    nothing = [pad_id] * 2, [-100] * 2

    def batch(indices, start, divisor=None, other=None):
        rows = [examples[i] for i in indices[start:start + s.batch_size]] or [nothing]
        batch = make_batch(*data.collate(rows, pad_id), team.device, divisor, other=other)
        batch.loss_scale = token_scale * batch.divisor if token_scale else 1.0
        on_gpu = team.device.type == "cuda"
        batch.generator = torch.Generator(team.device if on_gpu else "cpu")
        batch.generator.manual_seed(micro_batch_seed(s.seed, (step - 1) * s.per_step + start))
        return batch
    batches = [batch(chosen, start, targets, batch(others, start) if others else None)
               for start in own]
    tokens = sum(b.input_ids.numel() for b, start in zip(batches, own) if start in starts)
    numbers = getattr(examples, "numbers", range(1, len(examples) + 1))
    chosen = [numbers[i] for i in chosen]
    return Plan(batches, tokens, len(starts), targets,
                [chosen[start:start + s.batch_size] for start in own], chosen)


class LossScale:
    """float16's loss scale for each supervised token: `value`, which begins at `start` (None:
    nothing is scaled). An overflow halves it; after GROW steps without one it doubles, up to
    `start`. `good`: how many there have been since it last changed."""

    def __init__(self, start=None):
        self.start = self.value = start
        self.good = 0

    def overflow(self):
        self.value, self.good = self.value / 2, 0

    def good_step(self):
        self.good += 1
        if self.value is not None and self.good >= GROW and self.value < self.start:
            self.value, self.good = self.value * 2, 0


def usable(record, scale, plan, results):
    """Whether the gradient is one to take an optimizer step with. It is not where it, or Eq 2's g,
    is not finite: then float16 overflowed in a backward (or the ascent did not move, so that the
    step would be plain SFT), nothing is to be learned, and the LossScale `scale` is halved.

    plan, results: of this step, the record's. Raises ValueError that names step and examples where
    the loss is not finite, or no smaller scale can help.
    """
    if not math.isfinite(record["loss"]):
        half = ", or --dtype bf16 or fp32: float16 may overflow" if scale.value else ""
        smaller = "--lr"  # no step was taken yet, and l_SFT is finite: then it is the method's part
        if record["step"] == 1 and math.isfinite(record["sft"]):
            smaller = "--alpha, or less extreme settings of the --method"
        raise ValueError(f"step {record['step']}: the loss is {record['loss']} "
                         f"({suspects(plan, results)}); try a smaller {smaller}" + half)
    bad = next((name for name in ("grad_norm", "ascent_norm")
                if not math.isfinite(record[name])), None)
    if bad is None:
        scale.good_step()
    elif scale.value and scale.value > 2**-10:
        scale.overflow()
    else:
        what = "gradient" if bad == "grad_norm" else "ascent's gradient"
        raise ValueError(f"step {record['step']}: the {what}'s norm is {record[bad]} "
                         f"({suspects(plan, results)}); try a smaller --lr")
    return bad is None


def suspects(plan, results):
    """"examples 3, 17": the numbers of those in micro-batches of which a result is not finite, or
    of the whole step where these are another process's."""
    numbers = [number for own, result in zip(plan.numbers, results) for number in own
               if not all(x.isfinite().all() for x in result.values())] or plan.chosen
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return "examples " + ", ".join(map(str, numbers[:SHOWN])) + more
