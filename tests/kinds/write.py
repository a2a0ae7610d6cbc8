"""Write a checkpoint of a kind."""

from pathlib import Path

import transformers
from transformers import AutoTokenizer

from tests.kinds.kind import Kind
from tests.kinds.spelling import respell, write_generation, write_processor
from tests.kinds.tokens import PROBE, write_tokenizer
from tests.kinds.weights import DTYPES, build, rewrite

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def write(kind: Kind, directory: Path) -> Path:
    """A checkpoint of ``kind`` at the new ``directory``. Every file that transformers can write is written by it."""
    model = build(kind)
    model.to(DTYPES[kind.dtype]).save_pretrained(directory)
    write_tokenizer(kind, directory)
    if kind.generation == "more stops":
        ids = AutoTokenizer.from_pretrained(directory)(PROBE, return_tensors="pt").input_ids
        said = build(kind).generate(ids, max_new_tokens=3, do_sample=False)
        write_generation(kind, directory, stop=int(said[0, -1]))
    else:
        write_generation(kind, directory, stop=-1)
    if kind.model == "seeing":
        write_processor(kind, directory)
    respell(kind, directory)
    rewrite(kind, directory)
    return directory
