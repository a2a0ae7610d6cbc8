"""Writes what the phone's text side is compared with: ids, texts, prompts, draws and whole chats, as Python has them.

    python -m android_demo.ci.vectors.text [FOLDER]

FOLDER is android_demo/ci/target/vectors/text if not given. The same program writes the same files. No torch is needed.
"""

import dataclasses
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

import gemma3
from gemma3.chat import Image, Message, encode_chat
from gemma3.config import VisionConfig
from gemma3.errors import BadInput, DoesNotFit
from gemma3.pieces import SPACE
from gemma3.tokenizer import Tokenizer
from runtime_py.conversation import Conversation
from runtime_py.generate import Sampler
from runtime_py.measure.bench import Measurement, Rate
from runtime_py.pictures import Picture, content_of
from runtime_py.sessions.protocol import Call, Logits, SoftTokens, calls

protobuf: Any = sentencepiece_model_pb2
kind = protobuf.ModelProto.SentencePiece

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "android_demo/ci/target/vectors/text"
DEMOS = ("demo", "demo_vision")
STRINGS = 12_000  # for each of the small tokenizers
STRINGS_OF_LARGE = 3_000
LARGE = 262_144  # pieces of the released vocabulary
TOKENS_PER_IMAGE = 4
IMAGE_SIZE = 8
CONTEXT, CHUNK = 400, 16

TEXTS = (
    "The quick brown fox's 1234567890 tests, 3.14159e-10 and 1,000,000.",
    "def f(x):\n    if x > 0:\n\treturn [i ** 2 for i in range(x)]  # …\n",
    '{"a": [1, null, "\\u00e9"]}\r\n',
    "漢字かな交じり文、カタカナ。今日は良い天気ですね。",
    "한국어 문장입니다. 안녕하세요",
    "简体中文和繁體中文",
    "Привет, мир! Ünïcödé ß ẞ ŉ",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "🦊👩‍👩‍👧🇨🇭👍🏽❤️🏴󠁧󠁢󠁥󠁮󠁧󠁿🫠",
    "e\u0301a\u0308n\u0303o\u0302\u0323 Z͑ͫa̴l̷g̸o̵",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ ① Å ½ ＡＢＣ \u00a0\u2003\u3000\u200b\ufeff",
    "<table><tr><td>x</td></tr></table> <b>bold</b> </ b>",
    "https://example.org/a?b=c&d=%20#e C:\\Users\\x $\\int_0^1 x\\,dx$",
    "\u202eabc\u202c \x00\x01\x02\x1b[0m\x7f\x85\ufffd\U0010fffd\ue000",
    "What is the capital of France? Once upon a time, there was a small cat.",
)
RANGES = ((0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF))
WIDE = ((0x10000, 0x10FFFF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF))


# Tokenizers


def odd_model() -> bytes:
    """A vocabulary of what is rare: equal scores, pieces that no text may have, names inside names and with spaces."""
    draw = random.Random(1)
    model = protobuf.ModelProto()
    seen: set[str] = set()

    def add(piece: str, piece_type: int = kind.NORMAL, score: float = 0.0) -> None:
        if piece not in seen:
            seen.add(piece)
            model.pieces.add(piece=piece, type=piece_type, score=score)

    for name in ("<pad>", "<eos>", "<bos>"):
        add(name, kind.CONTROL)
    add("<unk>", kind.UNKNOWN)
    for name in ("<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"):
        add(name, kind.USER_DEFINED)
    add("<image_soft_token>", kind.USER_DEFINED)
    for name in ("ab<c", "b<cd", f"c{SPACE}d", "é漢a", "aaaa"):
        add(name, kind.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", kind.BYTE)
    alphabet = f"abcd<{SPACE}é漢🦊\n"
    for character in alphabet:
        add(character, score=-1.0)
    words = [*alphabet]
    while len(model.pieces) < 2600:
        word = "".join(draw.choices(words, k=2)) if draw.random() < 0.9 else "".join(draw.choices(alphabet, k=3))
        if len(word) <= 9:
            chance = draw.random()
            piece_type = kind.UNUSED if chance < 0.15 else kind.USER_DEFINED if chance < 0.19 else kind.NORMAL
            add(word, piece_type, float(draw.randrange(-40, 1)))
            words.append(word)
    return _finished(model)


def large_model() -> bytes:
    """As many pieces as the released vocabulary has: runs of newlines and spaces, words of several scripts."""
    draw = random.Random(2)
    model = protobuf.ModelProto()
    seen: set[str] = set()

    def add(piece: str, piece_type: int = kind.NORMAL) -> None:
        if piece not in seen:
            seen.add(piece)
            model.pieces.add(piece=piece, type=piece_type, score=-float(len(model.pieces)))

    for name in ("<pad>", "<eos>", "<bos>"):
        add(name, kind.CONTROL)
    add("<unk>", kind.UNKNOWN)
    for name in ("<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"):
        add(name, kind.USER_DEFINED)
    for run in (
        *("\n" * count for count in range(1, 32)),
        *(SPACE * count for count in range(2, 32)),
        "<table>",
        "<td>",
    ):
        add(run, kind.USER_DEFINED)
    for byte in range(256):
        add(f"<0x{byte:02X}>", kind.BYTE)
    characters = sorted({character for text in TEXTS for character in text if character.isprintable()} - {" "})
    for character in (SPACE, *characters, *map(chr, range(0x4E00, 0x9000))):
        add(character)
    words = [SPACE, *"etaoinshrdlucmfwypvbgkjqxz" * 40, *characters]
    while len(model.pieces) < LARGE - 1:
        word = draw.choice(words) + draw.choice(words)
        if len(word) <= 16:
            add(word)
            words.append(word)
    add("<image_soft_token>", kind.USER_DEFINED)
    return _finished(model)


def _finished(model: Any) -> bytes:
    model.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString(deterministic=True))


