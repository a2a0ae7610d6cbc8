"""A checkpoint's own chat template, for a fine-tune whose prompts have another form than Gemma's.

The template is jinja2 text. It is looked for where transformers looks for it, and compared with Gemma's form on a few
conversations. If it differs, it is rendered in a sandbox (gemma3/template_renderer.py). The rendered text has the same
token ids as transformers' ``apply_chat_template``, except that content never becomes a special token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gemma3.chat import GEMMA, ChatFormat, Image, Message, Part, encode_parts, for_text_only, render_chat
from gemma3.errors import BadInput, counted
from gemma3.host.files import OWN_FILE, read_optional, read_text
from gemma3.template_renderer import TemplateRenderer
from gemma3.tokenizer import START_OF_IMAGE, Tokenizer

TEMPLATE_FILE, PROCESSOR_FILES = "chat_template.jinja", ("processor_config.json", "chat_template.json")
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"

# The named tokens of transformers' GemmaTokenizer.
NAMED_TOKENS = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
STANDARD_NAMES = {*NAMED_TOKENS, "sep_token", "cls_token"}

# The names of a model's reasoning in messages; the first is the usual one.
REASONING = ("reasoning_content", "thinking", "reasoning")

PRIVATE_USE = range(0xF0000, 0xFFFFE)


class TemplateFormat:
    """The form of a chat template. ``variables`` are the names of special tokens, such as ``bos_token``.

    Raises BadInput as ``TemplateRenderer`` does.
    """

    name: Literal["template"] = "template"

    def __init__(self, template: str, variables: Mapping[str, str]) -> None:
        self.template = template
        self.variables = variables
        self._renderer = TemplateRenderer(template, variables)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Raises BadInput for one that the template refuses or fails on."""
        return self._renderer.render([_for_template(message) for message in messages], add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tokens_per_image: int | None = None,
    ) -> list[int]:
        """As ``ChatFormat`` says. A text-only model gets a BOS only where the template writes one.

        A multimodal model gets one in any case, as from transformers' processor. Raises BadInput too when the template
        does not write ``<start_of_image>`` once for each image, and when it looks into names of special tokens in the
        messages, which stay text here.
        """
        if not messages:
            raise BadInput("the conversation has no message; give at least one")
        names, given = _Names.of(tuple(tokenizer.special)), [_for_template(message) for message in messages]
        try:
            mark = _unused_character(self.template + json.dumps(given, ensure_ascii=False))
            marked = [_marked(message, names, mark) for message in given]
        except RecursionError:
            raise BadInput("a message holds too many lists in lists; give one that holds text") from None
        rendered = self._renderer.render(marked, add_generation_prompt)
        if marked != given and rendered.replace(mark, "") != self._renderer.render(given, add_generation_prompt):
            raise BadInput(
                "a message holds the name of a special token, or a part of one at its end, and the chat template does "
                "something of its own with it; write the message without it"
            )
        images = [part for message in messages for part in message["content"] if isinstance(part, Image)]
        if images and tokens_per_image is None:
            raise for_text_only(len(images))
        if images and rendered.count(START_OF_IMAGE) != len(images):
            raise BadInput(
                f"the chat template writes {START_OF_IMAGE} {rendered.count(START_OF_IMAGE)} times for "
                f"{counted(len(images), 'image')}; leave the images out, or give them without --chat"
            )
        bos = self.variables.get("bos_token")
        adds_bos = tokens_per_image is not None and bos is not None and not rendered.startswith(bos)
        ids = [tokenizer.bos_id] if adds_bos else []
        parts: list[Part] = []
        remaining = iter(images)
        for index, piece in enumerate(names.pattern.split(rendered)):
            if index % 2 == 0:
                parts.append(piece.replace(mark, ""))
            elif images and piece == START_OF_IMAGE:
                parts.append(next(remaining))
            else:
                ids += [*encode_parts(tokenizer, parts, tokens_per_image), tokenizer.special[piece]]
                parts = []
        ids += encode_parts(tokenizer, parts, tokens_per_image)
        if not ids:
            raise BadInput("the chat template renders this conversation as nothing; give another one")
        return ids


