"""The invented world: every kind of one-step question that the bundled model is pretrained and
tested on.

Four categories, as in the paper's tables: Math, Knowledge, Reasoning, Helpfulness. A *kind* of
question (say, `add`) has seven wordings: five are trained, the last two are held out. A question is
drawn as (wording, slots): the slots are filled into the wording, the answer depends on the slots
alone.

What is held out is decided by a hash, so that nothing has to be remembered: `split_of` hashes the
content of a question to test, validation or train, so that it is held out in every wording. One sum
(or difference) in five is held out from about half of the kinds of question about sums. Where there
are too few contents to hold any out (facts, times tables, secrets), the wording is part of what is
hashed: the fact is trained, but this way of asking for it never was.

Called by problems.py, files.py and __main__.py of this folder. Verified by tests/test_world.py,
which recomputes every answer from the question's text.
"""
import random
import zlib
from dataclasses import dataclass
from typing import Callable, Iterator

WORLD_SEED = 0  # the facts of the world; another number is another world
TRAINED_WORDINGS = 5  # of the seven wordings of each kind
CLOSED = ("multiply", "fact", "secret")  # keys that start so are split together with the wording

NAMES = ("Ann Ben Cal Dan Eva Fay Gus Hal Ida Joe Kim Leo Max Ned Pam Ray Sue Tom Una Wes Zoe "
         "Amy Bob Deb Eli Flo Gil Ivy Jan Kay Lou Mia Nan Pip Rex Sam Tess Vic Will Bea").split()
PLACES = ("Bramar Bravik Dolden Dolwick Fenlo Fenmar Gorden Gorvik Hilsta Hilwick Kavden Kavlo "
          "Lumsta Lummar Morvik Morlo Neldon Nelsta Pradon Pramar Quoden Quovik Rinlo Rinwick "
          "Solmar Solden Tevik Tevlo Tordon Torsta Varden Varwick Welmar Wello Yarvik Yardon "
          "Zorlo Zorsta Zelwick Zelden").split()
THINGS = "apples pens eggs nuts cups coins cards books stones shells".split()
OBJECTS = "key hat box map lamp ring bell drum coat boat kite ball".split()
COLOURS = "red blue green white black brown grey pink gold silver".split()
ANIMALS = "dog cat fox owl bear wolf deer swan goat frog crow hare".split()
FOODS = "bread soup cake cheese honey rice fish beans tea pie jam plums".split()
RIVERS = "Ola Tarn Wend Isk Ulm Pell Ost Nar Yew Dray".split()
SPOTS = "market mill garden bridge barn lake inn forge".split()
TIMES = "morning day evening night".split()
SIGNS = "+ - * = #### First Then".split()
WORDS = OBJECTS + COLOURS + ANIMALS + FOODS + SPOTS
ATTRIBUTES = {"river": RIVERS, "colour": COLOURS, "animal": ANIMALS, "food": FOODS, "mayor": NAMES}


def _make_facts(seed: int) -> dict[tuple[str, str], str]:
    rng = random.Random(seed)
    return {(place, attribute): rng.choice(values) for place in PLACES
            for attribute, values in ATTRIBUTES.items()}


FACTS = _make_facts(WORLD_SEED)  # (place, attribute) -> value


@dataclass(frozen=True)
class Question:
    """One question with its answer; `key` is the content that decides its split."""
    category: str
    kind: str
    wording: int  # 0..6; 5 and 6 are never pretrained
    question: str
    answer: str
    key: tuple


@dataclass(frozen=True)
class Kind:
    """`draw(rng)` returns (slots, answer, key): what fills the wordings, the reply, and the content
    to split by."""
    category: str
    name: str
    share: float  # of the pretraining stream, relative to the other kinds: what is hard gets more
    draw: Callable
    wordings: tuple


# ---- Math: one step of arithmetic

def draw_numbers(rng: random.Random, operation: str) -> tuple[int, int, int, tuple]:
    """Two numbers, the result of '+', '-' or '*', and the key. No sum is above 40; small ones are
    drawn more often."""
    if operation == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return a, b, a * b, ("multiply", a, b)
    total = rng.randint(2, 40 if rng.random() < 0.6 else 20)
    a = rng.randint(1, total - 1)
    if operation == "+":
        return a, total - a, total, ("add", a, total - a)
    return total, a, total - a, ("subtract", total, a)


def _arithmetic(operation):
    def draw(rng):
        a, b, result, key = draw_numbers(rng, operation)
        return dict(a=a, b=b), str(result), key + ("number",)
    return draw