def with_added_tokens() -> bytes:
    """The demo's tokenizer as a fine-tune changes it: added words, added special tokens, ids without a token."""
    added = {4096: ("<tool>", False), 4097: ("<|im_end|>", True), 4100: ("two words", False), 4101: ("<tool>x", True)}
    demo = Path(gemma3.__file__).parent / "demo"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes((demo / "tokenizer.model").read_bytes())
        entries = {str(at): {"content": name, "special": special} for at, (name, special) in added.items()}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
        return Tokenizer(folder).model


def refused_models() -> dict[str, bytes]:
    """By a reason: models that are not Gemma's."""

    def changed(change: Callable[[Any], object]) -> bytes:
        model = protobuf.ModelProto.FromString(odd_model())
        change(model)
        return bytes(model.SerializeToString(deterministic=True))

    def without(name: str) -> Callable[[Any], None]:
        def remove(model: Any) -> None:
            kept = [piece for piece in model.pieces if piece.piece != name]
            del model.pieces[:]
            model.pieces.extend(kept)

        return remove

    return {
        "empty": b"",
        "cut": odd_model()[:-5],
        "noise": random.Random(3).randbytes(4000),
        "prefix": changed(lambda model: model.normalizer_spec.ClearField("add_dummy_prefix")),
        "spaces": changed(lambda model: model.normalizer_spec.ClearField("remove_extra_whitespaces")),
        "escape": changed(lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False)),
        "twice": changed(lambda model: model.pieces.add(piece="a", score=-1.0)),
        "no text": changed(lambda model: model.pieces.add(piece="", score=-1.0)),
        "no fallback": changed(lambda model: setattr(model.trainer_spec, "byte_fallback", False)),
        "no turn": changed(without("<end_of_turn>")),
        "no bos": changed(without("<bos>")),
        "no byte": changed(without("<0xE2>")),
    }


# Strings