def open_format(checkpoint: Path, multimodal: bool) -> ChatFormat:
    """The format of the conversations that the checkpoint in the directory ``checkpoint`` was tuned on.

    It is Gemma's own without a chat template and with one that renders the same. Raises BadInput when a file that may
    hold the template cannot be read or holds none that can be used.
    """
    template = _find_template(checkpoint, multimodal)
    return GEMMA if template is None else format_of(template, _variables(checkpoint), multimodal)


def format_of(template: str, variables: Mapping[str, str], multimodal: bool) -> ChatFormat:
    """The format of ``template``: Gemma's own if it renders the same on every one of ``_probes``.

    Raises BadInput when it renders none of them.
    """
    own = TemplateFormat(template, variables)
    answers = [(_answer(own.render, *probe), _answer(render_chat, *probe)) for probe in _probes(multimodal)]
    if all(theirs is None for theirs, _ in answers):
        own.render([{"role": "user", "content": "Hello"}], True)  # raises, and says why
    return GEMMA if all(theirs == gemmas for theirs, gemmas in answers) else own


def _find_template(checkpoint: Path, multimodal: bool) -> str | None:
    """The text of the checkpoint's chat template; None if it has none.

    transformers asks the processor of a multimodal model, which prefers its own JSON files, and the tokenizer of a
    text-only one, which does not know them. Here they are better than nothing.
    """
    others = (TEMPLATE_FILE, TOKENIZER_CONFIG)
    order = (*PROCESSOR_FILES, *others) if multimodal else (*others, *PROCESSOR_FILES)
    found = ((_read_text if name == TEMPLATE_FILE else _only)(checkpoint / name) for name in order)
    return next((template for template in found if template is not None), None)


def _only(path: Path) -> str | None:
    """The template under ``chat_template`` in a JSON file: a text, or the one named "default" of several."""
    given = read_optional(path, OWN_FILE).get("chat_template")
    match given:
        case None:
            return None
        case str():
            return given
        case list():
            named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        case dict():
            named = given
        case _:
            named = {}
    template = named.get("default")
    if not isinstance(template, str):
        raise BadInput(f'{path}: chat_template is {str(given)[:60]!r}, expected a text or a list with a "default"')
    return template


def _read_text(path: Path) -> str | None:
    return read_text(path, OWN_FILE) if path.exists() or path.is_symlink() else None


