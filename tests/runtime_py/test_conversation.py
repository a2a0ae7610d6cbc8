from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma3.chat import GEMMA, ChatFormat, Image, Message, encode_chat
from gemma3.chat_template import TemplateFormat
from gemma3.config import parse_config
from gemma3.errors import BadInput, DoesNotFit
from gemma3.tokenizer import Tokenizer
from runtime_py.conversation import Conversation, stream_text
from runtime_py.generate import Sampler, generate
from runtime_py.pictures import Picture
from runtime_py.prefix import NO_PREFIX, Prefix, prefix_ids
from runtime_py.sessions.protocol import Image as ImageInput
from runtime_py.sessions.protocol import Logits
from scripts.random_checkpoint import made_up_tokenizer
from tests.bundles import IMAGE_PIECES, SEEING_CONFIG, VOCABULARY
from tests.function_session import FunctionSession


def reciting(tokenizer: Tokenizer, answers: list[str], context: int = 256) -> FunctionSession:
    """A session that answers the n-th turn with the n-th answer, then ends the model's turn."""
    prompt_end = encode_chat(tokenizer, [{"role": "user", "content": "x"}])[-2:]
    script = [[*tokenizer.encode(answer, bos=False), tokenizer.end_of_turn_id] for answer in answers]

    def next_id(fed: list[int]) -> list[float]:
        starts = [end for end in range(2, len(fed) + 1) if fed[end - 2 : end] == prompt_end]
        answer = script[len(starts) - 1] if starts else [0]
        said = len(fed) - starts[-1] if starts else 0
        wanted = answer[min(said, len(answer) - 1)]
        return [float(token == wanted) for token in range(VOCABULARY)]

    return FunctionSession(next_id, VOCABULARY, context)


def conversation(
    session: FunctionSession,
    tokenizer: Tokenizer,
    limit: int | None = None,
    chat: ChatFormat = GEMMA,
    prefix: Prefix = NO_PREFIX,
) -> Conversation:
    stop_ids = {1, tokenizer.end_of_turn_id}
    return Conversation(
        session, tokenizer, Sampler(), chat=chat, prefix=prefix, stop_ids=stop_ids, max_new_tokens=limit
    )


class Forgetting(FunctionSession):
    """A session that can forget up to ``reach`` of its last ids, and counts what it is fed."""

    reach = 1000
    count = 0

    def can_rewind(self, written: int, position: int) -> bool:
        return written - position <= self.reach

    def rewind(self, position: int) -> None:
        assert self.can_rewind(self.position, position)
        self.fed = self.fed[:position]

    def prefill(self, ids: Sequence[int], images: Sequence[ImageInput] = ()) -> Logits:
        self.count += len(ids)
        return super().prefill(ids, images)


def forgetting(session: FunctionSession) -> Forgetting:
    session.__class__ = Forgetting
    assert isinstance(session, Forgetting)
    return session


def test_the_cache_holds_the_conversation_as_the_template_says(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["fine, you?", "good"])
    chat = conversation(session, tokenizer)
    assert "".join(chat.say(" hello ")) == "fine, you?"
    assert chat.reason == "stop token"
    before = session.position
    assert "".join(chat.say("well too")) == "good"
    whole = encode_chat(
        tokenizer,
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "fine, you?"},
            {"role": "user", "content": "well too"},
        ],
    )
    assert session.fed[: len(whole)] == whole
    assert before < len(whole)


def test_an_answer_cut_short_is_closed_before_the_next_turn(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["abcdef", "ok"])
    chat = conversation(session, tokenizer, limit=2)
    first = "".join(chat.say("hi"))
    assert chat.reason == "length"
    list(chat.say("again"))
    whole = encode_chat(
        tokenizer,
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "again"},
        ],
    )
    assert session.fed[: len(whole)] == whole


def test_an_answer_that_is_only_partly_read_stays_in_the_conversation(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["abcdef", "ok"])
    chat = conversation(session, tokenizer)
    stream = chat.say("hi")
    assert isinstance(stream, Generator)
    heard = next(stream)
    stream.close()
    assert chat.turn_ids("x")[: len(tokenizer.encode(heard, bos=False))] == tokenizer.encode(heard, bos=False)


def test_a_turn_without_room_leaves_the_conversation_as_it_was(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["a", "b"], context=24)
    chat = conversation(session, tokenizer)
    list(chat.say("hi"))
    fed, turn = list(session.fed), chat.turn_ids("x")
    with pytest.raises(DoesNotFit, match="context of 24"):
        list(chat.say("far too long a question for what is left"))
    assert session.fed == fed
    assert chat.turn_ids("x") == turn


def test_reset_starts_with_bos_again(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["a"])
    chat = conversation(session, tokenizer)
    list(chat.say("hi"))
    chat.reset()
    assert chat.turn_ids("hi")[0] == tokenizer.bos_id
    assert session.position == 0


