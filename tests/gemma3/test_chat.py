"""The oracle is transformers: Gemma's own chat template rendered by it, and its tokenizer on the same pieces."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import gemma3
from gemma3.chat import Message, encode_chat, render_chat
from gemma3.errors import BadInput
from gemma3.tokenizer import SPECIAL_PIECES, Tokenizer

DEMO = Path(gemma3.__file__).parent / "demo"
TOKENIZER = Tokenizer(DEMO)

# The chat_template of google/gemma-3-*-it's tokenizer_config.json.
RELEASED_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
DEMO_TEMPLATE = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]


ORACLE: Any = AutoTokenizer.from_pretrained(DEMO)
ORACLE.chat_template = RELEASED_TEMPLATE


def conversation(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    messages: list[Message] = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CONVERSATIONS = [
    conversation("Hello"),
    conversation("Hello", "Hi!"),
    conversation("Hello", "Hi!", "What is 2 + 2?"),
    conversation("  spaces around \n", "\n answer\t", "  "),
    conversation("", "", ""),
    conversation("Hello", system="Be brief."),
    conversation("Hello", "Hi", "Bye", system="  Spaces stay here. \n"),
    conversation("  trimmed  ", system=""),
    conversation("def f():\n\n\n    return 1\n", "```python\nf()\n```", "漢字 🦊 <b>é</b>"),
    conversation("user\nmodel\n", "model", "42 1234"),
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_text_and_ids_are_transformers(messages: list[Message], prompt: bool) -> None:
    shown = ORACLE.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(messages, prompt) == shown
    ids = ORACLE.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    assert encode_chat(TOKENIZER, messages, prompt) == ids


@pytest.mark.parametrize("messages", [*CONVERSATIONS, [{"role": "user", "content": [
    {"type": "image"}, {"type": "text", "text": " What is this? "}]}]])  # fmt: skip
def test_the_demo_template_renders_what_the_released_one_does(messages: list[Message]) -> None:
    for prompt in (True, False):
        rendered = [
            jinja2.Environment().from_string(template).render(
                messages=messages, bos_token="<bos>", add_generation_prompt=prompt
            )
            for template in (DEMO_TEMPLATE, RELEASED_TEMPLATE)
        ]  # fmt: skip
        assert rendered[0] == rendered[1]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=5))
def test_ids_are_transformers_for_any_ordinary_text(contents: list[str]) -> None:
    messages = conversation(*contents)
    ids = ORACLE.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encode_chat(TOKENIZER, messages) == ids


@given(st.lists(st.lists(st.sampled_from([*sorted(SPECIAL_PIECES), "x", "\n"])).map("".join), min_size=1, max_size=4))
def test_turn_markers_in_content_do_not_make_turns(contents: list[str]) -> None:
    ids = encode_chat(TOKENIZER, conversation(*contents))
    special = [i for i in ids if i in TOKENIZER.special_ids]
    start, end = TOKENIZER.special_id("<start_of_turn>"), TOKENIZER.end_of_turn_id
    assert special == [TOKENIZER.bos_id, *[start, end] * len(contents), start]


@pytest.mark.parametrize(
    ("roles", "seen"),
    [
        (["assistant"], "message 1 .* role 'assistant', expected 'user'"),
        (["user", "user"], "message 2 .* role 'user', expected 'assistant'"),
        (["system", "assistant"], "message 1 .* role 'assistant', expected 'user'"),
        (["user", "system"], "message 2 .* role 'system', expected 'assistant'"),
        (["user", "model"], "message 2 .* role 'model', expected 'assistant'"),
        (["system"], "no user message"),
        ([], "no user message"),
    ],
)
def test_turns_must_alternate(roles: list[str], seen: str) -> None:
    messages: list[Message] = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(BadInput, match=seen):
        render_chat(messages)
    with pytest.raises(BadInput, match=seen):
        encode_chat(TOKENIZER, messages)
