"""Self-distillation (SDFT, arXiv 2402.13669): the model writes the answers anew before it is
trained on them, so that they are nearer to what it would say.

    python -m lfu_min.training.sdft --out rewritten.json
    python train.py --data rewritten.json

The model sees each question with its reference answer and answers in its own words. A rewrite that
is not accepted leaves the reference in place. Steps and rule follow the authors'
(github.com/sail-sg/sdft, eval/gen_distilled_data.py), the wording is ours.

It needs a model that follows instructions. The bundled one does not: of its 256 word problems 32
rewrites pass, bare numbers and scraps that happen to end in the right one, for a worked solution.
"""
from pathlib import Path
import re

from ..bundled import BUNDLED
from ..engine import system
from ..files import data, jsons
from ..files.checkpoint import load_model
from ..files.tokenizer import load_tokenizer
from ..scoring.generate import generate

REQUEST = ("{question}\n\nThis answer is correct: {answer}\n\nWith it as a guide, answer the "
           "question in your own words.")
BANNED = ("reference answer", "your response", "my response", "your own response",
          "now it's your turn")  # a rewrite that speaks about its task, in any case of letters
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text):
    """The last number in a text as a float, commas between thousands dropped; None without one."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def accepted(rewrite, reference):
    """Whether a rewritten answer may stand for the reference: it is not empty, says nothing of the
    task of rewriting, and where the reference ends in a number, as in GSM8K, so does it: its last
    number is the same. (The authors' rule, but that theirs joins numbers across blanks, "12 12" to
    1212, asks of GSM8K alone, and has other checks for code and function calls.)"""
    text = rewrite.lower()
    if not text.strip() or text.startswith("your turn") or any(phrase in text for phrase in BANNED):
        return False
    ends_in_number = re.search(r"\d\W*$", reference)
    return not ends_in_number or last_number(rewrite) == last_number(reference)


def rewrite(model, tokenizer, examples, template="plain", max_new_tokens=256, batch_size=32,
            on_progress=None):
    """(examples with the accepted rewrites as answers, how many these are).

    examples: list of data.Example. Greedy; a rewrite that max_new_tokens (or the model's positions)
    cut off is not accepted, since half an answer teaches not to finish. The rest as in
    scoring.generate, whose ValueErrors are raised.
    """
    room = model.config.max_position_embeddings
    prompts = [data.prompt_ids(tokenizer, REQUEST.format(question=e.prompt, answer=e.answer),
                               template)[:room] for e in examples]
    rows = generate(model, prompts, max_new_tokens, data.stop_ids(tokenizer, template),
                    batch_size=batch_size, on_progress=on_progress)
    result, kept = [], 0
    for example, prompt, row in zip(examples, prompts, rows):
        text = tokenizer.decode(row).strip()
        finished = len(row) < min(max_new_tokens, room - len(prompt))
        if finished and accepted(text, example.answer):
            example, kept = example._replace(answer=text), kept + 1
        result.append(example)
    return result, kept


def main(argv=None):
    """Rewrite a file. Returns (examples, number kept). Raises ValueError on bad input."""
    p = system.Parser(prog="python -m lfu_min.training.sdft", description=__doc__.split(":")[0])
    p.add_argument("--model", default=str(BUNDLED), help="Hugging Face folder [the bundled one]")
    p.add_argument("--data", default=str(BUNDLED / "data" / "word_problems_train.jsonl"),
                   help=".json or .jsonl file of examples [256 word problems]")
    p.add_argument("--template", choices=data.TEMPLATES, default="plain")
    p.add_argument("--max-new-tokens", type=int, default=256, help="of a rewrite [256]")
    p.add_argument("--batch-size", type=int, default=32, help="[32]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    p.add_argument("--out", required=True, help=".json file to write")
    s = p.parse_args(argv)
    system.check_not_empty(s)
    system.check_positive(s, ("max_new_tokens", "batch_size"))
    if not s.out.endswith(".json"):
        raise ValueError(f"--out {s.out} should be a .json file")
    jsons.check_output("--out", s.out)
    if Path(s.out).resolve() == Path(s.data).resolve():
        raise ValueError(f"--out {s.out} is --data itself: name another file")
    examples, tokenizer = data.read_examples(s.data, questions=True), load_tokenizer(s.model)
    device = system.pick_device(s.device)
    model = load_model(s.model, device, system.pick_dtype("auto", device)[1])
    examples, kept = rewrite(model, tokenizer, examples, s.template, s.max_new_tokens, s.batch_size,
                             system.progress("rewriting"))
    jsons.write_json(s.out, [{"question": e.prompt, "answer": e.answer} for e in examples])
    print(f"{s.out}: {kept} of {len(examples)} answers rewritten, the others are the references")
    return examples, kept


if __name__ == "__main__":
    system.command_line(main)