def strings(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    pieces = protobuf.ModelProto.FromString(tokenizer.model).pieces
    ordinary = [piece.piece.replace(SPACE, " ") for piece in pieces if piece.type in (kind.NORMAL, kind.UNUSED)]
    whole = [piece.piece.replace(SPACE, " ") for piece in pieces if piece.type == kind.USER_DEFINED]
    names = sorted(tokenizer.special)
    files = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))

    def character(ranges: Sequence[tuple[int, int]]) -> str:
        return chr(draw.randint(*draw.choice(ranges)))

    def name() -> str:
        chosen = draw.choice(names)
        return chosen if draw.random() < 0.6 else chosen[: draw.randint(1, len(chosen))] + draw.choice(names)

    def cut(text: str) -> str:
        start = draw.randrange(len(text))
        return text[start : start + draw.randint(1, 40)]

    parts: tuple[Callable[[], str], ...] = (
        lambda: cut(draw.choice(TEXTS)),
        lambda: cut(files),
        lambda: "".join(draw.choices(ordinary, k=draw.randint(1, 8))),
        lambda: "".join(draw.choices(whole, k=draw.randint(1, 3))),
        name,
        lambda: " " * draw.choice((1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 65)),
        lambda: "\n" * draw.choice((1, 2, 3, 8, 9, 31, 32, 33)),
        lambda: draw.choice(("\t", "\r\n", "\t\t", " \n ", SPACE, SPACE * 2, f" {SPACE} ")),
        lambda: str(draw.randrange(10 ** draw.randint(1, 20))),
        lambda: "".join(character(RANGES) for _ in range(draw.randint(1, 8))),
        lambda: "".join(character(WIDE) for _ in range(draw.randint(1, 4))),
        lambda: draw.choice("aeno漢") + "".join(chr(draw.randint(0x300, 0x36F)) for _ in range(draw.randint(1, 4))),
        lambda: f"<0x{draw.randrange(256):02X}>",
        lambda: chr(draw.randrange(32)),
        lambda: draw.choice("abcdé漢🦊<") * draw.randint(1, 60),
    )
    yield from ("", " ", "\n", SPACE, "\0", *TEXTS, *names, *(f"{a}{b}" for a in names for b in names[:4]))
    for _ in range(count):
        yield "".join(draw.choice(parts)() for _ in range(draw.choice((1, 1, 2, 3, 5, 9))))