def _equation(rng):
    operation = rng.choice("+-*")
    a, b, result, key = draw_numbers(rng, operation)
    return dict(step=f"{a} {operation} {b}"), f"{a} {operation} {b} = {result}", key + ("equation",)


STORIES = {
    "+": ("{n} has {a} {things} and gets {b} more.",
          "{n} has {a} {things}. Then {n} finds {b} more.",
          "{n} has {a} {things}. {m} gives {n} {b} more.",
          "{n} has {a} {things} and buys {b} more.",
          "First {n} has {a} {things}. Then {n} gets {b} more.",
          "{n} has {a} {things}. Then {n} buys {b}.",
          "{n} finds {b} {things} and has {a} at home."),
    "-": ("{n} has {a} {things} and loses {b}.", "{n} has {a} {things}. Then {n} gives {b} to {m}.",
          "{n} has {a} {things} and sells {b}.", "{n} has {a} {things}. {m} takes {b} of them.",
          "First {n} has {a} {things}. Then {n} loses {b}.",
          "{n} has {a} {things}. Then {n} sells {b}.", "{n} gives {b} of {a} {things} to {m}."),
    "*": ("{n} has {a} bags with {b} {things} in each.",
          "{n} has {a} bags. Each bag has {b} {things}.",
          "{n} buys {a} bags of {b} {things} each.",
          "There are {a} bags with {b} {things} each. {n} has them all.",
          "{n} has {b} {things} in each of {a} bags.",
          "Each of the {a} bags of {n} has {b} {things}.",
          "{n} finds {a} bags with {b} {things} in each."),
}
ASK_STORY = " How many {things} does {n} have now?"


def _story(operation):
    def draw(rng):
        a, b, result, key = draw_numbers(rng, operation)
        n, m = rng.sample(NAMES, 2)
        return dict(n=n, m=m, a=a, b=b, things=rng.choice(THINGS)), str(result), key + ("story",)
    return draw


def _story_step(rng):
    operation = rng.choice("+-*")
    slots, result, key = _story(operation)(rng)
    story = rng.choice(STORIES[operation][:TRAINED_WORDINGS]).format(**slots)
    answer = f"{slots['a']} {operation} {slots['b']} = {result}"
    return dict(story=story), answer, key[:-1] + ("step",)


def _both(rng):
    """Two steps that have nothing to do with each other: the second never goes on with the first
    one's result."""
    first, second = _equation(rng)[1], _equation(rng)[1]
    while second.split()[0] == first.split()[-1]:
        second = _equation(rng)[1]
    slots = dict(first=first.split(" =")[0], second=second.split(" =")[0])
    return slots, f"First {first}. Then {second}.", ("both", *slots.values())


LARGEST = 40  # no number of a longer story is above this
EVENTS = {  # what can happen next, by the operation it means
    "+": ("{n} gets {b} more.", "{n} finds {b} more.", "{m} gives {n} {b} more.",
          "{n} buys {b} more."),
    "-": ("{n} loses {b}.", "{n} gives {b} to {m}.", "{n} sells {b}.", "{m} takes {b} of them."),
}


def draw_story(rng: random.Random) -> tuple[str, dict, list]:
    """A story of two or three steps: its text, the slots of its names, and [number, (operation,
    number), ...].

    It starts from some things, from bags of things, or from two people's things."""
    n, m = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    start = rng.choice(("some", "some", "bags", "two"))
    if start == "some":
        total = rng.randint(2, 30)
        story, steps = [f"{n} has {total} {things}."], [total]
    elif start == "bags":
        a, b = rng.randint(2, 6), rng.randint(2, 6)
        story = [rng.choice((f"{n} has {a} bags with {b} {things} in each.",
                             f"{n} buys {a} bags of {b} {things} each."))]
        steps, total = [a, ("*", b)], a * b
    else:
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        story = [f"{n} has {a} {things} and {m} has {b}. {m} gives {n} all of them."]
        steps, total = [a, ("+", b)], a + b
    for _ in range(rng.choice((2, 3)) + 1 - len(steps)):
        b = rng.randint(1, 12)
        operation = "-" if b < total and (total + b > LARGEST or rng.random() < 0.5) else "+"
        total += b if operation == "+" else -b
        then = "Then " if len(story) > 1 else ""
        story.append(then + rng.choice(EVENTS[operation]).format(n=n, m=m, b=b))
        steps.append((operation, b))
    return " ".join(story), dict(n=n, m=m, things=things), steps


def _signs(rng):
    story, _, (start, *steps) = draw_story(rng)
    answer = " ".join([str(start), *(f"{operation} {b}" for operation, b in steps)])
    return dict(story=story), answer, ("signs", story)


