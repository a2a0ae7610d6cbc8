"""The tokenizer's files and the chat template of the kinds, from the demo's tokenizer."""

import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, AutoTokenizer

import gemma3
from tests.gemma3.test_chat import RELEASED_TEMPLATE
from tests.kinds.kind import Kind
from tests.kinds.spelling import edit
from tests.kinds.weights import ROWS

# Generated code creates the module's classes when it is imported, so a type checker does not know them.
protobuf: Any = sentencepiece_model_pb2

DEMO = Path(gemma3.__file__).parent / "demo"
TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"

# Ordinary words, one of which is a piece already, and one has a space; special markers.
WORDS = ("Xylofrobnicate", "[SCRATCH]", "<CHARACTER_1>", "now", "New York", "\u00e9t\u00e9")
MARKERS = ("<|im_start|>", "<|im_end|>")
# Gemma's vocabulary has pieces without a use. Some tools give them a name instead of adding tokens.
UNUSED = {ROWS - 2: "<unused0>", ROWS - 1: "<unused1>"}
RENAMED = {ROWS - 2: "<|im_start|>", ROWS - 1: "<CHARACTER_1>"}  # a special one and an ordinary one

# As it is most often copied; and one that needs what transformers' renderer has beyond Jinja's defaults.
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_OF_TRAINING = """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message.content }}{{ eos_token }}
        {% endgeneration %}
        {% continue %}
    {% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

# Every added word, with and without spaces around it, runs of spaces and newlines, bytes that are no piece.
PROBE = (
    "[SCRATCH]  and\n\n\nXylofrobnicate<CHARACTER_1>, <unused1> New York's nowhere caf\u00e9, \u00e9t\u00e9 \U0001f600"
)
# Parts of texts. No special token comes of them.
FRAGMENTS = (
    *(
        "Xylofrobnicate",
        "Xylo",
        "[SCRATCH]",
        " [SCRATCH] ",
        "<CHARACTER_1>",
        "<CHAR",
        "now",
        "nowhere",
        "New York",
        "New",
    ),
    *(
        "<unused0>",
        "<unused1>",
        "<unu",
        "\u00e9t\u00e9",
        "cafe\u0301",
        "\U0001f468\u200d\U0001f469",
        "\ufb01",
        "<|im_",
        "\u2581",
    ),
    *(" ", "  ", "     ", "\n", "\n\n\n", "\t", "\r\n", "a", "1", "3.14", "don't", "<0x41>", "<b>"),
)


def texts(kind: Kind) -> list[str]:
    """``PROBE`` and twenty random texts, for each kind others."""
    generator = random.Random(str(kind))
    return [PROBE, *("".join(generator.choices(FRAGMENTS, k=6)) for _ in range(20))]


def write_tokenizer(kind: Kind, directory: Path) -> None:
    """The tokenizer's files, the chat template among them, as the tool of ``kind`` writes them."""
    if kind.fault == "no tokenizer":
        return
    for name, content in _base().items():
        (directory / name).write_bytes(content)
    contradicting = kind.fault in ("contradicting tokenizers", "a piece renamed in one file")
    if kind.added == "renamed" or kind.fault == "a piece renamed in one file":
        _rename(directory, proto=not contradicting)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if kind.added == "words" or kind.fault == "a table without the added words":
        tokenizer.add_tokens(list(WORDS))
    elif kind.added == "markers":
        tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in MARKERS])
    if kind.fault == "an added word that takes a space":
        tokenizer.add_tokens([AddedToken("[SCRATCH]", rstrip=True)])
    elif kind.fault == "roles of TRL":  # setup_chat_format
        tokenizer.add_special_tokens(dict(zip(("bos_token", "eos_token"), MARKERS, strict=True)))
        tokenizer.pad_token = tokenizer.eos_token
    saved = Path(tempfile.mkdtemp(dir=directory))
    tokenizer.chat_template = None
    if kind.tokenizer == "5 truncating":  # tokenizer.json keeps what the last call set
        tokenizer([PROBE], truncation=True, max_length=8, padding="max_length")
    tokenizer.save_pretrained(saved)
    if kind.tokenizer in ("5", "5 truncating") and not contradicting:
        for name in _base():
            (directory / name).unlink()
        for path in saved.iterdir():
            path.rename(directory / path.name)
    else:
        _as_version_4(directory, saved, kind)
    shutil.rmtree(saved)
    _write_template(kind, directory)