def write_tokenizer(folder: Path, name: str, model: bytes, count: int, seed: int) -> int:
    path = folder / f"{name}.model"
    path.write_bytes(model)
    tokenizer = Tokenizer(path)
    draw = random.Random(seed)
    encoded = []
    for text in strings(tokenizer, count, seed):
        ids = tokenizer.encode(text, bos=False)
        encoded.append([text, ids, tokenizer.decode(ids)])
    decoded = []
    bytes_ids = [at for at in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(at)) == 1]
    for _ in range(count // 3):
        any_ids = [draw.randrange(-2, tokenizer.vocab_size + 3) for _ in range(draw.randrange(12))]
        ids = any_ids if draw.random() < 0.3 else draw.choices([*any_ids, *bytes_ids[-260:]], k=draw.randrange(24))
        decoder = tokenizer.decoder()
        pieces = [*map(decoder.push, ids), decoder.flush()]
        # Python waits for the third byte of a surrogate before it refuses it; the whole text is the same.
        waits = re.search(rb"\xed[\xa0-\xbf]", b"".join(map(tokenizer.token_bytes, ids)))
        decoded.append([ids, "".join(pieces), None if waits else pieces])
    special = dict(tokenizer.special)
    _write(folder / f"{name}.json", {"special": special, "encoded": encoded, "decoded": decoded})
    return len(encoded) + len(decoded)


# Prompts


def write_chats(folder: Path) -> int:
    tokenizer = Tokenizer(folder / "demo.model")
    draw = random.Random(4)
    found = list(strings(tokenizer, 3000, 5))
    spaces = [chr(at) for at in range(0x110000) if chr(at).isspace()]

    def text() -> str:
        around = ["".join(draw.choices(spaces, k=draw.randrange(3))) for _ in range(2)]
        return around[0] + draw.choice(found) + around[1]

    def content(images: bool) -> Any:
        if draw.random() < 0.5:
            return text()
        return [
            Image(draw.choice((0, 0, 1, 3))) if images and draw.random() < 0.4 else text()
            for _ in range(draw.randrange(4))
        ]

    chats = []
    for _ in range(2000):
        size = draw.choice((None, TOKENS_PER_IMAGE))
        images = size is not None or draw.random() < 0.05
        messages: list[Message] = [{"role": "system", "content": content(False)}] if draw.random() < 0.3 else []
        for index in range(draw.randrange(5)):
            messages.append({"role": ("user", "assistant")[index % 2], "content": content(images)})
        if messages and draw.random() < 0.1:
            draw.choice(messages)["role"] = draw.choice(("system", "user", "assistant"))
        prompt = draw.random() < 0.7
        try:
            ids: Any = encode_chat(tokenizer, messages, prompt, tokens_per_image=size)
        except BadInput:
            ids = None
        chats.append([size, prompt, [[one["role"], _plain(one["content"])] for one in messages], ids])
    placed = []
    blank = np.zeros((1, 1, 3), np.uint8)
    for _ in range(500):
        words = "".join(draw.choice(("<image>", "<image", " look ", "image>", "é")) for _ in range(draw.randrange(6)))
        crops = [draw.randrange(3) for _ in range(draw.randrange(4))]
        seeing = draw.random() < 0.7 or bool(crops)
        pictures = [Picture((blank,) * (count + 1)) for count in crops]
        try:
            parts: Any = _plain(content_of(words, pictures, _vision(9) if seeing else None))
        except BadInput:
            parts = None
        placed.append([words, crops, seeing, parts])
    spaces_everywhere = [ord(one) for one in spaces]
    _write(folder / "chats.json", {"chats": chats, "placed": placed, "spaces": spaces_everywhere})
    return len(chats) + len(placed)


def _plain(content: Any) -> list[Any]:
    return [
        part if isinstance(part, str) else part.crops for part in ([content] if isinstance(content, str) else content)
    ]


# Draws


class Toy:
    """A model whose logits depend on all that was fed, which Kotlin computes too. All numbers are exact in float32."""

    def __init__(self, vocab_size: int, bits: int = 10) -> None:
        self.state = 1
        self._ids = np.arange(vocab_size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._bits = bits

    def feed(self, number: int) -> None:
        self.state = (self.state * 6364136223846793005 + number + 1442695040888963407) % 2**64

    def logits(self) -> Logits:
        """Numbers from 0 until 16."""
        mixed = (np.uint64(self.state) ^ self._ids) * np.uint64(0xBF58476D1CE4E5B9)
        return ((mixed >> np.uint64(64 - self._bits)).astype(np.float64) * 16 / 2**self._bits).astype(np.float32)


def write_draws(folder: Path) -> int:
    draw = random.Random(6)
    seeds = (0, 1, 2**32 - 1, 2**32, 2**63 - 1, *(draw.randrange(2 ** draw.randint(1, 63)) for _ in range(95)))
    generators = []
    for seed in seeds:
        bound = draw.choice((2, 3, 4096, 262_144, 262_208, 2**31 - 1, draw.randint(2, 2**31 - 1)))
        doubles = np.random.default_rng(seed).random(20).tolist()
        generators.append([seed, doubles, bound, np.random.default_rng(seed).integers(bound, size=21).tolist()])

    def settings() -> tuple[float, int, float]:
        temperature = draw.choice((0.0, 1.0, 1.0, 0.7, draw.uniform(0.05, 3), 1e-3, 5e-324))
        return (
            temperature,
            draw.choice((0, 0, 1, 2, 5, 64, 300)),
            draw.choice((1.0, 1.0, 0.95, 0.5, draw.uniform(0.01, 1))),
        )

    small: list[list[Any]] = []
    for _ in range(4000):
        size = draw.choice((1, 2, 7, 64, 150))
        style = draw.randrange(4)
        logits = np.array([draw.gauss(0, 4) for _ in range(size)], np.float32)
        if style == 1:
            logits = np.round(logits)  # many are equal
        if style == 2:
            logits[draw.randrange(size) :] = draw.choice((-np.inf, logits[0], -3e38))
        if style == 3:
            logits *= np.float32(draw.choice((1e-6, 1e6, 1e30)))
        if np.isinf(logits).all():
            logits[0] = 0
        seed = draw.randrange(2 ** draw.randint(1, 63))
        chosen = settings()
        sampler = Sampler(*chosen, seed=seed)
        ids = [sampler.sample(logits) for _ in range(20)]
        small.append([*chosen, seed, [None if np.isinf(one) else float(one) for one in logits], ids])
    large: list[list[Any]] = []
    toy = Toy(LARGE, bits=24)
    for index in range(40):
        chosen = settings()
        if chosen[0] == 0:
            chosen = (1.0, *chosen[1:])
        sampler = Sampler(*chosen, seed=index)
        states, ids = [], []
        for _ in range(6):
            toy.feed(index)
            states.append(str(toy.state))
            ids.append(sampler.sample(toy.logits()))
        large.append([*chosen, index, states, ids])
    _write(folder / "draws.json", {"generators": generators, "small": small, "large": large})
    return sum(len(case[-1]) for case in (*small, *large))


# Whole chats


def _vision(image_token: int) -> VisionConfig:
    return VisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        layer_norm_eps=1e-6,
        tokens_per_image=TOKENS_PER_IMAGE,
        image_token_id=image_token,
        begin_image_token_id=image_token - 2,
        end_image_token_id=image_token - 1,
    )


class ToySession:
    """``Toy`` behind the interface of a session. Its soft tokens are the sum of an image's bytes."""

    def __init__(self, vocab_size: int, vision: VisionConfig | None) -> None:
        self.vocab_size, self.vision, self.context, self.chunk = vocab_size, vision, CONTEXT, CHUNK
        self.reset()

    def reset(self) -> None:
        self._toy, self.fed = Toy(self.vocab_size), list[int]()

    @property
    def position(self) -> int:
        return len(self.fed)

    @property
    def logits(self) -> Logits:
        logits = self._toy.logits()
        if self._toy.state >> 59 == 0:
            logits[6] = 100.0  # <end_of_turn>, so that answers end
        return logits

    def prefill(self, ids: Sequence[int], images: Sequence[Any] = ()) -> Logits:
        for call in calls(self, ids, images):
            self._feed(call)
        return self.logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def encode_image(self, image: Any) -> SoftTokens:
        return np.full((TOKENS_PER_IMAGE, 1), int(image.sum()), np.float32)

    def _feed(self, call: Call) -> None:
        soft = None if call.image is None else int(self.encode_image(call.image)[0, 0])
        for token in call.ids:
            self._toy.feed(token if soft is None else soft)
        self.fed += call.ids


def write_conversations(folder: Path) -> int:
    tokenizer = Tokenizer(folder / "demo.model")
    vision = _vision(tokenizer.special_id("<image_soft_token>"))
    draw = random.Random(7)
    found = [text for text in strings(tokenizer, 1000, 8) if len(text) < 60 and "<image>" not in text]
    conversations, turns = [], 0
    for index in range(300):
        seeing = index % 2 == 1
        sampling = draw.choice(((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 64, 0.95)))
        limit = draw.choice((None, 1, 5, 40))
        session = ToySession(tokenizer.vocab_size, vision if seeing else None)
        chat = Conversation(session, tokenizer, Sampler(*sampling, seed=index), stop_ids=(1, 6), max_new_tokens=limit)
        said = []
        for _ in range(draw.randint(1, 8)):
            text = draw.choice(found)
            # A picture is all of one byte; several pixels are crops.
            shades = [
                [draw.randrange(256) for _ in range(draw.choice((1, 1, 3)))]
                for _ in range(draw.choice((0, 0, 1, 2)) if seeing else 0)
            ]
            pictures = [
                Picture(tuple(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), shade, np.uint8) for shade in one)) for one in shades
            ]
            try:
                answer = "".join(chat.say(text, pictures))
            except DoesNotFit:
                said.append([text, shades, None, None, session.fed.copy()])
                continue
            said.append([text, shades, answer, chat.reason, session.fed.copy()])
            turns += 1
        conversations.append([seeing, *sampling, index, limit, said])
    _write(folder / "conversations.json", conversations)
    return turns


