"""The bundled world, made from a seed: questions.py (what is asked), problems.py (what is
fine-tuned on), files.py (the data files), vocabulary.py (the tokenizer), pretrain.py and
__main__.py (the model: `python -m lfu_min.world`)."""