def test_text_streams_in_whole_characters(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["né"])  # é is two byte tokens
    ids = encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
    generation = generate(session, ids, Sampler(), stop_ids={tokenizer.end_of_turn_id})
    assert list(stream_text(generation, tokenizer)) == ["n", "é"]


def test_images_are_part_of_their_turn(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(made_up_tokenizer(VOCABULARY, IMAGE_PIECES))
    tokenizer = Tokenizer(tmp_path)
    session = reciting(tokenizer, ["fine", "good"])
    session.vision = parse_config(SEEING_CONFIG).vision
    picture = Picture((np.zeros((28, 28, 3), np.uint8),))
    scanned = Picture(picture.pixels * 3)
    chat = conversation(session, tokenizer)
    assert "".join(chat.say("what is it", [picture])) == "fine"
    assert "".join(chat.say("and <image>?", [scanned])) == "good"
    whole = encode_chat(
        tokenizer,
        [
            {"role": "user", "content": [Image(), "what is it"]},
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": ["and ", Image(crops=2), "?"]},
        ],
        tokens_per_image=4,
    )
    assert session.fed[: len(whole)] == whole
    before = session.position
    for pictures, word in (([picture], "2 markers <image> for 1 image"), ([], "2 markers <image> for 0 images")):
        with pytest.raises(BadInput, match=word):
            list(chat.say("<image> <image>", pictures))
    assert session.position == before


# Chat templates of other forms

LOOP = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ CONTENT }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}"
)
PLAIN = "{{ bos_token }}" + LOOP.replace("CONTENT", "m.content")
TRIMMING = LOOP.replace("CONTENT", "m.content | trim")
# Shows no more than the last two messages, without the model's thoughts.
FORGETFUL = LOOP.replace("in messages", "in messages[-2:]").replace("CONTENT", "m.content.split('|')[-1]")
REFUSING = PLAIN + "{% if messages[-1].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"


def form(template: str) -> TemplateFormat:
    return TemplateFormat(template, {"bos_token": "<bos>"})


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


@pytest.mark.parametrize("template", [PLAIN, TRIMMING])
def test_a_template_that_keeps_earlier_turns_is_fed_what_is_new(tokenizer: Tokenizer, template: str) -> None:
    session = reciting(tokenizer, ["fine, you?", " good ", "ok"])
    chat = conversation(session, tokenizer, chat=form(template))
    assert "".join(chat.say("hello")) == "fine, you?"
    before = list(session.fed)
    assert "".join(chat.say("well too")) == " good "
    assert session.fed[: len(before)] == before
    whole = form(template).encode(tokenizer, turns("hello", "fine, you?", "well too"))
    assert session.fed[: len(whole)] == whole
    before = list(session.fed)  # the model's own words stay, though the template trims them
    assert "".join(chat.say("bye")) == "ok"
    assert session.fed[: len(before)] == before


def test_a_template_that_rewrites_earlier_turns_is_fed_anew(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["hm|fine", "x"])
    chat = conversation(session, tokenizer, chat=form(FORGETFUL))
    assert "".join(chat.say("hello")) == "hm|fine"
    expected = form(FORGETFUL).encode(tokenizer, turns("hello", "hm|fine", "well"))
    new = chat.turn_ids("well")
    assert new == expected[-len(new) :]
    list(chat.say("well"))
    assert session.fed[: len(expected)] == expected
    assert form(FORGETFUL).encode(tokenizer, turns("hello", "fine", "well")) == expected  # without the thoughts


def test_a_conversation_that_the_template_refuses_is_unchanged(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["fine", "good"])
    chat = conversation(session, tokenizer, chat=form(REFUSING))
    list(chat.say("hello"))
    fed, turn = list(session.fed), chat.turn_ids("x")
    with pytest.raises(BadInput, match="not that"):
        list(chat.say("no"))
    assert session.fed == fed
    assert chat.turn_ids("x") == turn


def test_a_rewritten_conversation_without_room_is_unchanged(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["hm|a", "b"], context=48)
    chat = conversation(session, tokenizer, chat=form(FORGETFUL))
    list(chat.say("hi"))
    fed, turn = list(session.fed), chat.turn_ids("x")
    with pytest.raises(DoesNotFit, match="context of 48"):
        list(chat.say("far too long a question for what is left" * 3))
    assert session.fed == fed
    assert chat.turn_ids("x") == turn


