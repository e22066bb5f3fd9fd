"""What reproduce.py runs on the bundled model: methods, the grid that each is tuned on, the rule
that chooses. Written down before any of it was run; tuned.json is what `reproduce tune` then chose.

Fair means here: every method has nine tuning runs a seed, on the same examples, scored on the same
validation split. Methods with a strength of their own: three strengths x three learning rates;
methods without: nine learning rates, the three among them. Seeds of tuning are used nowhere else.

The rule, of means over the tuning seeds:
  best      the setting with the most right word problems; in a tie, the one that keeps more
  frontier  the strength whose three learning rates have the largest hypervolume: the area of
            (word problems, mean of the other categories), in per cent each, that lies below and to
            the left of at least one of its points
"""
import math
from typing import NamedTuple

EXAMPLES, EPOCHS, BATCH = 64, 20, 8  # 160 steps; the paper's subject is limited data
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
RATES = ("1.5e-3", "3e-3", "5e-3")
NINE_RATES = ("5e-4", "1e-3", "1.5e-3", "2e-3", "2.5e-3", "3e-3", "4e-3", "5e-3", "7e-3")


class Method(NamedTuple):
    """One method: its flags, and the flag of its strength with the values that are tried."""
    flags: dict
    strength: str = None
    values: tuple = ()


METHODS = {
    "SFT": Method({"aux": "none"}),
    "NEFTune": Method({"method": "neftune"}, "neftune-alpha", ("1", "5", "15")),
    "GEM": Method({"method": "gem"}, "gem-beta", ("0.5", "0.7", "0.9")),
    "IM": Method({"method": "prompt"}),
    "SDFT": Method({"aux": "none", "data": "sdft"}),
    "SAM": Method({"method": "sam"}, "rho", ("0.02", "0.05", "0.2")),
    "L1": Method({"method": "l1"}, "lam", ("0.01", "0.1", "1")),
    "L2": Method({"method": "l2"}, "lam", ("0.01", "0.1", "1")),
    "logit KL": Method({"method": "logit_kl"}, "alpha", ("0.03", "0.1", "0.3")),
    "LfU-lora": Method({"aux": "lora"}, "alpha", ("0.03", "0.1", "0.3")),
    "LfU-reps": Method({"aux": "reps"}, "alpha", ("0.1", "0.3", "1")),
    "LfU-inplace": Method({"aux": "inplace"}, "alpha", ("0.03", "0.1", "0.3")),
}
LFU = ("LfU-lora", "LfU-reps", "LfU-inplace")


def settings(method):
    """The nine settings of a method, flags of train.py each."""
    m = METHODS[method]
    if not m.strength:
        return [m.flags | {"lr": lr} for lr in NINE_RATES]
    return [m.flags | {m.strength: value, "lr": lr} for value in m.values for lr in RATES]


def strength(method, setting):
    """The value of the method's strength in a setting; None where it has none."""
    return setting.get(METHODS[method].strength)


def hypervolume(points):
    """Area below and to the left of points (x, y), all of them at least 0, as a share of 100 x
    100."""
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):  # from the right: only what is higher adds
        area += x * max(0.0, y - height)
        height = max(height, y)
    return area / 1e4


def nearest(target, movements):
    """The rule for alpha: of {alpha: relative movement of the states in the first step}, the alpha
    that moves them nearest to `target`, as a ratio."""
    return min(movements, key=lambda alpha: abs(math.log(movements[alpha] / target)))


def choose(found):
    """{method: {"best": setting, "frontier": [settings]}} by the rule above.

    found: {method: [(setting, x, y), ...]}, x and y being means over the tuning seeds.
    """
    chosen = {}
    for method, points in found.items():
        best = max(points, key=lambda point: point[1:])[0]
        groups = {}
        for setting, x, y in points:
            if setting["lr"] in RATES:
                groups.setdefault(strength(method, setting), []).append((setting, x, y))
        frontier = max(groups.values(), key=lambda group: hypervolume([p[1:] for p in group]))
        chosen[method] = {"best": best, "frontier": [point[0] for point in frontier]}
    return chosen
