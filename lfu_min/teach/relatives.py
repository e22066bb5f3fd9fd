"""What a step costs for LfU and for those of its relatives that live in methods/baselines.py:

    python -m lfu_min.teach.relatives --shape SmolLM2-135M

Forwards and operations are counted, not run (cost/count.py); times are taken in turns, on random
weights. docs/relatives.md has the table and says what each relative is. The step is float32 and
trains a LoRA. Verified in tests/test_teach.py.
"""
from functools import partial
import math

import torch

from ..cost.bench import SHAPES, make_batches, time_cases
from ..cost import count
from ..engine import system
from ..engine.passes import make_batch
from ..lfu import lfu_step
from ..methods import AUXILIARIES, MOVES
from ..methods.baselines import BASELINES

ADDED = {f"lfu {aux}": count.STEPS[aux] for aux in AUXILIARIES}
ADDED["lfu two-steps"] = partial(lfu_step, move=MOVES["two-steps"])
ASIDE = ("prompt", "attached")  # sft's step; LfU without its detach, which is no relative
STEPS = {**{name: step for name, step in BASELINES.items() if name not in ASIDE}, **ADDED}


def times(config, steps, batch, tokens, repeats):
    """{name: milliseconds over those of sft, the median of the turns}, on the CPU."""
    model = count.prepared_model(config, "lora", torch.float32)

    def whole(step):
        def one(batch, other):
            model.zero_grad()
            step(model, make_batch(*batch, generator=torch.Generator().manual_seed(0)))
        return one
    results, _ = time_cases({name: whole(step) for name, step in steps.items()},
                            make_batches(config, repeats + 1, batch, tokens, "cpu"),
                            torch.device("cpu"), torch.float32)
    return {name: result["ratio_to_sft"] for name, result in results.items()}


def get_settings(argv=None):
    p = system.Parser(prog="python -m lfu_min.teach.relatives",
                      description="What a step costs for LfU and its relatives.",
                      epilog="Defaults stand in brackets.")
    p.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M", help="[SmolLM2-135M]")
    p.add_argument("--batch", type=int, default=4, help="examples a step [4]")
    p.add_argument("--tokens", type=int, default=200, help="an example; half are supervised [200]")
    p.add_argument("--repeats", type=int, default=3, help="timed steps; 0 = count alone [3]")
    s = p.parse_args(argv)
    for name, least in (("batch", 1), ("tokens", 2), ("repeats", 0)):
        if getattr(s, name) < least:
            raise ValueError(f"--{name} {getattr(s, name)} should be at least {least}")
    return s


def main(argv=None):
    """Print the table. Returns {name: (forwards, FLOPs over sft's, peak bytes over sft's, time over
    sft's or NaN)}."""
    s, rows = get_settings(argv), {}
    config = SHAPES[s.shape]
    print(f"{s.shape}: {s.batch} x {s.tokens} tokens, half supervised, a LoRA trained, fp32, "
          f"{torch.get_num_threads()} threads; multiples of sft")
    took = times(config, STEPS, s.batch, s.tokens, s.repeats) if s.repeats else {}
    print(f"{'step':14} {'forwards':>8} {'operations':>10} {'memory':>7} {'time':>6}")
    for name, step in STEPS.items():
        forwards, flops, peak = count.count_step(config, step, s.batch, s.tokens)
        sft = sft if rows else (flops, peak)
        rows[name] = forwards, flops / sft[0], peak / sft[1], took.get(name, math.nan)
        print(f"{name:14} {forwards:8} {rows[name][1]:10.2f} {rows[name][2]:7.2f} "
              f"{rows[name][3]:6.2f}", flush=True)
    return rows


if __name__ == "__main__":
    system.command_line(main)
