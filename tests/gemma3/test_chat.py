"""The oracle is transformers: Gemma's own chat template rendered by it, its tokenizer and its image processor."""

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture
from transformers import AutoTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

import gemma3
from gemma3.chat import CHAT_TEMPLATE, Image, Message, Part, encode_chat, encode_prompt, place_images, render_chat
from gemma3.errors import BadInput
from gemma3.images import pan_and_scan_boxes
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
T = 16
PROCESSOR: Any = Gemma3Processor(
    Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    ORACLE,
    chat_template=RELEASED_TEMPLATE,
    image_seq_length=T,
)
# Image sizes by the number of crops that Pan & Scan makes.
PICTURES = {0: (300, 300), 2: (600, 300), 3: (300, 900), 4: (1300, 300)}


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
def test_our_template_is_the_released_one(messages: list[Message], prompt: bool) -> None:
    def rendered(template: str) -> str:
        return ORACLE.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    assert rendered(CHAT_TEMPLATE) == rendered(RELEASED_TEMPLATE) == render_chat(messages, prompt)


def test_our_template_renders_images_and_refuses_wrong_turns_as_the_released_one_does() -> None:
    content = [{"type": "text", "text": " see "}, {"type": "image"}, {"type": "text", "text": "this "}]
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief. "}]}
    messages = [system, {"role": "user", "content": content}]
    shown = [
        ORACLE.apply_chat_template(messages, chat_template=template, tokenize=False)
        for template in (CHAT_TEMPLATE, RELEASED_TEMPLATE)
    ]
    assert shown[0] == shown[1]
    assert "<start_of_image>" in shown[0]
    for template in (CHAT_TEMPLATE, RELEASED_TEMPLATE):
        with pytest.raises(jinja2.exceptions.TemplateError, match="alternate"):
            ORACLE.apply_chat_template([{"role": "user", "content": "a"}] * 2, chat_template=template, tokenize=False)


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


# Images


def by_processor(text: str, images: list[Image], add_special_tokens: bool) -> list[int]:
    """transformers' ids for a text with ``<start_of_image>``, from images that give as many crops as ``images`` say."""
    pictures = [Picture.new("RGB", PICTURES[image.crops]) for image in images]
    return PROCESSOR(
        images=[pictures] if pictures else None,
        text=[text],
        do_pan_and_scan=any(image.crops for image in images),
        add_special_tokens=add_special_tokens,
    )["input_ids"][0]


def as_shown(content: str | Any) -> str | list[dict[str, str]]:
    """Content as transformers' templates take it."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part} for part in content]


def images_in(parts: str | Any) -> list[Image]:
    return [part for part in parts if isinstance(part, Image)]


ONE, TWO, FOUR = Image(), Image(2), Image(4)
CONTENTS: list[list[Part]] = [
    [ONE, "What is this?"],
    ["What is this?", ONE],
    [ONE],
    [ONE, ONE],
    ["a", ONE, "b", ONE, "c"],
    [" before \n", ONE, "\n between\n\n", ONE, ONE, "\n\n after "],
    [FOUR, "What is this?"],
    ["\n", TWO, FOUR, "\n", Image(3)],
    ["a", TWO, ".", ONE, "b"],
    [],
]


@pytest.mark.parametrize("parts", CONTENTS)
def test_a_prompt_with_images_is_transformers(parts: list[Part]) -> None:
    text = "".join("<start_of_image>" if isinstance(part, Image) else part for part in parts)
    assert encode_prompt(TOKENIZER, parts, T) == by_processor(text, images_in(parts), add_special_tokens=True)


@pytest.mark.parametrize("parts", CONTENTS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_with_images_is_transformers(parts: list[Part], system: str | None) -> None:
    messages: list[Message] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": ["Sure?", ONE]},
    ]
    shown = [{"role": message["role"], "content": as_shown(message["content"])} for message in messages]
    if system is not None:
        messages = [{"role": "system", "content": [system]}, *messages]
        shown = [{"role": "system", "content": [{"type": "text", "text": system}]}, *shown]
    text = ORACLE.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    assert render_chat(messages) == text
    expected = by_processor(text, [*images_in(parts), ONE], add_special_tokens=False)
    assert encode_chat(TOKENIZER, messages, tokens_per_image=T) == expected


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text("\n ", max_size=4)


@given(st.lists(WORDS | st.sampled_from(list(PICTURES)).map(Image), max_size=5))
def test_any_ordinary_text_around_images_is_transformers(parts: list[Part]) -> None:
    text = "".join("<start_of_image>" if isinstance(part, Image) else part for part in parts)
    assert encode_prompt(TOKENIZER, parts, T) == by_processor(text, images_in(parts), add_special_tokens=True)


def test_images_have_the_crops_that_they_stand_for() -> None:
    """Otherwise the tests with crops above could not fail."""
    assert {crops: len(pan_and_scan_boxes(*size)) for crops, size in PICTURES.items()} == {k: k for k in PICTURES}


@pytest.mark.parametrize("crops", PICTURES)
def test_each_image_and_crop_is_one_run_of_soft_tokens(crops: int) -> None:
    ids = np.array(encode_prompt(TOKENIZER, [Image(crops), "x"], T))
    soft = ids == TOKENIZER.special_id("<image_soft_token>")
    begins = np.flatnonzero(np.diff(soft.astype(int)) == 1)
    ends = np.flatnonzero(np.diff(soft.astype(int)) == -1) + 1
    assert (ends - begins - 1).tolist() == [T] * (1 + crops)
    assert set(ids[begins]) == {TOKENIZER.special_id("<start_of_image>")}
    assert set(ids[ends]) == {TOKENIZER.special_id("<end_of_image>")}


@given(st.lists(st.sampled_from([*sorted(SPECIAL_PIECES), "<start_of", "_image>", "\n", ONE, TWO]), max_size=6))
def test_only_given_images_are_images(parts: list[Part]) -> None:
    for ids in (
        encode_prompt(TOKENIZER, parts, T),
        encode_chat(TOKENIZER, [{"role": "user", "content": parts}], tokens_per_image=T),
    ):
        count = sum(1 + image.crops for image in images_in(parts))
        assert ids.count(TOKENIZER.special_id("<start_of_image>")) == count
        assert ids.count(TOKENIZER.special_id("<image_soft_token>")) == count * T
        assert ids.count(TOKENIZER.bos_id) == 1


def test_images_to_a_text_only_model_are_bad_input() -> None:
    with pytest.raises(BadInput, match="2 images for a text-only model"):
        encode_chat(TOKENIZER, [{"role": "user", "content": [ONE, "x", TWO]}])
    with pytest.raises(BadInput, match="1 image for a text-only model"):
        encode_prompt(TOKENIZER, [ONE, "x"])


@pytest.mark.parametrize("content", [["a", "b"], [ONE], []])
def test_a_system_message_is_one_text(content: list[Part]) -> None:
    with pytest.raises(BadInput, match="expected one text"):
        encode_chat(TOKENIZER, [{"role": "system", "content": content}, *conversation("x")], tokens_per_image=T)


def test_images_go_where_the_markers_are() -> None:
    assert place_images("a <image> b<image>", [ONE, TWO]) == ["a ", ONE, " b", TWO, ""]
    assert place_images("a b", [ONE, TWO]) == [ONE, TWO, "a b"]
    assert place_images("an <image> tag", []) == ["an <image> tag"]
    for images in ([ONE], [ONE, ONE, ONE]):
        with pytest.raises(BadInput, match=f"has 2 markers <image> for {len(images)} image"):
            place_images("<image> and <image>", images)
