"""Train the text-only demo checkpoint from scratch: corpus, vocabulary, network, figures.

    python -m scripts.train_demo --out gemma3/demo

It takes about 36 minutes on two CPU threads. The seed and the Python version determine the corpus, the split and the
vocabulary; the weights also depend on the machine's floating-point arithmetic. Muon trains the hidden matrices, AdamW
everything else.
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor, nn

from gemma3.chat import Message, encode_chat
from gemma3.config import parse_config
from gemma3.model import Gemma3
from gemma3.tokenizer import END_OF_IMAGE, END_OF_TURN, IMAGE_SOFT_TOKEN, START_OF_IMAGE, START_OF_TURN, Tokenizer
from scripts import demo_corpus

# Generated code creates the module's classes when it is imported, so a type checker does not know them.
protobuf: Any = sentencepiece_model_pb2

VOCABULARY = 4096
TURN_MARKERS = (START_OF_TURN, END_OF_TURN)
IMAGE_MARKERS = (START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN)
# Runs of newlines and spaces are pieces of their own, as in Gemma's vocabulary.
RUNS = [*("\n" * n for n in range(1, 9)), *("▁" * n for n in range(2, 25))]
NOT_STRIPPED = {"lstrip": False, "rstrip": False, "single_word": False}
IGNORE = -100  # targets with this value do not count in cross_entropy

# Gives the same text as the released template for messages whose content is text or a list of text and image parts.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set turns = namespace(prefix='', messages=messages) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set content = messages[0]['content'] -%}
    {%- set turns.prefix = (content if content is string else content[0]['text']) + '\\n\\n' -%}
    {%- set turns.messages = messages[1:] -%}
{%- endif -%}
{%- for message in turns.messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- turns.prefix if loop.first else '' -}}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def train_vocabulary(documents: list[str], path: Path, seed: int, vocabulary: int = VOCABULARY) -> None:
    """A SentencePiece model in Gemma's format: BPE, split digits, byte fallback, text kept as it is."""
    chats = demo_corpus.Conversations(seed)
    lines = [message["content"] for _ in range(20_000) for message in next(chats)]
    sample = random.Random(seed).sample(documents, len(documents) // 2)
    lines += [line for text in sample for line in text.splitlines() if line.strip()]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocabulary,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            required_chars="",
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            user_defined_symbols=["<mask>", *TURN_MARKERS, *IMAGE_MARKERS, *RUNS],
            num_threads=1,
            minloglevel=2,
        )


