"""lfu_min: Learning from the Undesirable (arXiv 2511.13052), small enough to read in an evening.

Read model.py (skim), lora.py and steering.py, lfu.py (slowly), then train.py in the folder above.
"""
from .files.adapter import export_merged, load_adapter, save_adapter
from .files.checkpoint import load_model, save_model
from .files.tokenizer import load_tokenizer
from .lora import add_lora, remove_lora
from .methods.own_loop import lfu_backward
from .scoring.generate import generate
