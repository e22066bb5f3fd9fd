"""Parts that the step takes (auxiliary kinds, moves, distances), the step for your own loop, and
what LfU is compared with."""
from .auxiliaries import AUXILIARIES, IN_PLACE
from .baselines import BASELINES, prompt_examples
from .by_name import backward
from .own_loop import lfu_backward, parse_layers
from .distances import DISTANCES
from .moves import MOVES
