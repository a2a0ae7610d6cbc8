"""The tokenizer's files of a bundle: one tokenizer, in the forms that programs read.

    tokenizer.model          has every token; ExecuTorch's runners and this project read it, and nothing else
    tokenizer.json, tokenizer_config.json     the same, for onnxruntime-genai and transformers
    chat_template.jinja       copied, if the checkpoint has it, for stock runners

tokenizer.json is written anew from the model, and not copied: stock runners read runs of spaces in the released one in
another way than the model was trained with.
"""

import json
import logging
import shutil
from pathlib import Path

from gemma3.added_tokens import CONFIG
from gemma3.errors import BadInput
from gemma3.host.files import read_optional
from gemma3.tokenizer import Tokenizer
from gemma3.tokenizer_files import MODEL, parse_model
from gemma3.tokenizer_json import AGAIN, JSON
from gemma3.write_tokenizer_json import as_tokenizer_json

log = logging.getLogger(__name__)

CHAT_TEMPLATE = "chat_template.jinja"

# For a checkpoint without a tokenizer_config.json.
DEFAULT_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
    "clean_up_tokenization_spaces": False,
}


def write_tokenizer(tokenizer: Tokenizer, checkpoint: Path, directory: Path) -> None:
    """Write the tokenizer of the checkpoint in the directory ``checkpoint`` into ``directory``.

    tokenizer.json is read back and compared with the model. One that is not equal is left out, with a warning.
    """
    (directory / MODEL).write_bytes(tokenizer.model)
    text = as_tokenizer_json(parse_model(tokenizer.model, tokenizer.path))
    (directory / JSON).write_text(text, encoding="utf-8")
    try:
        Tokenizer(directory)
    except BadInput as error:
        (directory / JSON).unlink()
        log.warning("the bundle has no %s, which onnxruntime-genai needs: %s", JSON, error)
    path = checkpoint / CONFIG
    config = read_optional(path, AGAIN) or DEFAULT_CONFIG
    # It would list the added tokens once more, those included that the model has no rows for.
    config = {key: value for key, value in config.items() if key != "added_tokens_decoder"}
    (directory / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if (checkpoint / CHAT_TEMPLATE).is_file():
        shutil.copyfile(checkpoint / CHAT_TEMPLATE, directory / CHAT_TEMPLATE)