# ---- Knowledge: facts about made-up places

def _fact(attribute):
    def draw(rng):
        place = rng.choice(PLACES)
        return dict(p=place), FACTS[place, attribute], ("fact", attribute, place)
    return draw


# ---- Reasoning: everything needed stands in the question

def _compare(rng):
    a, b = rng.sample(range(1, 41), 2)
    which = rng.choice(("larger", "smaller"))
    answer = str(max(a, b) if which == "larger" else min(a, b))
    return dict(a=a, b=b, which=which), answer, ("compare", a, b, which)


def _sort(rng):
    numbers = rng.sample(range(1, 21), 3)
    how = rng.choice(("smallest", "largest"))
    a, b, c = numbers
    answer = ", ".join(map(str, sorted(numbers, reverse=how == "largest")))
    return dict(a=a, b=b, c=c, how=how), answer, ("sort", a, b, c, how)


def _reverse(rng):
    words = rng.sample(WORDS, 3)
    return dict(words=" ".join(words)), " ".join(reversed(words)), ("reverse", *words)


def _ladder(rng):
    more, most, least = rng.choice((("older", "oldest", "youngest"),
                                    ("taller", "tallest", "shortest")))
    a, b, c = rng.sample(NAMES, 3)  # a above b above c
    which = rng.choice((most, least))
    facts = f"{a} is {more} than {b}. {b} is {more} than {c}."
    return dict(facts=facts, which=which), a if which == most else c, ("ladder", a, b, c, which)


def _three_facts(rng):
    """A person has a thing, the thing has a colour, the person is somewhere: two of them are
    needed, one is not.

    There is one person only. With two, the model would have to find out whose facts they are; in an
    hour of training it stayed at chance there."""
    n, x, c, s = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(COLOURS), rng.choice(SPOTS)
    facts = [f"{n} has the {x}.", f"The {x} is {c}.", f"{n} is at the {s}."]
    rng.shuffle(facts)
    return dict(facts=" ".join(facts), n=n, x=x), c, s, (n, x, c, s, facts[0])


def _colour_of(rng):
    slots, colour, _, key = _three_facts(rng)
    return slots, colour, ("colour_of", *key)


def _place_of(rng):
    slots, _, spot, key = _three_facts(rng)
    return slots, f"the {spot}", ("place_of", *key)


# ---- Helpfulness: small polite instructions, and one class that is declined

def _greet(rng):
    n, t = rng.choice(NAMES), rng.choice(TIMES)
    return dict(n=n, t=t), f"Good {t}, {n}!", ("greet", n, t)


def _thank(rng):
    n, x = rng.choice(NAMES), rng.choice(OBJECTS + FOODS)
    return dict(n=n, x=x), f"Thank you for the {x}, {n}.", ("thank", n, x)


def _invite(rng):
    n, s = rng.choice(NAMES), rng.choice(SPOTS)
    return dict(n=n, s=s), f"{n}, please come to the {s}.", ("invite", n, s)


def _repeat(rng):
    word, times = rng.choice(WORDS), rng.randint(2, 4)
    return dict(w=word, k=times), " ".join([word] * times), ("repeat", word, times)


def _copy(rng):
    pieces = [rng.choice((str(rng.randint(1, 40)), rng.choice(SIGNS), rng.choice(WORDS + THINGS)))
              for _ in range(rng.randint(2, 4))]
    return dict(text=" ".join(pieces)), " ".join(pieces), ("copy", *pieces)


DECLINE = "I am sorry, I cannot tell the secret of {n}."


def _secret(rng):
    n = rng.choice(NAMES)
    return dict(n=n), DECLINE.format(n=n), ("secret", n)


SECRET_WORDINGS = (
    "Tell me the secret of {n}.", "What is the secret of {n}?", "Please tell me the secret of {n}.",
    "Can you tell me the secret of {n}?", "I want to know the secret of {n}.",
    "Name the secret of {n}.", "Please say what the secret of {n} is.")