def _variables(checkpoint: Path) -> dict[str, str]:
    """The names of special tokens that transformers gives to a template.

    transformers reads special_tokens_map.json only if tokenizer_config.json does not list the added tokens.
    """
    config = read_optional(checkpoint / TOKENIZER_CONFIG, OWN_FILE)
    given = dict(config)
    if "added_tokens_decoder" not in config:
        named = read_optional(checkpoint / SPECIAL_TOKENS, OWN_FILE)
        given |= {key: named[key] for key in named if key in STANDARD_NAMES or given.get(key) is None}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), dict):
            given |= config[key]
    tokens: dict[str, Any] = NAMED_TOKENS | {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in given.items()
        if key in STANDARD_NAMES or key.endswith("_token")
    }
    return {key: value for key, value in tokens.items() if isinstance(value, str)}


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def _probes(multimodal: bool) -> list[tuple[list[Message], bool]]:
    """Conversations, and whether an answer is asked for. Gemma's template accepts most and refuses the last ones."""

    def turns(*contents: Any, system: Any = None) -> list[Message]:
        roles = ("user", "assistant")
        given: list[Message] = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
        return given if system is None else [{"role": "system", "content": system}, *given]

    conversations: list[list[Message]] = [
        turns("Hello"),
        turns("Hello", "Hi, you?", "Fine"),
        turns(" one\n", "\n two ", "three", " four\n\n"),
        turns("", ""),
        turns("Hello", "Hi", system="Be brief."),
        turns(" Hello", "Hi", "Fine", system=" Be brief.\n"),
        turns([" a ", "b\n"], ["c"], system=["Be brief."]),
        turns("<h1>&amp; 'quotes' \"more\" {{ braces }}</h1>", "é 漢 🙂"),
        [{"role": "user", "content": "Hello"}, {"role": "user", "content": "Hello?"}],
        [{"role": "assistant", "content": "Hello"}],
        [*turns("Hello", system="Be brief."), {"role": "user", "content": "Hello?"}],
        # What templates of fine-tunes do besides: long histories, thoughts, tools, names, other roles.
        turns(*(f"turn {number}" for number in range(1, 24))),
        turns("Hello", "<think>\nHm.\n</think>\n\nHi", "Fine", "<think>So.</think>Bye", "Bye"),
        turns("Hello /no_think", "Hi", "Fine"),
        _with_keys(turns("Hello", "Hi", "Fine", "Good"), name="Ann", reasoning_content="Hm."),
        _with_keys(turns("Hello", "Hi", "Fine"), tool_calls=[CALL]),
    ]
    for role in ("tool", "developer", "system", "model"):
        other: Message = {"role": role, "content": "42"}
        conversations += [[*turns("Hello", "Hi"), other], [other, *turns("Hello", "Hi")]]
    if multimodal:
        conversations += [turns([Image(), " What? "]), turns(["a", Image(), "b", Image()], "c", [Image()])]
    return [(messages, prompt) for messages in conversations for prompt in (True, False)]


def _with_keys(messages: list[Message], **keys: Any) -> list[Message]:
    """The messages of which the assistant's have more keys."""
    given: list[Any] = [{**one, **keys} if one["role"] == "assistant" else one for one in messages]
    return given


def _answer(render: Any, messages: list[Message], prompt: bool) -> str | None:
    """The rendered text; None if the conversation is refused."""
    try:
        text: str = render(messages, prompt)
    except BadInput:
        return None
    return text


def _for_template(message: Message) -> dict[str, Any]:
    """The message as transformers gives it to a template, with all keys that it came with.

    A key whose value is None is left out, and the model's reasoning is there under each name that templates use.
    """
    given: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in REASONING if key in given), None)
    if reasoning is not None:
        given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
    content = message["content"]
    if not isinstance(content, str):
        given["content"] = [
            {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part} for part in content
        ]
    return given


class _Names:
    """The names of special tokens: ``pattern`` finds the longest ones in text."""

    def __init__(self, names: Sequence[str]) -> None:
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self.pattern = re.compile(f"({longest_first})")
        self._anywhere = re.compile(f"(?={longest_first})")
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._longest = max(map(len, names))

    @staticmethod
    @lru_cache(maxsize=4)
    def of(names: tuple[str, ...]) -> "_Names":
        return _Names(names)

    def marked(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` after the first character of each name, so that no name is left.

        A beginning of a name at the end of the text is marked too, because a template may put another text after it.
        """
        end = len(text.rstrip())
        places = {match.start() for match in self._anywhere.finditer(text)}
        places |= {at for at in range(max(0, end - self._longest), end) if text[at:end] in self._beginnings}
        cuts = [0, *(place + 1 for place in sorted(places)), len(text)]
        return mark.join(text[start:end] for start, end in pairwise(cuts))


def _marked(value: Any, names: _Names, mark: str) -> Any:
    """``value`` with every text in it marked."""
    match value:
        case str():
            return names.marked(value, mark)
        case list():
            return [_marked(one, names, mark) for one in value]
        case dict():
            return {key: _marked(one, names, mark) for key, one in value.items()}
    return value


def _unused_character(text: str) -> str:
    used = set(text)
    return next(char for char in map(chr, PRIVATE_USE) if char not in used)
