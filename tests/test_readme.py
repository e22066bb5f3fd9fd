"""The README's commands do what it says, and the bundled model shows what it is there for: plain
SFT learns and forgets.

Slow: full fine-tunings of the bundled model, and 20 steps on real weights where LFU_SMOLLM2 and
LFU_DATA are set.
"""
import os
from pathlib import Path
import re
import shlex
import statistics
import subprocess
import sys

import pytest
import torch

import train
from lfu_min import load_adapter, load_model
from lfu_min.paper import sweep

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def commands():
    """The lines of the README's bash blocks that run train.py or eval.py as they stand, without a
    person's own files."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"),
                        re.S)
    lines = [part.split("#")[0].strip() for block in blocks for line in block.splitlines()
             for part in line.split("&&")]
    return [line for line in lines if re.match(r"python (train|eval)\.py", line)
            and not re.search(r"path/to|DIR|RUN|--plot|\|", line)]


def test_the_readme_commands_run_in_order_and_print_what_it_says(tmp_path):
    """From an empty folder; training is cut to two steps and scoring to two questions, the rest is
    as written."""
    found = list(dict.fromkeys(commands()))
    assert "python train.py --aux lora" in found and "python eval.py runs/none-000 runs/lora-000" in found
    for line in found:
        script, *flags = shlex.split(line)[1:]
        flags += ["--max-steps", "2"] if script == "train.py" else ["--limit", "2", "--batch-size", "64"]
        done = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert all(word in done.stdout for word in (("before", "after", "saved")
                                                    if script == "train.py" else
                                                    ("word problems", "category mean")))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["lora-000", "none-000"]


@pytest.mark.parametrize("aux", ["none", "lora"])
def test_fine_tuning_on_the_word_problems_learns_them_and_forgets(tmp_path, aux):
    """Defaults, seed 42: word problems at least +30 points; plain SFT loses at least 10 in the mean
    of the others."""
    torch.set_num_threads(2)
    base = sweep.scores(None, "test", 2)
    out, _ = train.main(["--aux", aux, "--out", str(tmp_path / aux)])
    after = sweep.scores(out, "test", 2)
    print({name: round(after[name], 1) for name in sweep.COLUMNS})
    assert after["word problems"] - base["word problems"] >= 30
    if aux == "none":
        assert base["category mean"] - after["category mean"] >= 10


@pytest.mark.parametrize("aux", ["lora", "reps", "inplace"])
def test_smollm2_learns_gsm8k_and_its_adapter_is_peft_s(tmp_path, aux):
    path, folder = os.environ.get("LFU_SMOLLM2"), os.environ.get("LFU_DATA")
    if not path or not folder:
        pytest.skip("set LFU_SMOLLM2 (folder of SmolLM2-135M-Instruct) and LFU_DATA (folder with "
                    "gsm8k_train.jsonl)")
    peft = pytest.importorskip("peft")
    import transformers
    torch.set_num_threads(2)
    out, log = train.main(["--model", path, "--data", str(Path(folder) / "gsm8k_train.jsonl"),
                           "--aux", aux, "--device", "cpu",
                           "--batch-size", "2", "--accumulate", "1", "--max-len", "160", "--lr",
                           "5e-4",
                           "--max-steps", "20", "--out", str(tmp_path / aux)])
    first, last = (statistics.mean(r["sft"] for r in part) for part in (log[:5], log[-5:]))
    print(f"{aux}: sft of the first and last five steps {first:.3f} {last:.3f}")
    assert last < first
    ids = torch.arange(100, 140)[None]
    ours = load_adapter(load_model(path, dtype=torch.float32), out)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), str(out))
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
        plain = load_model(path, dtype=torch.float32)(ids)
    assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-5
    assert (a - plain).abs().max() > 1e-3  # the adapter does something