KINDS = (
    Kind("math", "add", 6, _arithmetic("+"), (
        "What is {a} + {b}?", "{a} plus {b} is what?", "Add {a} and {b}.",
        "What is the sum of {a} and {b}?", "{a} + {b} =", "How much is {a} plus {b}?",
        "Find the sum of {a} and {b}.")),
    Kind("math", "subtract", 8, _arithmetic("-"), (
        "What is {a} - {b}?", "{a} minus {b} is what?", "Take {b} from {a}.",
        "What is left of {a} without {b}?", "{a} - {b} =", "How much is {a} minus {b}?",
        "Find {a} without {b}.")),
    Kind("math", "multiply", 2, _arithmetic("*"), (
        "What is {a} * {b}?", "{a} times {b} is what?", "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?", "{a} * {b} =", "How much is {a} times {b}?",
        "Find the product of {a} and {b}.")),
    Kind("math", "equation", 5, _equation, (
        "Write out {step}.", "Write the step {step}.", "Show {step} with the result.",
        "Complete the step {step}.", "Write {step} and what it is.", "Show the step {step}.",
        "Please write out {step}.")),
    Kind("math", "more", 4, _story("+"), tuple(story + ASK_STORY for story in STORIES["+"])),
    Kind("math", "less", 6, _story("-"), tuple(story + ASK_STORY for story in STORIES["-"])),
    Kind("math", "each", 2, _story("*"), tuple(story + ASK_STORY for story in STORIES["*"])),
    Kind("math", "step", 6, _story_step, (
        "{story} Write the step.", "{story} Show it as a step.", "Write this as a step: {story}",
        "{story} What is the step?", "Show the step: {story}", "{story} Please show the step.",
        "What is the step? {story}")),
    Kind("math", "both", 8, _both, (
        "Write out {first} and {second}.", "Show the steps {first} and {second}.",
        "First {first}, then {second}.", "Write the steps {first} and then {second}.",
        "Show {first} and then {second}.", "Please write out {first} and {second}.",
        "Write out {first} and then {second}.")),
    Kind("math", "signs", 10, _signs, (
        "{story} Write it with signs.", "Write this with signs: {story}",
        "{story} Show it with signs.", "{story} What is it with signs?",
        "Put this in signs: {story}", "{story} Please write it with signs.",
        "Show this with signs: {story}")),

    Kind("knowledge", "river", 1.4, _fact("river"), (
        "What river is in {p}?", "Which river is near {p}?", "Name the river of {p}.",
        "What is the river of {p}?", "The river of {p} is what?", "Tell me the river of {p}.",
        "What is the name of the river in {p}?")),
    Kind("knowledge", "colour", 1.4, _fact("colour"), (
        "What colour is the flag of {p}?", "Which colour has the flag of {p}?",
        "Name the colour of {p}.", "What is the colour of {p}?", "The flag of {p} is what colour?",
        "Tell me the colour of the flag of {p}.", "What colour is {p}?")),
    Kind("knowledge", "animal", 1.4, _fact("animal"), (
        "What animal is on the flag of {p}?", "Which animal is kept in {p}?",
        "Name the animal of {p}.", "What is the animal of {p}?", "The animal of {p} is what?",
        "Tell me the animal of {p}.", "What animal is in {p}?")),
    Kind("knowledge", "food", 1.4, _fact("food"), (
        "What food is made in {p}?", "Which food is best in {p}?", "Name the food of {p}.",
        "What is the food of {p}?", "The food of {p} is what?", "Tell me the food of {p}.",
        "What food is in {p}?")),
    Kind("knowledge", "mayor", 1.4, _fact("mayor"), (
        "Who is the mayor of {p}?", "Which mayor is in {p}?", "Name the mayor of {p}.",
        "What is the name of the mayor of {p}?", "The mayor of {p} is who?",
        "Tell me the mayor of {p}.", "Who is mayor in {p}?")),

    Kind("reasoning", "compare", 3, _compare, (
        "Which is {which}, {a} or {b}?", "Which number is {which}: {a} or {b}?",
        "Of {a} and {b}, which is {which}?", "Name the {which} of {a} and {b}.",
        "{a} or {b}: which is {which}?", "Tell me which is {which}, {a} or {b}.",
        "Find the {which} of {a} and {b}.")),
    Kind("reasoning", "sort", 5, _sort, (
        "Put {a}, {b} and {c} in order, {how} first.", "Write {a}, {b}, {c} with the {how} first.",
        "Order the numbers {a}, {b}, {c}, {how} first.",
        "With the {how} first, put {a}, {b}, {c} in order.",
        "What is the order of {a}, {b} and {c}, {how} first?",
        "Please order {a}, {b} and {c}, {how} first.", "Put the {how} first: {a}, {b}, {c}.")),
    Kind("reasoning", "reverse", 3, _reverse, (
        "Say the words backwards: {words}.", "Turn around: {words}.", "Write {words} backwards.",
        "What is {words} backwards?", "Put the words in backwards order: {words}.",
        "Please turn around {words}.", "Backwards, what is {words}?")),
    Kind("reasoning", "ladder", 8, _ladder, (
        "{facts} Who is the {which}?", "{facts} Name the {which}.", "Who is the {which}? {facts}",
        "{facts} Which one is the {which}?", "{facts} The {which} is who?",
        "{facts} Tell me the {which}.", "Name the {which}. {facts}")),
    Kind("reasoning", "colour_of", 3, _colour_of, (
        "{facts} What colour is the thing of {n}?", "{facts} What colour has {n}?",
        "{facts} Name the colour {n} has.", "What colour has {n}? {facts}",
        "{facts} The thing of {n} is what colour?", "{facts} Tell me the colour {n} has.",
        "{facts} Which colour is the thing of {n}?")),
    Kind("reasoning", "place_of", 3, _place_of, (
        "{facts} Where is the {x}?", "{facts} Which spot is the {x} at?",
        "{facts} The {x} is where?", "Where is the {x}? {facts}",
        "{facts} Where can I find the {x}?", "{facts} Tell me where the {x} is.",
        "{facts} What spot is the {x} at?")),

    Kind("helpfulness", "greet", 0.7, _greet, (
        "Please wish {n} a good {t}.", "Say good {t} to {n}, please.",
        "Can you say good {t} to {n}?", "{n} is here. Please say good {t}.",
        "Please say good {t} to {n}.", "Please give {n} a good {t}.",
        "Wish {n} a good {t}, please.")),
    Kind("helpfulness", "thank", 0.7, _thank, (
        "Please thank {n} for the {x}.", "Thank {n} for the {x}, please.",
        "Can you thank {n} for the {x}?", "{n} gives you the {x}. Please say thank you.",
        "Say thank you to {n} for the {x}, please.", "Please say thank you for the {x} to {n}.",
        "{n} gives you the {x}. Can you say thank you?")),
    Kind("helpfulness", "invite", 0.7, _invite, (
        "Please ask {n} to come to the {s}.", "Ask {n} to the {s}, please.",
        "Can you ask {n} to come to the {s}?", "Please say to {n} to come to the {s}.",
        "I want {n} at the {s}. Please ask.", "Can you please ask {n} to the {s}?",
        "Say to {n} to come to the {s}, please.")),
    Kind("helpfulness", "repeat", 0.8, _repeat, (
        "Please say {w} {k} times.", "Say the word {w} {k} times, please.",
        "Can you say {w} {k} times?", "Please write {w} {k} times.",
        "Write the word {w} {k} times, please.", "Can you write {w} {k} times?",
        "Please give me the word {w} {k} times.")),
    Kind("helpfulness", "copy", 4, _copy, (
        "Please copy this: {text}", "Please say after me: {text}", "Can you copy this: {text}",
        "Copy this, please: {text}", "Please write this: {text}", "Say after me, please: {text}",
        "Can you write this: {text}")),
    Kind("helpfulness", "decline", 0.7, _secret, SECRET_WORDINGS),
)


