"""Measures what guessing ahead gains: on texts that repeat themselves or not, and what a call of several tokens costs.

    python -m scripts.bench_speculation BUNDLE --format onnx --threads 1

The texts are given: every step gets the next token of the text, whatever the model would say. So plain and guessing
sessions do the same work, a guess is right when it is what the text goes on with, and the weights may be random ones.
Plain and guessing runs take turns. Texts, after a prompt of the first text's tokens:

    copy      the prompt again, word for word
    edited    the prompt again, with every tenth word replaced
    json      a list of records, after the first of them
    new       text that goes on where the prompt ends

With --exactness it instead compares the logits of calls of several tokens with those of single steps, over a text of
many tokens: how often the most likely token differs, and how close to each other its two candidates were.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from export.manifest import read_manifest
from gemma3.checkpoint import resolve_checkpoint
from gemma3.tokenizer import Tokenizer
from runtime_py.backends import backend_of, open_graph
from runtime_py.drafters import PromptLookup
from runtime_py.generate import Sampler, generate
from runtime_py.report import table
from runtime_py.sessions.protocol import Logits, Rewindable, Session
from runtime_py.sessions.speculative import SpeculativeSession

DEMO = resolve_checkpoint("demo")
WORDS = ["window", "buffer", "cache", "token", "layer", "scale", "state", "image"]


def texts(prompt: int, new: int) -> dict[str, tuple[list[int], list[int]]]:
    """For each kind of text, the ids of a prompt and of what follows it, in the demo's vocabulary."""
    tokenizer = Tokenizer(DEMO)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False)

    held_out = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = encode(held_out[: 40 * (prompt + new)])
    first = ids[:prompt]
    words = tokenizer.decode(first).split(" ")
    edited = " ".join(WORDS[place // 10 % 8] if place % 10 == 9 else word for place, word in enumerate(words))
    records = [
        {
            "id": place,
            "name": f"{word} {place * 7 % 90}",
            "tags": [word, "small"],
            "size": {"width": place, "height": 2},
        }
        for place, word in zip(range(400), cycle(WORDS), strict=False)
    ]
    listed = encode(json.dumps(records, indent=1))
    return {
        "copy": (first, (first * 9)[:new]),
        "edited": (first, encode(edited)[:new]),
        "json": (listed[:prompt], listed[prompt : prompt + new]),
        "new": (first, ids[prompt : prompt + new]),
    }


def reset(session: Rewindable) -> Rewindable:
    session.reset()
    return session


def seconds(session: Session, prompt: Sequence[int], text: Sequence[int]) -> float:
    """What it takes to step through ``text`` after ``prompt``."""
    session.reset()
    session.prefill(prompt)
    start = time.perf_counter()
    for token in text:
        session.step(token)
    return time.perf_counter() - start


def costs(session: Rewindable, prompt: Sequence[int], repetitions: int) -> dict[int, float]:
    """Milliseconds of a call by its number of tokens, all of whose logits it gives."""
    session.reset()
    session.prefill(prompt)
    position = session.position
    times: dict[int, list[float]] = {count: [] for count in range(1, session.most_logits + 1)}
    for _ in range(repetitions):
        for count, found in times.items():
            while not session.can_rewind(position + count, position):  # past the next eviction
                session.step(0)
                position += 1
            start = time.perf_counter()
            session.verify(list(prompt[:count]))
            found.append(1000 * (time.perf_counter() - start))
            session.rewind(position)
    return {count: statistics.median(found) for count, found in times.items()}


# What a walk is called, the lengths of its calls, in turn, and the length of those whose logits are compared.
CALLS = [(str(length), (length,), length) for length in (2, 3, 4, 8)] + [("1, after calls of 3", (3, 1), 1)]


def count_from(pieces: Sequence[Sequence[int]]) -> list[int]:
    """The place of each piece's first id."""
    return [sum(map(len, pieces[:index])) for index in range(len(pieces))]


def exactness(open_one: Callable[[], Rewindable], count: int) -> str:
    """A table of how the most likely token of calls of several tokens differs from that of single steps."""
    ids = Tokenizer(DEMO).encode((DEMO / "heldout.txt").read_text(encoding="utf-8"), bos=False)[:count]
    single = open_one()
    pieces = [ids[start : start + single.context] for start in range(0, len(ids), single.context)]
    steps = []
    for piece in pieces:
        single.reset()
        steps += [single.step(token) for token in piece]
    expected = np.stack(steps)
    top = np.sort(np.partition(expected, -2)[:, -2:])
    margins, best = top[:, 1] - top[:, 0], expected.argmax(-1)
    rows = []
    for name, lengths, compared in CALLS:
        session = open_one()
        several: list[Logits] = []
        places: list[int] = []
        for first, piece in zip(count_from(pieces), pieces, strict=True):
            session.reset()
            start = 0
            for length in cycle(lengths):
                if start >= len(piece):
                    break
                found = session.verify(piece[start : start + length])
                if length == compared:
                    several += list(found)
                    places += range(first + start, first + start + len(found))
                start += length
        other = np.stack(several).argmax(-1) != best[places]
        change = np.abs(np.stack(several) - expected[places]).max(-1)
        largest = margins[places][other].max(initial=0)
        rows.append(
            (
                name,
                f"{other.sum()} of {len(places)}",
                f"{largest:.3f}",
                f"{(margins < largest).mean():.1%}",
                f"{np.median(change):.3g}",
                f"{change.max():.3g}",
            )
        )
    header = ("tokens in a call", "other top token", "largest margin of these", "below it", "median |Δlogit|", "max")
    spread = f"standard deviation of the logits {expected.std():.2f}, median margin {np.median(margins):.2f}"
    return f"{table(header, rows)}\n\n{spread}\n\n{greedy(single, open_one(), ids)}"


def greedy(plain: Rewindable, other: Rewindable, ids: Sequence[int], new: int = 64) -> str:
    """How many greedy continuations are the same with lookup, for prompts that begin throughout ``ids``.

    Beside that, how many are the same without lookup when the prompt was fed one by one instead of in chunks.
    """
    prompts = [list(ids[start : start + 96]) for start in range(0, len(ids) - 96, 96)]
    lines = []
    for name in ("with lookup", "prompt one by one"):
        same = before = 0
        for prompt in prompts:
            plain.reset()
            expected = list(generate(plain, prompt, Sampler(), stop_ids=(), max_new_tokens=new))
            session = (
                SpeculativeSession(reset(other), PromptLookup(), (0.0, 0.2)) if name == "with lookup" else reset(other)
            )
            for token in prompt[:-1] if session is other else ():
                session.step(token)
            fed = prompt[session.position :]
            found = list(generate(session, fed, Sampler(), stop_ids=(), max_new_tokens=new))
            agreeing = [one == two for one, two in zip(expected, found, strict=True)]
            same += all(agreeing)
            before += [*agreeing, False].index(False)
        lines.append(
            f"greedy, {name}: {same} of {len(prompts)} texts of {new} tokens are the same, "
            f"{before} of {new * len(prompts)} tokens before a change"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--format", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=384, help="tokens")
    parser.add_argument("--new", type=int, default=256, help="tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--exactness", type=int, metavar="TOKENS")
    options = parser.parse_args()
    manifest, backend = read_manifest(options.bundle), backend_of(options.format)

    def open_one() -> Rewindable:
        session = open_graph(options.bundle, manifest, backend, options.threads)
        assert isinstance(session, Rewindable)
        return session

    if options.exactness:
        print(exactness(open_one, options.exactness))
        return
    plain = open_one()
    some, _ = texts(options.prompt, options.new)["new"]
    measured = costs(plain, some, 5 * options.repetitions)
    print(", ".join(f"{count}: {time / measured[1]:.2f}" for count, time in measured.items()))
    print(f"(calls of so many tokens, all logits, as multiples of {measured[1]:.1f} ms)\n")
    rows = []
    for name, (prompt, text) in texts(options.prompt, options.new).items():
        times: dict[str, list[float]] = {"plain": [], "lookup": []}
        for _ in range(options.repetitions):
            # A new one, which has learned nothing yet; over the same graph.
            guessing = SpeculativeSession(reset(plain), PromptLookup(), backend.extra_cost)
            times["plain"].append(seconds(plain, prompt, text))
            times["lookup"].append(seconds(guessing, prompt, text))
        counts = guessing.counts
        ratios = [one / other for one, other in zip(times["plain"], times["lookup"], strict=True)]
        rows.append(
            (
                name,
                f"{len(text) / statistics.median(times['plain']):.1f}",
                f"{len(text) / statistics.median(times['lookup']):.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{counts.accepted} of {counts.drafted}",
                f"{counts.steps / counts.calls:.2f}",
            )
        )
    print(table(("text", "plain, tok/s", "lookup, tok/s", "×", "right guesses", "tokens a call"), rows))


if __name__ == "__main__":
    main()
