"""The oracle is transformers: its AutoTokenizer finds and renders the template of the same directory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

import gemma3
from gemma3.chat import CHAT_TEMPLATE, GEMMA, Image, Message
from gemma3.chat_template import TemplateFormat, format_of, open_format
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from tests.gemma3.test_chat import (
    ORACLE,
    RELEASED_TEMPLATE,
    TOKENIZER,
    T,
    as_shown,
    by_processor,
    conversation,
    images_in,
)

DEMO, DEMO_VISION = Path(gemma3.__file__).parent / "demo", Path(gemma3.__file__).parent / "demo_vision"
VARIABLES = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}

# Turns between markers of their own, no BOS, a system turn.
CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "gemma-1": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{{- '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "words only": """\
{{ bos_token }}A chat.{% for m in messages %}

{{ 'User' if m.role == 'user' else m.role|title }}: {{ m['content'].strip() }}{% endfor %}
{% if add_generation_prompt %}

Assistant:{% endif %}""",
    "everything": """\
{%- set ns = namespace(count=0) -%}
{%- macro turn(m) %}<|im_start|>{{ m.role }} {{ m | tojson }}<|im_end|>{% endmacro -%}
{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ sep_token is defined }}{{ boi_token }}{{ pad_token }}
{% for m in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
  {% generation %}{{ turn(m) }}{% endgeneration %}

{% endfor %}
{{ ns.count }} {{ dict(a=1)['a'] }} {{ {'b': '<é>'} | tojson(indent=1) }}{{ eos_token }}""",
}
# Texts of one and several lines, with words of the template and of other markup.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(["\n\n", " a \n", "<b>&amp;"])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint's tokenizer with two more special tokens, without a template."""
    out = tmp_path_factory.mktemp("tuned")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(DEMO / name, out / name)
    more = {4096: "<|im_start|>", 4097: "<|im_end|>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}

    def add(config: dict[str, Any]) -> None:
        del config["chat_template"]
        config["added_tokens_decoder"] |= {str(i): {"content": name, **flags} for i, name in more.items()}

    edit(out / "tokenizer_config.json", add)
    edit(out / "tokenizer.json", lambda file: file["added_tokens"].extend(
        {"id": i, "content": name, **flags} for i, name in more.items()
    ))  # fmt: skip
    return out


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def with_template(checkpoint: Path, template: Any, name: str, out: Path) -> Path:
    """A copy of ``checkpoint`` whose file ``name`` holds the template."""
    shutil.copytree(checkpoint, out)
    if name.endswith(".jinja"):
        (out / name).write_text(template)
    else:
        if not (out / name).exists():
            (out / name).write_text("{}")
        edit(out / name, lambda config: config.update(chat_template=template))
    return out


def opened(checkpoint: Path, multimodal: bool = False) -> TemplateFormat:
    chat = open_format(checkpoint, multimodal)
    assert isinstance(chat, TemplateFormat)
    return chat


# Which template


@pytest.mark.parametrize("template", [RELEASED_TEMPLATE, CHAT_TEMPLATE])
@pytest.mark.parametrize("multimodal", [True, False])
def test_gemmas_own_template_is_recognized(template: str, multimodal: bool) -> None:
    assert format_of(template, VARIABLES, multimodal) is GEMMA


# What fine-tunes change in Gemma's template: (what it has, what they put there).
CHANGED = {
    "thoughts of earlier turns": ("{{ content | trim }}", "{{ (content.split('</think>') | last) | trim }}"),
    "reasoning": ("{{ content | trim }}", "{{ message.reasoning_content }}{{ content | trim }}"),
    "tool calls": ("{{ content | trim }}", "{{ content | trim }}{% if message.tool_calls %}tools{% endif %}"),
    "names": ("{{ content | trim }}", "{{ message.name }}{{ content | trim }}"),
    "a short history": ("{% for message in messages %}", "{% for message in messages[-5:] %}"),
}
SIMPLE = """{{ bos_token }}{% set ns = namespace(prefix='') %}{% if messages[0]['role'] == 'system' %}\
{% set ns.prefix = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) \
+ '\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}\
{{ ns.prefix if loop.first else '' }}{% for content in ([message['content']] if message['content'] is string else \
message['content'] | map(attribute='text')) %}{{ content | trim }}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


LOOKING = (
    "{{ bos_token }}{% for m in messages %}{{ m.content | replace('<eos>', '') }}{{ m.content | length }}{% endfor %}"
)


def test_a_template_that_looks_into_names_of_special_tokens(tokenizer: Tokenizer) -> None:
    """They stay text, and so they are marked while it renders. Where that changes what it writes, it is refused."""
    own = TemplateFormat(LOOKING, VARIABLES)
    said: Message = {"role": "user", "content": "plain < text"}
    assert own.encode(tokenizer, [said]) == [2, *tokenizer.encode("plain < text12", bos=False)]
    for content in ("an <eos> inside", "ends with <"):
        with pytest.raises(BadInput, match="holds the name of a special token, or a part of one at its end"):
            own.encode(tokenizer, [{"role": "user", "content": content}])


def test_gemmas_form_in_other_words() -> None:
    assert format_of(SIMPLE, VARIABLES, False) is GEMMA


@pytest.mark.parametrize("change", CHANGED)
def test_a_template_that_does_more_than_gemmas_is_used(change: str) -> None:
    old, new = CHANGED[change]
    assert old in SIMPLE
    assert format_of(SIMPLE.replace(old, new), VARIABLES, False).name == "template"


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }", "{{ raise_exception('never') }}"])
def test_a_template_that_renders_nothing_is_refused_at_once(template: str) -> None:
    with pytest.raises(BadInput, match="chat template"):
        format_of(template, VARIABLES, False)


def test_the_demo_checkpoints_have_gemmas_form() -> None:
    assert open_format(DEMO, False) is GEMMA
    assert open_format(DEMO_VISION, True) is GEMMA


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{{ bos_token }}", ""),
        ("message['content'] | trim", "message['content']"),
        ("+ '\n\n'", "+ '\n'"),
        ("<end_of_turn>\n", "<end_of_turn>"),
        ("{{'<start_of_turn>model", "{{'<start_of_turn>assistant"),
        ('role = "model"', 'role = "assistant"'),
        ('{{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}', ""),
        ("{{ '<start_of_image>' }}", "{{ '<image>' }}"),
        ("item['text'] | trim", "item['text']"),
    ],
)
def test_a_template_that_differs_anywhere_is_used(old: str, new: str) -> None:
    assert old in RELEASED_TEMPLATE
    assert format_of(RELEASED_TEMPLATE.replace(old, new), VARIABLES, True).name == "template"


def test_without_a_template_the_form_is_gemmas(tuned: Path) -> None:
    assert open_format(tuned, False) is GEMMA


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_it_is_found_where_transformers_finds_it(tuned: Path, tmp_path: Path, name: str) -> None:
    checkpoint = with_template(tuned, CHATML, name, tmp_path / "c")
    assert opened(checkpoint).template == CHATML == AutoTokenizer.from_pretrained(checkpoint).chat_template


def test_the_file_wins_over_the_configuration_and_the_default_over_others(tuned: Path, tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    checkpoint = with_template(tuned, several, "tokenizer_config.json", tmp_path / "a")
    assert opened(checkpoint).template == CHATML == AutoTokenizer.from_pretrained(checkpoint).get_chat_template()
    both = with_template(checkpoint, "{{ messages[0].content }}", "chat_template.jinja", tmp_path / "b")
    assert opened(both).template == AutoTokenizer.from_pretrained(both).chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_multimodal_models_processor_has_its_own_files(tmp_path: Path, name: str) -> None:
    checkpoint = with_template(DEMO_VISION, CHATML, name, tmp_path / "a")
    both = with_template(checkpoint, "no", "chat_template.jinja", tmp_path / "b")
    assert opened(both, multimodal=True).template == CHATML == Gemma3Processor.from_pretrained(both).chat_template


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is '3'"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "x"}]}', "default"),
        ("tokenizer_config.json", "[]", "holds a JSON list"),
        ("tokenizer_config.json", "{", "not readable as JSON"),
        ("tokenizer_config.json", '{"a": ' + "[" * 100_000, "not readable as JSON"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.jinja", "x" * (1 << 21), "over the limit"),
    ],
)
def test_what_is_no_template_is_bad_input(tmp_path: Path, name: str, content: Any, word: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=word):
        open_format(tmp_path, False)


# What it renders


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_transformers(tuned: Path, tmp_path: Path, name: str) -> None:
    checkpoint = with_template(tuned, TEMPLATES[name], "chat_template.jinja", tmp_path / "c")
    chat, tokenizer = opened(checkpoint), Tokenizer(checkpoint)
    oracle: Any = AutoTokenizer.from_pretrained(checkpoint)
    system: Message = {"role": "system", "content": " Be brief. "}

    @given(st.lists(WORDS, min_size=1, max_size=5), st.booleans(), st.booleans())
    def check(contents: list[str], has_system: bool, prompt: bool) -> None:
        messages = [*([system] if has_system and name != "gemma-1" else []), *conversation(*contents)]
        shown = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert chat.render(messages, prompt) == shown
        ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert chat.encode(tokenizer, messages, prompt) == ids

    check()


def test_texts_in_parts_are_given_to_the_template_as_parts(tuned: Path, tmp_path: Path) -> None:
    template = "{% for p in messages[0].content %}[{{ p.type }} {{ p.text }}]{% endfor %}"
    checkpoint = with_template(tuned, template, "chat_template.jinja", tmp_path / "c")
    parts = [{"type": "text", "text": text} for text in ("a", " b")]
    oracle: Any = AutoTokenizer.from_pretrained(checkpoint)
    expected = oracle.apply_chat_template([{"role": "user", "content": parts}], return_dict=False)
    tokenizer = Tokenizer(checkpoint)
    assert opened(checkpoint).encode(tokenizer, [{"role": "user", "content": ["a", " b"]}], False) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False, "normalized": False},
            "eos_token": None,
            "sep_token": "<|im_end|>",
        },
        {"boi_token": None, "eoi_token": "<|im_end|>"},
        {"extra_special_tokens": {"boi_token": "<|im_end|>"}},
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_the_variables_are_transformers(tuned: Path, tmp_path: Path, changes: dict[str, Any], listed: bool) -> None:
    def change(config: dict[str, Any]) -> None:
        config |= changes
        if not listed:  # then special_tokens_map.json counts
            del config["added_tokens_decoder"]

    checkpoint = with_template(tuned, CHATML, "chat_template.jinja", tmp_path / "c")
    edit(checkpoint / "tokenizer_config.json", change)
    assert opened(checkpoint).variables == AutoTokenizer.from_pretrained(checkpoint).special_tokens_map


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "name", "tool_calls"])
def test_other_keys_of_a_message_are_given_to_the_template(tuned: Path, tmp_path: Path, key: str) -> None:
    template = "{% for m in messages %}{{ m | tojson }}{{ m.reasoning_content }}{% endfor %}"
    checkpoint = with_template(tuned, template, "chat_template.jinja", tmp_path / "c")
    value = [{"function": {"name": "f", "arguments": {"x": "é"}}}] if key == "tool_calls" else "why"
    message: Any = {"role": "assistant", "content": "a", key: value, "weight": 1, "nothing": None}
    oracle: Any = AutoTokenizer.from_pretrained(checkpoint)
    expected = oracle.apply_chat_template([message], return_dict=False)
    assert opened(checkpoint).encode(Tokenizer(checkpoint), [message], False) == expected
    message[key] = ["<bos>"] if key == "tool_calls" else "<bos>"
    ids = opened(checkpoint).encode(Tokenizer(checkpoint), [message], False)
    assert Tokenizer(checkpoint).bos_id not in ids


def test_a_message_of_lists_in_lists_is_bad_input() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    message: Any = {"role": "user", "content": "a", "more": nested}
    with pytest.raises(BadInput, match="lists in lists"):
        FORMAT.encode(TOKENIZER, [message])


SPELLED = ["<|im_start|>", "<|im_end|>", "<bos>", "<end_of_turn>", "<start_of_image>", "<|im_", "end|>", "<", "x", "\n"]


@given(st.lists(st.lists(st.sampled_from(SPELLED)).map("".join), min_size=1, max_size=4))
def test_content_never_becomes_a_special_token(tuned: Path, contents: list[str]) -> None:
    tokenizer = Tokenizer(tuned)
    ids = FORMAT.encode(tokenizer, conversation(*contents))
    start, end = (tokenizer.special[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert [i for i in ids if i in tokenizer.special_ids] == [*[start, end] * len(contents), start]
    decoded = tokenizer.decode(ids)  # special tokens give no text
    assert all(content in decoded for content in contents)


@given(st.lists(st.sampled_from(SPELLED), min_size=2, max_size=4))
def test_not_even_when_the_template_joins_texts(tuned: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(tuned)
    ids = JOINING.encode(tokenizer, [{"role": "user", "content": [*texts, "x"]}])
    assert not set(ids) & tokenizer.special_ids
    assert tokenizer.decode(ids) == "".join(text.strip() for text in texts) + "x"


FORMAT = TemplateFormat(CHATML, VARIABLES)
JOINING = TemplateFormat("{% for p in messages[0].content %}{{ p.text | trim }}{% endfor %}", VARIABLES)


# Images

SEEING = """\
{% for m in messages %}<start_of_turn>{{ m.role }}: {% if m.content is string %}{{ m.content }}
{%- else %}{% for p in m.content %}{{ '<start_of_image>' if p.type == 'image' else p.text }}{% endfor %}{% endif -%}
</turn>{% endfor %}"""


@pytest.mark.parametrize(
    "content", [[Image(), "what?"], ["a\n", Image(), "b", Image(2), "\n"], ["no image"], [Image()]]
)
@pytest.mark.parametrize("newline", ["", "\n\n"])
@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_an_image_is_expanded_as_by_transformers_processor(content: list[Any], newline: str, bos: str) -> None:
    template = bos + SEEING.replace("</turn>", newline + "<end_of_turn>")
    text = ORACLE.apply_chat_template(
        [{"role": "user", "content": as_shown(content)}], chat_template=template, tokenize=False
    )
    # The condition of Gemma3Processor.apply_chat_template
    expected = by_processor(text, images_in(content), add_special_tokens=not text.startswith("<bos>"))
    messages: list[Message] = [{"role": "user", "content": content}]
    assert TemplateFormat(template, VARIABLES).encode(TOKENIZER, messages, tokens_per_image=T) == expected


def test_an_image_that_the_template_does_not_show_is_bad_input() -> None:
    messages: list[Message] = [{"role": "user", "content": [Image(), "what?"]}]
    with pytest.raises(BadInput, match="writes <start_of_image> 0 times for 1 image"):
        TemplateFormat(CHATML, VARIABLES).encode(TOKENIZER, messages, tokens_per_image=T)
    with pytest.raises(BadInput, match="1 image for a text-only model"):
        TemplateFormat(SEEING, VARIABLES).encode(TOKENIZER, messages)


@pytest.mark.parametrize(
    ("template", "messages", "word"),
    [
        (CHATML, [], "no message"),
        ("{# nothing #}", conversation("a"), "renders this conversation as nothing"),
        (TEMPLATES["gemma-1"], [{"role": "system", "content": "x"}], "System role not supported"),
    ],
)
def test_a_refused_conversation_is_bad_input(template: str, messages: list[Message], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        TemplateFormat(template, VARIABLES).encode(TOKENIZER, messages)