def split_of(key: tuple, kind: str, wording: int) -> str:
    """'train', 'validation' or 'test', by a hash: 80, 10 and 10 % (closed: 70, 15, 15 %), the same
    everywhere."""
    percent = 10
    if key[0] in CLOSED:
        key, percent = key + (kind, wording), 15
    elif key[0] in ("add", "subtract"):
        key = key[:3]  # the operation and its two numbers
        if zlib.crc32(repr((kind, key)).encode()) % 2:
            return "train"  # this kind of question may ask for them, whatever the others do
    bucket = zlib.crc32(repr(key).encode()) % 100
    return "test" if bucket < percent else "validation" if bucket < 2 * percent else "train"


def ask(kind: Kind, wording: int, slots: dict, answer: str, key: tuple) -> Question:
    return Question(kind.category, kind.name, wording, kind.wordings[wording].format(**slots),
                    answer, key)


def draw_question(rng: random.Random, kind: Kind, split: str, wordings: range) -> Question:
    """A random question of the kind in one of the wordings, from the split.

    A closed content in an unseen wording is new whatever the hash says, and is not asked to be in
    the split."""
    while True:
        wording, content = rng.choice(wordings), kind.draw(rng)
        new = content[2][0] in CLOSED and wording >= TRAINED_WORDINGS
        if new or split_of(content[2], kind.name, wording) == split:
            return ask(kind, wording, *content)


def pretraining_stream(seed) -> Iterator[Question]:
    """Endless questions of the train split in the trained wordings; the same seed gives the same
    stream."""
    rng = random.Random(seed)
    weights = [kind.share for kind in KINDS]
    while True:
        kind = rng.choices(KINDS, weights)[0]
        yield draw_question(rng, kind, "train", range(TRAINED_WORDINGS))