def write_measurement(folder: Path) -> None:
    draw = random.Random(9)
    rates = [[draw.uniform(1, 1000) for _ in range(draw.randint(1, 8))] for _ in range(50)]
    cases = [[one, list(dataclasses.astuple(Rate.of(one)))] for one in rates]
    _write(folder / "measurement.json", {"keys": [one.name for one in dataclasses.fields(Measurement)], "rates": cases})


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, separators=(",", ":")))


def write(folder: Path) -> None:
    """Write everything below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    demos = {name: (Path(gemma3.__file__).parent / name / "tokenizer.model").read_bytes() for name in DEMOS}
    models = [(name, model, STRINGS) for name, model in demos.items()]
    models += [("odd", odd_model(), STRINGS), ("added", with_added_tokens(), STRINGS)]
    models += [("large", large_model(), STRINGS_OF_LARGE)]
    for seed, (name, model, count) in enumerate(models):
        start = time.perf_counter()
        print(f"{name}: {write_tokenizer(folder, name, model, count, seed)} cases, {time.perf_counter() - start:.1f} s")
    refused = folder / "refused"
    refused.mkdir(exist_ok=True)
    for name, content in refused_models().items():
        path = refused / f"{name}.model"
        path.write_bytes(content)
        try:
            Tokenizer(path)
        except BadInput:
            continue
        print(f"refused by the phone only: {name}")
    write_measurement(folder)
    print(f"chats: {write_chats(folder)}")
    print(f"draws: {write_draws(folder)}")
    print(f"conversations: {write_conversations(folder)} turns")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
