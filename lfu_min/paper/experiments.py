"""The experiments of reproduce.py: which settings, measured how, drawn how.

Each is a function of tuned.json's content; a row is a name and a setting of train.py's flags (and
`examples`, how many; `data`, what they are drawn from).
"""
from itertools import chain
from typing import NamedTuple

from ..bundled import CATEGORIES
from . import figures, grid
from .report import SAME_RATE, WATCH

LEARNED, KEPT = "word problems", "category mean"
SCORES = (LEARNED, KEPT, *CATEGORIES, "word problems nll", "others nll")
TEN = range(10)  # seeds, where five leave a verdict within the interval
SIZES = (16, 32, 64, 128, 256)
# Alphas with which random moves take the states about as far as lora's 0.03 does along the
# gradient, over the whole run and in the first step; and as its 0.1 does, over the run.
RANDOM, RANDOM_OF_USUAL = ("0.4", "0.8"), "1.15"


class Experiment(NamedTuple):
    """One table or figure of the paper in miniature."""
    shows: str  # in a sentence
    rows: object  # tuned.json's content -> {row's name: setting}
    measures: tuple  # names of measures.MEASURES
    columns: tuple  # of the table, and of the paired differences
    seeds: tuple = grid.SEEDS
    base: bool = True  # measure the bundled model itself as well
    beside: tuple = ()  # rows that all are compared with, besides SFT
    figure: object = None  # (path, {row: [numbers, one a seed]}) -> writes the picture


def best(*methods):
    """A row a method, at its best setting."""
    def rows(tuned):
        return {method: tuned[method]["best"] for method in methods or grid.METHODS}
    return rows


def frontier(*methods):
    """A row a method and learning rate, at the strength of its frontier."""
    def rows(tuned):
        return {f"{method} lr={setting['lr']}": setting for method in methods or grid.METHODS
                for setting in tuned[method]["frontier"]}
    return rows


def changed(method, **changes):
    """The method's best setting, one more row for every value of one flag, and SFT at LfU-lora's
    learning rate."""
    def rows(tuned):
        usual = tuned[method]["best"]
        others = {f"{flag} {value}": usual | {flag: value}
                  for flag, values in changes.items() for value in values}
        return {"SFT": tuned["SFT"]["best"], method: usual} | others | {
            SAME_RATE: same_rate(tuned)}
    return rows


def same_rate(tuned):
    """SFT at the learning rate of LfU-lora's best setting: how much of LfU's gain is the rate's?"""
    return tuned["SFT"]["best"] | {"lr": tuned["LfU-lora"]["best"]["lr"]}


def best_and_same_rate(*methods):
    """The methods at their best settings, and SFT at LfU-lora's learning rate."""
    def rows(tuned):
        return best(*methods)(tuned) | {SAME_RATE: same_rate(tuned)}
    return rows


def ablation(tuned):
    """LfU-lora with one part replaced, and SFT at its learning rate."""
    own = {k: v for k, v in tuned["LfU-lora"]["best"].items() if k != "aux"}
    return changed("LfU-lora", move=("descent", "random", "two-steps", "other-batch"),
                   alpha=("0",), compare=("cosine", "logit-kl"))(tuned) | {
        **{f"move random, alpha {alpha}": own | {"aux": "lora", "move": "random", "alpha": alpha}
           for alpha in RANDOM},
        "h not detached": own | {"method": "attached"},
        "h not detached, lam 1000": own | {"method": "attached", "lam": "1000"},
        "at SFT's learning rate": own | {"aux": "lora", "lr": tuned["SFT"]["best"]["lr"]},
        "LfU-lora stream=bf16": own | {"aux": "lora", "stream": "bf16"},
        f"{SAME_RATE} stream=bf16": same_rate(tuned) | {"stream": "bf16"}}


def direction(tuned):
    """LfU-lora with the paper's alpha, random steps that move the states as far, and SFT, all at
    one learning rate."""
    own = tuned["LfU-lora"]["best"] | {"alpha": "0.1"}
    return {"SFT": same_rate(tuned), "LfU-lora": own,
            "random steps": own | {"move": "random", "alpha": RANDOM_OF_USUAL}}


def aligned(*methods):
    """best_and_same_rate(), trained on the examples that decline."""
    def rows(tuned):
        return {name: setting | {"data": "decline_train", "examples": 180, "max-steps": 36,
                                 "batch-size": 16}
                for name, setting in best_and_same_rate(*methods)(tuned).items()}
    return rows


