"""A SentencePiece model as ``tokenizer.json``, the file of Hugging Face's tokenizers library.

As in the released file, merges list for each piece of ordinary text all the ways to make it of two others, the best
scores first, and user-defined and control pieces are added tokens. Runs of spaces are not among these here: merges make
them, the longest first. Of an added run ExecuTorch's reader splits the text, and onnxruntime-genai prints the ▁.
"""

import json
from typing import Any

from gemma3.pieces import SPACE, SPECIAL_PIECES
from gemma3.tokenizer_json import DECODER, REPLACE_SPACES, SPLIT_AT_SPACES


def as_tokenizer_json(model: Any) -> str:
    """The text of the ``tokenizer.json`` with the pieces of the SentencePiece model ``model``. It puts BOS in front."""
    kind = model.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    spaces = {piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED and not piece.piece.strip(SPACE)}
    runs = [pair for run in spaces for pair in _halves(run, spaces | {SPACE})]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kind.NORMAL}
    merges = sorted(runs, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    for piece in sorted(scores, key=lambda piece: -scores[piece]):  # those of the same score stay in order
        merges += _halves(piece, scores)
    added = [
        {
            "id": i,
            "content": piece.piece.replace(SPACE, " "),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type != kind.USER_DEFINED or piece.piece in SPECIAL_PIECES,
        }
        for i, piece in enumerate(model.pieces)
        if piece.type in (kind.CONTROL, kind.UNKNOWN, kind.USER_DEFINED) and piece.piece not in spaces
    ]
    for token in added:
        ids[token["content"]] = ids.pop(token["content"].replace(" ", SPACE))
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": REPLACE_SPACES,
            "pre_tokenizer": SPLIT_AT_SPACES,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, first],
                "pair": [bos, first, second],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [ids["<bos>"]], "tokens": ["<bos>"]}},
            },
            "decoder": {"type": "Sequence", "decoders": DECODER},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )


def _halves(piece: str, pieces: Any) -> list[tuple[str, str]]:
    """All ways to cut ``piece`` into two of ``pieces``, the longest left half first."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in pieces and right in pieces]