def released_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of ``config.json``, with the keys of the released files."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, tokenizer.end_of_turn_id],
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 1024,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 12,
        "num_key_value_heads": 1,
        "pad_token_id": tokenizer.pad_id,
        "query_pre_attn_scalar": 32,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 64,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_side_files(out: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write every file of the checkpoint except the weights. Returns the configuration."""
    config = released_config(tokenizer)
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False},
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    images = {"boi_token": START_OF_IMAGE, "eoi_token": END_OF_IMAGE, "image_token": IMAGE_SOFT_TOKEN}
    write_json(out / "special_tokens_map.json", names | images)
    special = {tokenizer.special_id(name): name for name in (*names.values(), "<mask>", *TURN_MARKERS, *IMAGE_MARKERS)}
    runs = {tokenizer.encode(run.replace("▁", " "), bos=False)[0]: run for run in RUNS}
    # The tokenizer finds runs of spaces after it has replaced spaces by "▁", so only these are marked as normalized.
    added = {
        str(i): {"content": name, "normalized": i in runs, "special": i in special, **NOT_STRIPPED}
        for i, name in sorted((special | runs).items())
    }
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            **names,
            **images,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "use_default_system_prompt": False,
        },
    )
    return config


def write_fast_tokenizer(out: Path) -> None:
    """Write ``tokenizer.json``, for runners that read nothing else: the same pieces, merged in order of their scores.

    Like every Hugging Face tokenizer, it recognizes special tokens in a text.
    """
    proto = protobuf.ModelProto.FromString((out / "tokenizer.model").read_bytes())
    kinds = proto.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    halves = (
        (piece[:cut], piece[cut:]) for piece in sorted(normal, key=lambda p: -normal[p]) for cut in range(1, len(piece))
    )
    merges = [(left, right) for left, right in halves if left in normal and right in normal]
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    fast.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    # Control and user-defined pieces. The tokenizer finds runs of spaces after it has replaced spaces by "▁".
    fast.add_tokens(
        [
            tokenizers.AddedToken(piece.piece, special=piece.piece not in RUNS, normalized=piece.piece in RUNS)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
        ]
    )
    fast.save(str(out / "tokenizer.json"))


def write_weights(model: Gemma3, out: Path) -> None:
    """Write the weights in bfloat16 under the checkpoint's names. A tied head is stored once, as the embedding."""
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    part = out / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    os.replace(part, out / "model.safetensors")


def chat_sample(
    tokenizer: Tokenizer, messages: list[Message], tokens_per_image: int | None = None
) -> tuple[list[int], list[int]]:
    """(ids, targets). A target is the next id where the model speaks, <end_of_turn> included, and IGNORE elsewhere."""
    ids = encode_chat(tokenizer, messages, add_generation_prompt=False, tokens_per_image=tokens_per_image)
    start, end = tokenizer.special_id(START_OF_TURN), tokenizer.end_of_turn_id
    header = [start, *tokenizer.encode("model\n", bos=False)]
    targets = [IGNORE] * len(ids)
    for index in range(len(ids) - len(header)):
        if ids[index : index + len(header)] == header:
            first = index + len(header)
            last = ids.index(end, first)
            targets[first - 1 : last] = ids[first : last + 1]
    return ids, targets


def chat_rows(tokenizer: Tokenizer, seed: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of ``length`` tokens, filled with whole conversations and padded on the right."""
    ids: list[int] = []
    targets: list[int] = []
    for messages in demo_corpus.Conversations(seed):
        more_ids, more_targets = chat_sample(tokenizer, messages)
        if len(more_ids) > length:
            continue
        if len(ids) + len(more_ids) > length:
            gap = length - len(ids)
            yield ids + [tokenizer.pad_id] * gap, targets + [IGNORE] * gap
            ids, targets = [], []
        ids, targets = ids + more_ids, targets + more_targets


def text_rows(tokens: Tensor, bos: int, seed: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of ``length`` tokens from random places in the text, with BOS in front."""
    rng = random.Random(seed)
    while True:
        start = rng.randrange(len(tokens) - length)
        ids: list[int] = tokens[start : start + length].tolist()
        yield [bos, *ids[:-1]], ids


def batch_loss(model: Gemma3, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    tokens, targets = (torch.tensor(part) for part in zip(*rows, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def exact_match(
    model: Gemma3, tokenizer: Tokenizer, questions: list[demo_corpus.Question], max_new: int = 32
) -> dict[str, tuple[int, int]]:
    """category → (correct, asked) for greedy answers. All questions are one batch.

    Rows are padded on the right, where causal attention never looks, and grow by one id in every forward pass.
    """
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question.prompt}]) for question in questions]
    lengths = torch.tensor([len(ids) for ids in prompts])
    tokens = torch.full((len(prompts), int(lengths.max()) + max_new), tokenizer.pad_id)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    rows = torch.arange(len(prompts))
    for done in range(max_new):
        logits = model(tokens[:, : int(lengths.max()) + done])
        tokens[rows, lengths + done] = logits[rows, lengths + done - 1].argmax(-1)
    score: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row, question in enumerate(questions):
        answer = tokens[row, lengths[row] : lengths[row] + max_new].tolist()
        stop = answer.index(tokenizer.end_of_turn_id) if tokenizer.end_of_turn_id in answer else len(answer)
        right, asked = score[question.category]
        score[question.category] = (right + (tokenizer.decode(answer[:stop]) == question.answer), asked + 1)
    return dict(score)


@torch.no_grad()
def perplexity(model: Gemma3, ids: list[int], bos: int) -> float:
    """exp of the mean loss per token of ``ids``, in pieces of the full context with BOS in front of each."""
    length = model.config.max_position_embeddings - 1
    total = 0.0
    for start in range(0, len(ids), length):
        piece = torch.tensor([bos, *ids[start : start + length]])
        logits = model(piece[None, :-1])[0]
        total += float(F.cross_entropy(logits, piece[1:], reduction="sum"))
    return math.exp(total / len(ids))


def optimizers(model: Gemma3) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=5e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def initialize(model: Gemma3) -> None:
    """Give activations unit variance: matrices get the standard deviation 1/√inputs, and norms stay at identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)


def learning_rate(step: int, steps: int) -> float:
    """The factor on the learning rate: warm-up over 50 steps, times half a cosine that falls to zero."""
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def advance(opts: list[torch.optim.Optimizer], schedules: list[torch.optim.lr_scheduler.LambdaLR]) -> None:
    """One step of every optimizer and schedule; then clear the gradients."""
    for optimizer, schedule in zip(opts, schedules, strict=True):
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def as_tokens(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """int64 [N]: the tokens of all documents one after another, with EOS after each document."""
    return torch.tensor([i for doc in documents for i in (*tokenizer.encode(doc, bos=False), tokenizer.eos_id)])


def train(model: Gemma3, tokenizer: Tokenizer, documents: list[str], steps: int, seed: int, out: Path) -> None:
    """A step takes 1024 tokens of conversations and 512 of text; every fourth one takes 1024 of each in one row."""
    text = as_tokens(tokenizer, documents)
    print(f"text: {len(text)} tokens", flush=True)
    chats = {length: chat_rows(tokenizer, seed + length, length) for length in (256, 1024)}
    texts = {length: text_rows(text, tokenizer.bos_id, seed + length, length) for length in (512, 1024)}
    opts = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda s: learning_rate(s, steps)) for opt in opts]
    began, smooth = time.time(), {"chat": 0.0, "text": 0.0}
    seen = 0
    for step in range(steps):
        long = step % 4 == 3
        chat = [next(chats[1024 if long else 256]) for _ in range(1 if long else 4)]
        prose = [next(texts[1024 if long else 512])]
        for kind, rows, weight in (("chat", chat, 1.0), ("text", prose, 0.5)):
            loss = batch_loss(model, rows)
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            smooth[kind] += 0.05 * (loss.item() - smooth[kind])
            seen += sum(len(ids) for ids, _ in rows)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        advance(opts, schedules)
        if (step + 1) % 20 == 0:
            rate = seen / (time.time() - began)
            print(f"{step + 1} chat {smooth['chat']:.3f} text {smooth['text']:.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 400 == 0:  # so that an interrupted run leaves its latest weights
            write_weights(model, out)
            print(exact_match(model, tokenizer, demo_corpus.evaluation_questions(150)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    began = time.time()

    documents, held_out_text = demo_corpus.split_text()
    questions = demo_corpus.evaluation_questions()
    (args.out / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    lines = [json.dumps({k: v for k, v in asdict(q).items() if k != "key"}, ensure_ascii=False) for q in questions]
    (args.out / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train_vocabulary(documents, args.out / "tokenizer.model", args.seed)
    tokenizer = Tokenizer(args.out)
    config = write_side_files(args.out, tokenizer)
    write_fast_tokenizer(args.out)

    model = Gemma3(parse_config(config))
    initialize(model)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, tokenizer, documents, args.steps, args.seed, args.out)
    with torch.no_grad():  # the figures belong to the weights as they are stored
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    write_weights(model, args.out)

    score = exact_match(model, tokenizer, questions)
    held_out_ids = tokenizer.encode(held_out_text, bos=False)
    figures = {
        "minutes": round((time.time() - began) / 60, 1),
        "heldout_tokens": len(held_out_ids),
        "heldout_perplexity": round(perplexity(model, held_out_ids, tokenizer.bos_id), 2),
        "exact_match": {category: f"{right}/{asked}" for category, (right, asked) in score.items()},
        "exact_match_all": round(sum(r for r, _ in score.values()) / len(questions), 4),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
