"""The tokenizer's files of a bundle: one tokenizer, in the forms that programs read.

    tokenizer.model          has every token; ExecuTorch's runners and this project read it, and nothing else
    tokenizer.json, tokenizer_config.json     the same, for onnxruntime-genai and transformers
    chat_template.jinja       the chat template in use, for stock runners

tokenizer.json is written anew from the model, and not copied: stock runners read runs of spaces in the released one in
another way than the model was trained with.
"""

import json
import logging
from pathlib import Path

from gemma3.added_tokens import CONFIG
from gemma3.chat import CHAT_TEMPLATE
from gemma3.errors import BadInput
from gemma3.host.files import read_optional
from gemma3.tokenizer import Tokenizer
from gemma3.tokenizer_files import MODEL, parse_model
from gemma3.tokenizer_json import AGAIN, JSON
from gemma3.write_tokenizer_json import as_tokenizer_json

log = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"

# For a checkpoint without a tokenizer_config.json.
DEFAULT_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
    "clean_up_tokenization_spaces": False,
}


def write_tokenizer(tokenizer: Tokenizer, checkpoint: Path, directory: Path, template: str | None) -> None:
    """Write the tokenizer of the checkpoint in the directory ``checkpoint`` into ``directory``.

    ``template`` is the chat template, if it is not Gemma's. tokenizer.json is read back and compared with the model.
    One that is not equal is left out, with a warning.
    """
    (directory / MODEL).write_bytes(tokenizer.model)
    text = as_tokenizer_json(parse_model(tokenizer.model, tokenizer.path))
    (directory / JSON).write_text(text, encoding="utf-8")
    try:
        Tokenizer(directory)
    except BadInput as error:
        (directory / JSON).unlink()
        log.warning("the bundle has no %s, which onnxruntime-genai needs: %s", JSON, error)
    config = read_optional(checkpoint / CONFIG, AGAIN) or DEFAULT_CONFIG
    # added_tokens_decoder would list the added tokens once more, those included that the model has no rows for.
    # Templates go to a file of their own: a checkpoint may have others than the one in use.
    config = {key: value for key, value in config.items() if key not in ("added_tokens_decoder", "chat_template")}
    (directory / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (directory / TEMPLATE_FILE).write_text(CHAT_TEMPLATE if template is None else template, encoding="utf-8")
