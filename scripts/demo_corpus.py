"""What the demo checkpoint learns from: Python's own documentation and source code, and generated conversations.

Everything is deterministic for a given Python version and seed. Evaluation data are held out by module and topic for
text, by fact and phrasing for facts, by operands for arithmetic, and by task and word for word tasks.
"""

import ast
import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma3.chat import Message

# ---- text ----------------------------------------------------------------------------------------------------

HELD_OUT_MODULES = frozenset({"bisect.py", "shlex.py", "textwrap.py"})
HELD_OUT_TOPICS = frozenset({"assert", "compound", "dynamic-features", "shifting", "try", "while", "with", "yield"})
HELD_OUT_BYTES = 60_000


def topics() -> dict[str, str]:
    """The language reference as ``help()`` shows it: topic → text."""
    source = (Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    assignment = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    found: dict[str, str] = ast.literal_eval(assignment.value)
    return found


def modules() -> dict[str, str]:
    """The standard library's top-level modules, and those of the packages below: file → source code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = ("asyncio", "collections", "concurrent/futures", "email", "http", "json", "logging", "unittest")
    paths = [path for folder in (".", *packages) for path in sorted((root / folder).glob("*.py"))]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths if path.stem[0] != "_"}


def docstrings(source: str) -> Iterator[str]:
    """The longer docstrings of a module, each after the name of what it documents."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                name = "" if isinstance(node, ast.Module) else f"{node.name}: "
                yield name + text


def split_text() -> tuple[list[str], str]:
    """(training documents, held-out text). No held-out paragraph occurs in a training document."""
    training = [text.strip() for name, text in topics().items() if name not in HELD_OUT_TOPICS]
    held_out = [text.strip() for name, text in topics().items() if name in HELD_OUT_TOPICS]
    for name, source in modules().items():
        if name in HELD_OUT_MODULES:
            held_out.append(source.strip())
        else:
            training.append(source.strip())
            training.extend(docstrings(source))
    seen = "\n".join(training)
    paragraphs = [part for text in held_out for part in text.split("\n\n") if part.strip()]
    text = "\n\n".join(part for part in paragraphs if part not in seen)
    return training, text.encode()[:HELD_OUT_BYTES].decode(errors="ignore")


# ---- questions -----------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


CAPITALS = _pairs(
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Japan:Tokyo China:Beijing India:Delhi "
    "Russia:Moscow Egypt:Cairo Greece:Athens Turkey:Ankara Poland:Warsaw Austria:Vienna Hungary:Budapest "
    "Sweden:Stockholm Norway:Oslo Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Belgium:Brussels "
    "Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Kenya:Nairobi Iran:Tehran Iraq:Baghdad "
    "Thailand:Bangkok Vietnam:Hanoi Switzerland:Bern Ukraine:Kyiv Romania:Bucharest Iceland:Reykjavik"
)
SYMBOLS = _pairs(
    "hydrogen:H helium:He carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne sodium:Na magnesium:Mg aluminium:Al "
    "silicon:Si phosphorus:P sulfur:S chlorine:Cl potassium:K calcium:Ca iron:Fe copper:Cu zinc:Zn silver:Ag "
    "tin:Sn gold:Au mercury:Hg lead:Pb uranium:U"
)
SOUNDS = _pairs(
    "dog:barks cat:meows cow:moos sheep:bleats pig:oinks horse:neighs duck:quacks lion:roars bee:buzzes "
    "snake:hisses frog:croaks owl:hoots wolf:howls mouse:squeaks bird:sings hen:clucks"
)
COLOURS = _pairs(
    "grass:green snow:white blood:red coal:black lemon:yellow sky:blue carrot:orange milk:white tomato:red "
    "banana:yellow chocolate:brown elephant:grey leaf:green sun:yellow strawberry:red night:black"
)
OPPOSITES = _pairs(
    "hot:cold big:small tall:short fast:slow up:down day:night happy:sad old:new open:closed light:dark full:empty "
    "hard:soft wet:dry rich:poor early:late strong:weak true:false left:right in:out good:bad high:low "
    "near:far long:short first:last win:lose buy:sell push:pull start:stop"
)
PLURALS = _pairs(
    "cat:cats dog:dogs box:boxes city:cities child:children mouse:mice man:men woman:women foot:feet tooth:teeth "
    "leaf:leaves knife:knives bus:buses baby:babies goose:geese person:people house:houses car:cars tree:trees "
    "book:books wolf:wolves fox:foxes story:stories key:keys"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
WORDS = _words(
    "cat dog sun moon star tree book fish bird frog cake milk rain snow wind fire rock sand ship door lamp desk "
    "chair table apple grape lemon melon peach bread water river ocean house green black white brown happy quick "
    "tiger zebra horse sheep mouse robot piano music dance paper plant stone cloud storm light night queen smile "
    "train plane truck wheel clock phone beach field grass heart hand foot nose ring king gold iron salt soup"
)
NAMES = _words(
    "Ada Alan Anna Ben Carl Dora Emma Eric Finn Grace Hugo Iris Jack Kate Leo Lucy Max Mia Noah Olga Paul Rosa "
    "Sam Tom Zoe"
)


@dataclass(frozen=True)
class Question:
    """A prompt with its only correct answer. ``key`` decides whether it is held out."""

    category: str
    prompt: str
    answer: str
    key: str


def number_in_words(number: int) -> str:
    """0 … 100 in English."""
    if number < 20:
        return UNITS[number]
    if number == 100:
        return "one hundred"
    ten, unit = TENS[number // 10 - 2], number % 10
    return ten if unit == 0 else f"{ten}-{UNITS[unit]}"


def _facts() -> Iterator[Question]:
    """What is held out is a fact in one of its phrasings."""
    forms: tuple[str, ...]

    def ask(category: str, phrasings: tuple[str, ...], subject: str, answer: str) -> Iterator[Question]:
        for phrasing in phrasings:
            prompt = phrasing.format(subject)
            yield Question(category, prompt, answer, prompt)

    for country, city in CAPITALS.items():
        forms = ("What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.")
        forms += ("Name the capital city of {}.", "Capital of {}?", "Do you know the capital of {}?")
        yield from ask("capital", forms, country, f"The capital of {country} is {city}.")
    for city, country in ((city, country) for country, city in CAPITALS.items()):
        forms = ("{} is the capital of which country?", "Which country has {} as its capital?")
        forms += ("In which country is {}?", "Where is {}?")
        yield from ask("country", forms, city, f"{city} is the capital of {country}.")
    for element, symbol in SYMBOLS.items():
        forms = ("What is the chemical symbol for {}?", "What is the symbol of {}?", "Give the chemical symbol of {}.")
        forms += ("Which symbol does {} have?", "How do chemists write {}?")
        yield from ask("symbol", forms, element, f"The symbol for {element} is {symbol}.")
    for animal, sound in SOUNDS.items():
        forms = (
            "What sound does the {} make?",
            "What does the {} do?",
            "How does the {} sound?",
            "What can the {} do?",
        )
        yield from ask("sound", forms, animal, f"The {animal} {sound}.")
    for thing, colour in COLOURS.items():
        forms = (
            "What colour is {}?",
            "What is the colour of {}?",
            "Which colour does {} have?",
            "Tell me the colour of {}.",
        )
        yield from ask("colour", forms, thing, f"It is {colour}.")
    for word, opposite in OPPOSITES.items():
        forms = ("What is the opposite of {}?", "Give the opposite of {}.", "Which word is the opposite of {}?")
        forms += ("Tell me the opposite of {}.", "Opposite of {}?")
        yield from ask("opposite", forms, word, f"The opposite of {word} is {opposite}.")
    for word, plural in PLURALS.items():
        forms = ("What is the plural of {}?", "Give the plural of {}.", "Write the plural form of {}.", "Plural of {}?")
        yield from ask("plural", forms, word, f"The plural of {word} is {plural}.")
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            forms = (f"Which {kind} comes after {{}}?", f"What {kind} follows {{}}?", f"Name the {kind} after {{}}.")
            yield from ask("order", forms, name, f"{after} comes after {name}.")
            forms = (f"Which {kind} comes before {{}}?", f"What {kind} precedes {{}}?", f"Name the {kind} before {{}}.")
            yield from ask("order", forms, name, f"{before} comes before {name}.")
    for number in range(101):
        forms = ("Write {} in words.", "How do you write {} in words?", "Spell out the number {}.")
        yield from ask("number", forms, str(number), f"{number} is {number_in_words(number)}.")


def _arithmetic() -> Iterator[Question]:
    """What is held out is a pair of operands, in every phrasing."""

    def ask(category: str, sign: str, a: int, b: int, result: int, phrasings: tuple[str, ...]) -> Iterator[Question]:
        for phrasing in ("What is {} {} {}?", "{} {} {} = ?", "Calculate {} {} {}.", *phrasings):
            prompt = phrasing.format(a, sign, b)
            yield Question(category, prompt, f"{a} {sign} {b} = {result}", f"{a} {sign} {b}")

    for a in range(31):
        for b in range(31):
            yield from ask("addition", "+", a, b, a + b, ("How much is {0} plus {2}?", "Add {2} to {0}."))
            if a >= b:
                yield from ask("subtraction", "-", a, b, a - b, ("How much is {0} minus {2}?", "Take {2} from {0}."))
    for a in range(11):
        for b in range(11):
            yield from ask("multiplication", "*", a, b, a * b, ("How much is {0} times {2}?", "Multiply {0} by {2}."))


def _word_tasks() -> Iterator[Question]:
    """What is held out is a word in one task, in every phrasing; other tasks show the letters of that word."""
    tasks: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
        "uppercase": (("Write {} in capital letters.", "Make {} uppercase.", "Put {} in capitals."), str.upper),
        "spell": (("Spell the word {}.", "How do you spell {}?", "Spell {}."), lambda w: "-".join(w)),
        "reverse": (
            ("Reverse the word {}.", "Write {} backwards.", "Spell {} backwards."),
            lambda w: "-".join(w[::-1]),
        ),
        "first letter": (
            ("What is the first letter of {}?", "Which letter does {} start with?", "Give the first letter of {}."),
            lambda w: f"{w} starts with {w[0]}.",
        ),
        "last letter": (
            ("What is the last letter of {}?", "Which letter does {} end with?", "Give the last letter of {}."),
            lambda w: f"{w} ends with {w[-1]}.",
        ),
        "count letters": (
            ("How many letters are in {}?", "How many letters does {} have?", "Count the letters of {}."),
            lambda w: f"{w} has {len(w)} letters.",
        ),
    }
    for word in WORDS:
        for task, (phrasings, answer) in tasks.items():
            for phrasing in phrasings:
                yield Question(task, phrasing.format(word), answer(word), f"{task} {word}")


def all_questions() -> list[Question]:
    """Every single-turn question whose answer can be checked."""
    return [*_facts(), *_arithmetic(), *_word_tasks()]


def held_out(question: Question) -> bool:
    """Whether a question is for evaluation: one key in ten is, and the same ones on every machine."""
    return hashlib.sha256(question.key.encode()).digest()[0] % 10 == 0


def evaluation_questions(limit: int = 500) -> list[Question]:
    """Held-out questions, spread evenly over the categories, with one phrasing of each key."""
    by_category: dict[str, dict[str, list[Question]]] = {}
    for question in filter(held_out, all_questions()):
        by_category.setdefault(question.category, {}).setdefault(question.key, []).append(question)
    share = limit // len(by_category)
    chosen = []
    for keys in by_category.values():
        rng = random.Random(0)
        chosen += [rng.choice(keys[key]) for key in sorted(rng.sample(sorted(keys), min(share, len(keys))))]
    return chosen


# ---- conversations -------------------------------------------------------------------------------------------

SMALL_TALK = (
    (("Hello!", "Hi!", "Hi there!", "Good morning!", "Hey!", "Hello"), "Hello! How can I help you?"),
    (("How are you?", "How are you today?", "How is it going?"), "I am fine, thank you. How can I help you?"),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"), "Goodbye! Have a nice day."),
    (
        ("Who are you?", "What are you?", "Introduce yourself.", "Tell me about yourself."),
        "I am a small demo model in the shape of Gemma 3. I know a few facts, small sums and word games.",
    ),
    (("What is your name?", "Do you have a name?", "What are you called?"), "I am the gemma-edge demo model."),
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        "I can answer simple questions about capitals, chemical symbols, opposites and plurals, do small sums and "
        "spell words.",
    ),
    (("Who made you?", "Who trained you?"), "A script in the gemma-edge repository trained me."),
    (("Are you a person?", "Are you human?"), "No, I am a small language model."),
    (("Can you help me?", "I have a question."), "Yes. What would you like to know?"),
)


# How often a category is drawn, relative to others: a computed answer needs more examples than a memorized one.
WEIGHTS = {"addition": 5, "subtraction": 4, "multiplication": 2, "capital": 2, "country": 1.5, "number": 1.5}
WEIGHTS |= {"spell": 2, "reverse": 2.5, "uppercase": 2, "count letters": 1.5}


class Conversations:
    """An endless stream of training conversations, determined by a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.by_category: dict[str, list[Question]] = {}
        for question in all_questions():
            if not held_out(question):
                self.by_category.setdefault(question.category, []).append(question)
        self.categories = list(self.by_category)
        self.weights = [WEIGHTS.get(category, 1) for category in self.categories]

    def question(self) -> Question:
        (category,) = self.rng.choices(self.categories, self.weights)
        return self.rng.choice(self.by_category[category])

    def __next__(self) -> list[Message]:
        kind = self.rng.random()
        if kind < 0.06:
            phrases, answer = self.rng.choice(SMALL_TALK)
            return _turn(self.rng.choice(phrases), answer)
        if kind < 0.12:
            return self._with_system()
        if kind < 0.22:
            return self._with_name()
        messages: list[Message] = []
        for _ in range(1 if kind < 0.75 else self.rng.randint(2, 6)):
            question = self.question()
            messages += _turn(question.prompt, question.answer)
        return messages

    def __iter__(self) -> "Conversations":
        return self

    def _with_system(self) -> list[Message]:
        question = self.question()
        name = self.rng.choice(NAMES)
        text, turn = self.rng.choice(
            (
                ("You are a helpful assistant.", _turn(question.prompt, question.answer)),
                ("Answer in capital letters.", _turn(question.prompt, question.answer.upper())),
                (f"Your name is {name}.", _turn(self.rng.choice(SMALL_TALK[5][0]), f"My name is {name}.")),
                (f"You are {name}, a helpful assistant.", _turn("What is your name?", f"My name is {name}.")),
            )
        )
        return [{"role": "system", "content": text}, *turn]

    def _with_name(self) -> list[Message]:
        """The user gives a name and asks for it after other turns, often when it is outside the sliding window."""
        name = self.rng.choice(NAMES)
        greeting = self.rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}."))
        messages = _turn(greeting.format(name), f"Nice to meet you, {name}!")
        for _ in range(self.rng.randint(0, 5)):
            question = self.question()
            messages += _turn(question.prompt, question.answer)
        asked = self.rng.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
        return messages + _turn(asked, f"Your name is {name}.")


def _turn(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
