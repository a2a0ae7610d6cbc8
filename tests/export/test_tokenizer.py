"""The tokenizer files of a bundle, read by every program that may read them."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from pytorch_tokenizers import pytorch_tokenizers_cpp as executorch_tokenizers

import gemma3
from export.tokenizer import write_tokenizer
from gemma3.chat import CHAT_TEMPLATE
from gemma3.tokenizer import Tokenizer
from gemma3.tokenizer_files import PROBES
from tests.gemma3.test_tokenizer_files import WORDS, saved

DEMO = Path(gemma3.__file__).parent / "demo"
MARKER = "<|im_start|>"
# ExecuTorch's reader of tokenizer.json takes the name of a byte for the byte.
TEXTS = tuple(text for text in (*PROBES, " ".join(WORDS), "a".join(WORDS)) if MARKER not in text and "<0x" not in text)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tokenizer with words and a special token added, of a checkpoint that has only tokenizer.json."""

    def change(tokenizer: Any) -> None:
        tokenizer.add_tokens(WORDS)
        tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})

    checkpoint, directory = saved(tmp_path_factory.mktemp("checkpoint"), change), tmp_path_factory.mktemp("bundle")
    write_tokenizer(Tokenizer(checkpoint), checkpoint, directory, None)
    return directory


def test_the_model_alone_is_the_tokenizer(bundle: Path) -> None:
    ours = Tokenizer(bundle / "tokenizer.model")
    assert ours.special[MARKER] == 4096 + len(WORDS)
    assert Tokenizer(bundle).model == ours.model


def test_transformers_reads_the_same(bundle: Path) -> None:
    ours, oracle = Tokenizer(bundle / "tokenizer.model"), transformers.AutoTokenizer.from_pretrained(bundle)
    for text in TEXTS:
        ids = oracle.encode(text, add_special_tokens=False)
        assert (ids, oracle.decode(ids)) == (ours.encode(text, bos=False), ours.decode(ids))
    assert oracle.encode("x")[0] == ours.bos_id
    assert oracle.convert_tokens_to_ids(MARKER) == ours.special[MARKER]


def test_executorch_reads_the_same(bundle: Path) -> None:
    ours = Tokenizer(bundle / "tokenizer.model")
    by_json, by_model = executorch_tokenizers.HFTokenizer(), executorch_tokenizers.SPTokenizer()
    by_json.load(str(bundle / "tokenizer.json"))
    by_model.load(str(bundle / "tokenizer.model"))
    for text in TEXTS:
        ids = ours.encode(text, bos=False)
        assert by_json.encode(text, 0, 0) == by_model.encode(text, 0, 0) == ids, text
        assert by_json.decode_batch(ids) == ours.decode(ids)
    assert by_json.vocab_size() == by_model.vocab_size() == ours.vocab_size


def test_a_checkpoint_without_json_files_gets_both(tmp_path: Path) -> None:
    write_tokenizer(Tokenizer(DEMO / "tokenizer.model"), tmp_path / "none", tmp_path, None)
    assert (tmp_path / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(tmp_path / "tokenizer.model")
    for text in TEXTS:
        assert oracle.encode(text) == ours.encode(text, bos=True)


def test_the_list_of_added_tokens_is_not_copied(tmp_path: Path) -> None:
    """It may list tokens that the model has no rows for."""
    write_tokenizer(Tokenizer(DEMO), DEMO, tmp_path, None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    original = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))
    dropped = ("added_tokens_decoder", "chat_template")
    assert config == {key: value for key, value in original.items() if key not in dropped}
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
