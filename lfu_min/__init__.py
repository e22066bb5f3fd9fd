"""lfu_min: Learning from the Undesirable (arXiv 2511.13052), small enough to read in an evening.

Read model.py (skim), lora.py and steering.py, lfu.py (slowly), then train.py in the folder above.
"""
from .files.adapter import export_merged, load_adapter, save_adapter
from .files.checkpoint import load_model, save_model
from .scoring.generate import generate
from .lfu import lfu_backward
from .lora import add_lora
from .files.tokenizer import load_tokenizer