@cache
def _base() -> dict[str, bytes]:
    """The files of the demo's tokenizer, as transformers 4 wrote them. Its last two pieces are unused, as Gemma has."""
    model = protobuf.ModelProto()
    model.ParseFromString((DEMO / TOKENIZER_MODEL).read_bytes())
    data = json.loads((DEMO / TOKENIZER_JSON).read_text())
    config = json.loads((DEMO / TOKENIZER_CONFIG).read_text())
    ids = {token: name for name, token in data["model"]["vocab"].items()}
    for token, name in UNUSED.items():
        model.pieces[token].piece, model.pieces[token].type = name, model.SentencePiece.USER_DEFINED
        del data["model"]["vocab"][ids[token]]
        assert not any(ids[token] in merge for merge in data["model"]["merges"])
        data["model"]["vocab"][name] = token
        data["added_tokens"].append({"id": token, **_described(name, special=False, normalized=False)})
        config["added_tokens_decoder"][str(token)] = _described(name, special=False, normalized=False)
    return {
        TOKENIZER_MODEL: model.SerializeToString(),
        TOKENIZER_JSON: json.dumps(data).encode(),
        TOKENIZER_CONFIG: json.dumps(config).encode(),
        SPECIAL_TOKENS: (DEMO / SPECIAL_TOKENS).read_bytes(),
    }


def _described(content: str, special: bool, normalized: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": content, **flags, "normalized": normalized, "special": special}


def _rename(directory: Path, proto: bool) -> None:
    """Give the unused pieces names in tokenizer.json and tokenizer_config.json, and if ``proto`` in tokenizer.model."""

    def rename(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        for token, name in RENAMED.items():
            vocabulary[name] = vocabulary.pop(UNUSED[token])
            described = next(one for one in data["added_tokens"] if one["id"] == token)
            described |= {"content": name, "special": name in MARKERS}

    edit(directory / TOKENIZER_JSON, rename)
    listed = {str(token): _described(name, name in MARKERS, normalized=False) for token, name in RENAMED.items()}
    edit(directory / TOKENIZER_CONFIG, lambda config: config["added_tokens_decoder"].update(listed))
    if proto:
        _rename_pieces(directory / TOKENIZER_MODEL, RENAMED)


def _rename_pieces(path: Path, names: dict[int, str]) -> None:
    model = protobuf.ModelProto()
    model.ParseFromString(path.read_bytes())
    for token, name in names.items():
        model.pieces[token].piece = name
    path.write_bytes(model.SerializeToString())


def _as_version_4(directory: Path, saved: Path, kind: Kind) -> None:
    """Put the added tokens and the roles of what transformers 5 ``saved`` into the files of transformers 4."""
    data, saved_config = (json.loads((saved / name).read_text()) for name in (TOKENIZER_JSON, TOKENIZER_CONFIG))
    (directory / TOKENIZER_JSON).write_text(json.dumps(data))
    added = {token["content"]: token["id"] for token in data["added_tokens"] if token["id"] >= ROWS}
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    listed = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in data["added_tokens"]}
    roles = {key: saved_config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    edit(directory / TOKENIZER_CONFIG, lambda config: config.update(roles | {"added_tokens_decoder": listed}))
    edit(directory / SPECIAL_TOKENS, lambda config: config.update(roles))
    if kind.tokenizer == "4 slow":
        (directory / TOKENIZER_JSON).unlink()
    if kind.fault == "contradicting tokenizers":
        names = {token: name for name, token in data["model"]["vocab"].items()}
        _rename_pieces(directory / TOKENIZER_MODEL, {3000: names[3001], 3001: names[3000]})


def _write_template(kind: Kind, directory: Path) -> None:
    wanted = kind.template
    edit(directory / TOKENIZER_CONFIG, lambda config: config.pop("chat_template", None))
    in_config: dict[str, Any] = {
        "Gemma's in config": RELEASED_TEMPLATE,
        "ChatML over Gemma's": RELEASED_TEMPLATE,
        "named": [{"name": "tool_use", "template": RELEASED_TEMPLATE}, {"name": "default", "template": CHATML}],
    }
    in_file = {"Gemma's": RELEASED_TEMPLATE, "ChatML": CHATML_OF_TRAINING, "ChatML over Gemma's": CHATML}
    if wanted in in_config:
        edit(directory / TOKENIZER_CONFIG, lambda config: config.update(chat_template=in_config[wanted]))
    if wanted in in_file:
        (directory / TEMPLATE_FILE).write_text(in_file[wanted])
    if wanted == "processor's":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