def test_images_of_earlier_turns_are_fed_again_when_the_template_rewrites_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(made_up_tokenizer(VOCABULARY, IMAGE_PIECES))
    tokenizer = Tokenizer(tmp_path)
    session = reciting(tokenizer, ["a|b", "good"])
    session.vision = parse_config(SEEING_CONFIG).vision
    template = PLAIN.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content.split('|')[-1] }}{% else %}"
        "{% for p in m.content %}{{ p.text if p.type == 'text' else '<start_of_image>' }}{% endfor %}{% endif %}",
    )
    picture = Picture((np.zeros((28, 28, 3), np.uint8),))
    chat = conversation(session, tokenizer, chat=form(template))
    list(chat.say("what is it", [picture]))
    assert "".join(chat.say("and <image>", [picture])) == "good"
    messages: list[Message] = [
        {"role": "user", "content": [Image(), "what is it"]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": ["and ", Image(), ""]},
    ]
    whole = form(template).encode(tokenizer, messages, tokens_per_image=4)
    assert session.fed[: len(whole)] == whole


# What the caches keep


def test_a_session_that_can_go_back_keeps_the_beginning_that_did_not_change(tokenizer: Tokenizer) -> None:
    session = forgetting(reciting(tokenizer, ["hm|fine", "x"]))
    template = form(PLAIN.replace("m.content", "m.content.split('|')[-1]"))  # without the model's thoughts
    chat = conversation(session, tokenizer, chat=template)
    list(chat.say("hello there"))
    before, count = list(session.fed), session.count
    whole = template.encode(tokenizer, turns("hello there", "hm|fine", "well"))
    same = next(index for index, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other)
    assert same > 10
    assert chat.turn_ids("well") == whole[same:]
    list(chat.say("well"))
    assert session.fed[: len(whole)] == whole
    assert session.count - count == len(whole) - same + 1  # and the answer's one token


def test_a_session_that_cannot_go_back_so_far_begins_again(tokenizer: Tokenizer) -> None:
    session = forgetting(reciting(tokenizer, ["hm|fine", "x"]))
    template = form(PLAIN.replace("m.content", "m.content.split('|')[-1]"))
    chat = conversation(session, tokenizer, chat=template)
    list(chat.say("hello there"))
    session.reach = 3
    whole = template.encode(tokenizer, turns("hello there", "hm|fine", "well"))
    assert chat.turn_ids("well") == whole
    list(chat.say("well"))
    assert session.fed[: len(whole)] == whole


@pytest.mark.parametrize("goes_back", [False, True])
def test_a_session_that_was_fed_by_someone_else_begins_again(tokenizer: Tokenizer, goes_back: bool) -> None:
    session = reciting(tokenizer, ["fine", "good"])
    if goes_back:
        session = forgetting(session)
    chat = conversation(session, tokenizer)
    list(chat.say("hello"))
    session.prefill([7, 8])
    list(chat.say("well"))
    whole = encode_chat(tokenizer, turns("hello", "fine", "well"))
    assert session.fed[: len(whole)] == whole


def test_a_full_context_ends_the_answer_and_then_the_chat(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["a long answer that goes on and on", "b"], context=24)
    chat = conversation(session, tokenizer)
    heard = "".join(chat.say("hi"))
    assert chat.reason == "context"
    assert session.position == 24
    assert heard
    assert "a long answer that goes on and on".startswith(heard)
    fed = list(session.fed)
    with pytest.raises(DoesNotFit, match="after position 24 are over the context of 24"):
        list(chat.say("more"))
    assert session.fed == fed
    chat.reset()
    assert session.position == 0


def test_a_picture_that_was_exchanged_is_fed_again(tmp_path: Path) -> None:
    """The ids are the same, so only the pixels tell."""
    (tmp_path / "tokenizer.model").write_bytes(made_up_tokenizer(VOCABULARY, IMAGE_PIECES))
    tokenizer = Tokenizer(tmp_path)
    session = forgetting(reciting(tokenizer, ["fine", "good"]))
    session.vision = parse_config(SEEING_CONFIG).vision
    dark, light = (Picture((np.full((28, 28, 3), shade, np.uint8),)) for shade in (0, 255))
    chat = conversation(session, tokenizer)
    list(chat.say("see <image>", [dark]))
    new = chat.turn_ids("more")
    chat._pictures = [light]  # as if the conversation had been changed
    anew = chat.turn_ids("more")
    assert 639 not in new
    assert anew[:4] == [639] * 4  # the picture, whole
    assert anew[-len(new) :] == new


# A system text


def test_a_system_text_begins_every_chat(tokenizer: Tokenizer) -> None:
    session = reciting(tokenizer, ["fine", "good"])
    chat = conversation(session, tokenizer, prefix=Prefix("Be kind."))
    messages: list[Message] = [{"role": "system", "content": "Be kind."}, *turns("hello")]
    for _ in range(2):
        assert "".join(chat.say("hello")) == "fine"
        whole = encode_chat(tokenizer, messages)
        assert session.fed[: len(whole)] == whole
        chat.reset()
        assert session.position == 0


@pytest.mark.parametrize("words", ["hello", "9 lives", "'tis", "(a)", "\n\n x", "éa", "<end_of_turn>", "日本"])
def test_a_prefix_is_what_every_first_turn_begins_with(tokenizer: Tokenizer, words: str) -> None:
    ids = prefix_ids(Prefix("Be kind."), tokenizer, GEMMA, None)
    whole = encode_chat(tokenizer, [{"role": "system", "content": "Be kind."}, *turns(words)])
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(ids).endswith("Be kind.\n\n")


def test_templates_without_a_prefix(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="begins with the user's words"):
        prefix_ids(NO_PREFIX, tokenizer, form("{{ messages[-1].content }}"), None)