def sizes(tuned):
    """SFT and LfU on 16 to 256 examples, always 160 steps, at the settings best for 64; SFT also
    at LfU's learning rate."""
    return {f"{method} n={n}": tuned[method]["best"] | {"examples": n}
            for n in SIZES for method in ("SFT", "LfU-lora", "LfU-reps")} | {
        f"{SAME_RATE} n={n}": same_rate(tuned) | {"examples": n} for n in SIZES}


MAIN = ("SFT", "NEFTune", *grid.LFU)
ALIGNED = ("SFT", "NEFTune", "GEM", "IM", *grid.LFU)
ATTACK = tuple(chain.from_iterable((f"compliance {k}", f"margin {k}") for k in (0, 5, 10, 20, 60)))

EXPERIMENTS = {
    "fig1": Experiment("what is learned against what is kept, SFT and LfU at three learning rates",
                       frontier("SFT", *grid.LFU), ("scores_test",), (LEARNED, KEPT),
                       figure=figures.tradeoff),
    "fig2": Experiment("the same of all methods, with the area under each frontier", frontier(),
                       ("scores_test",), (LEARNED, KEPT), figure=figures.tradeoff),
    "table1": Experiment("every method at its best setting: word problems and the four categories",
                         best_and_same_rate(), ("scores_test",), SCORES, beside=("NEFTune", "SAM")),
    "table3": Experiment("auxiliary components: scores; what a step costs is in docs/cost.md",
                         best_and_same_rate("SFT", *grid.LFU), ("scores_test", "log_test"),
                         (LEARNED, KEPT, *WATCH), seeds=TEN),
    "table4": Experiment("aligned to decline, then attacked: complied with (%), and the margin",
                         aligned(*ALIGNED), ("attack_test",), ATTACK, seeds=TEN),
    "table5": Experiment("lambda, alpha and layers of LfU-lora around its best setting",
                         changed("LfU-lora", lam=("0.1", "1", "10"),
                                 alpha=("0.001", "0.01", "0.03", "0.1", "0.3", "0.5"),
                                 layers=("early", "middle", "late")),
                         ("scores_test", "log_test"), (LEARNED, KEPT, *WATCH)),
    "table6": Experiment("which regulariser: SAM, L1, L2, logit KL, LfU",
                         best("SFT", "SAM", "L1", "L2", "logit KL", "LfU-lora"), ("scores_test",),
                         SCORES),
    "fig3": Experiment("the attack step by step", aligned("SFT", *grid.LFU), ("attack_test",),
                       ("margin 5", "margin 20", "margin 60"), seeds=TEN, figure=figures.attack),
    "fig5": Experiment("the word problems in six wordings, of which one was trained",
                       best_and_same_rate(*MAIN), ("wordings_test",),
                       ("mean over wordings", "sd over wordings", "trained", "tell", "what",
                        "count", "short", "first"), seeds=TEN, figure=figures.wordings),
    "fig6": Experiment("states under noisy embeddings, by layer", best(*MAIN), ("noise_test",),
                       tuple(f"layer {l}" for l in range(1, 7)), figure=figures.noise),
    "examples": Experiment("from 16 to 256 examples", sizes, ("scores_test",), (LEARNED, KEPT),
                           base=False, figure=figures.examples),
    "ablation": Experiment("the ascent, the perturbation or the noise: one part replaced",
                           ablation, ("scores_test", "log_test"), (LEARNED, KEPT, *WATCH),
                           beside=("LfU-lora",)),
    "direction": Experiment("the ascent's direction, or any disturbance as large: ten seeds",
                            direction, ("scores_test", "log_test"), (LEARNED, KEPT, *WATCH),
                            seeds=TEN, base=False, beside=("LfU-lora",)),
    "mechanism": Experiment("is a model trained so moved less by an undesirable step?",
                            best_and_same_rate("SFT", *grid.LFU), ("worsened_validation",),
                            ("own movement", "own loss rise", "other movement", "other loss rise"),
                            seeds=TEN),
    "precision": Experiment("matrix products in half precision (slow on most CPUs)",
                            changed("LfU-lora", dtype=("fp16", "bf16")),
                            ("scores_test", "log_test"), (LEARNED, KEPT, *WATCH),
                            beside=("LfU-lora",)),
}
