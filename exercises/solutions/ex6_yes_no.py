"""A reader is enough."""
from lfu_min.scoring.tasks import choice, choice_doc, read_records


def read_yes_no(path):
    docs = []
    for where, r in read_records(path, "question", "passage"):
        if not isinstance(r.get("answer"), bool):
            raise ValueError(f"{where}: the answer {r.get('answer')!r} should be true or false")
        prompt = f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:"
        docs.append(choice_doc(where, prompt, ("no", "yes"), int(r["answer"])))
    return docs


YES_NO = (read_yes_no, choice, None)
