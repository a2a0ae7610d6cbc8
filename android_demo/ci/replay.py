"""Runs the demo bundles in Python and in the app's own Kotlin on the JVM, and compares.

    python -m android_demo.ci.replay BUNDLES --java TARGET/jvm --formats onnx,pte [--faults]

check.sh calls it. BUNDLES has `demo` and `demo-vision`; TARGET/jvm has the JVM's options. For each bundle and format:
200 greedy tokens, a turn of chat, the self-check, and the check of a bundle with one changed byte in each file. With
--faults also bundles whose .onnx has a planted fault, with a manifest that lists it. Exits with 1 if anything differs
that should not.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

import gemma3
from export.manifest import MANIFEST, read_manifest, sha256_of
from gemma3.chat import Image, encode_chat
from gemma3.tokenizer import Tokenizer
from runtime_py.api import open_session, validate
from runtime_py.conversation import Conversation
from runtime_py.generate import Sampler
from runtime_py.pictures import Picture, read_pictures
from runtime_py.sessions.protocol import Logits, calls

NEW_TOKENS = 200
CHAT_TOKENS = 60
TEXT = "Once upon a time"
QUESTION = "What is in this picture?"
# Two runtime versions, or two formats, may round an int8 activation in different ways. The logits of one position then
# differ by this much at most; a token may differ only where the two best are as close as that.
ROUNDING = 0.5

problems: list[str] = []


def expect(condition: bool, problem: str) -> None:
    if not condition:
        problems.append(problem)
        print(f"  WRONG: {problem}")


class Kotlin:
    """The command of android_demo/ci/engines/src/test/…/Replay.kt."""

    def __init__(self, options: Path) -> None:
        self._options = options

    def __call__(self, command: str, bundle: Path, format: str, *rest: object) -> Any:
        words = ["java", f"@{self._options}", "org.gemmaedge.engines.ReplayKt", command, bundle, format, *rest]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def pictures_of(bundle: Path) -> list[Path]:
    if read_manifest(bundle).model.vision is None:
        return []
    return [Path(gemma3.__file__).parent / "demo_vision" / "images" / "count-00.png"]


def greedy(session: Any, ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[list[int], Logits, float]:
    """NEW_TOKENS greedy tokens as the Kotlin command draws them, the logits before each, and tokens/s."""
    images = [pixels for picture in pictures for pixels in picture.pixels]
    logits = session.prefill(ids, images)
    started = time.perf_counter()
    tokens: list[int] = []
    rows: list[Logits] = []
    while len(tokens) < NEW_TOKENS:
        rows.append(logits)
        allowed = logits.copy()
        if session.vision is not None:
            allowed[session.vision.image_token_id] = -np.inf
        tokens.append(int(allowed.argmax()))
        if len(tokens) < NEW_TOKENS:
            logits = session.step(tokens[-1])
    return tokens, np.stack(rows), (NEW_TOKENS - 1) / (time.perf_counter() - started)


def compare(what: str, left: tuple[list[int], Logits], right: tuple[list[int], Logits], *, equal: bool) -> None:
    """Print where two runs part. With ``equal`` they must not."""
    tokens, other = left[0], right[0]
    first = next((at for at in range(NEW_TOKENS) if tokens[at] != other[at]), None)
    same = NEW_TOKENS if first is None else first + 1
    change = float(np.abs(left[1][:same] - right[1][:same]).max())
    if first is None:
        print(f"  {what}: all {NEW_TOKENS} tokens equal, max |Δlogit| {change:.3g}")
    else:
        pair = [tokens[first], other[first]]
        print(
            f"  {what}: {first} of {NEW_TOKENS} tokens equal, max |Δlogit| {change:.3g}; then {pair[0]} or {pair[1]}, "
            f"whose logits are {_pair(left[1][first][pair])} and {_pair(right[1][first][pair])}"
        )
    expect(not equal or first is None, f"{what}: the tokens part at {first}")
    expect(change <= ROUNDING, f"{what}: the logits differ by {change:.3g}, more than rounding explains ({ROUNDING})")


def _pair(values: Logits) -> str:
    return " / ".join(f"{value:.4f}" for value in values)


def tokens_and_chat(kotlin: Kotlin, bundle: Path, formats: Sequence[str], work: Path) -> None:
    manifest = read_manifest(bundle)
    vision = manifest.model.vision
    tokenizer = Tokenizer(bundle / "tokenizer.model")
    files = pictures_of(bundle)
    pictures = read_pictures(files, vision)
    content: Any = [*(Image() for _ in pictures), QUESTION] if pictures else TEXT
    ids = encode_chat(
        tokenizer,
        [{"role": "user", "content": content}],
        tokens_per_image=None if vision is None else vision.tokens_per_image,
    )
    runs: dict[str, tuple[list[int], Logits]] = {}
    for format in formats:
        session = open_session(bundle, format, threads=1)
        request = work / "request.json"
        request.write_text(json.dumps({"calls": _request(session, ids, pictures, work), "newTokens": NEW_TOKENS}))
        speeds = []
        for _ in range(3):  # Kotlin does the same; the fastest counts
            session.reset()
            tokens, rows, speed = greedy(session, ids, pictures)
            speeds.append(speed)
        runs[f"Python .{format}"] = tokens, rows
        answer = kotlin("generate", bundle, format, request, work / "logits")
        logits = np.fromfile(work / "logits", np.float32).reshape(NEW_TOKENS, -1)
        runs[f"Kotlin .{format}"] = answer["tokens"], logits
        # The wheel's ONNX Runtime also runs under Kotlin. ExecuTorch's C++ SDK is of another version than Python's.
        pair = [runs[f"{language} .{format}"] for language in ("Python", "Kotlin")]
        compare(f"Kotlin and Python, .{format}", pair[0], pair[1], equal=format == "onnx")
        print(
            f"    decode, tokens/s: Python {max(speeds):.0f}, Kotlin {(NEW_TOKENS - 1) / answer['decodeSeconds']:.0f} "
            f"(one thread, best of 3); Kotlin loads in {answer['loadSeconds']:.2f} s"
        )
        said = kotlin("chat", bundle, format, CHAT_TOKENS, QUESTION if pictures else TEXT, *files)["text"]
        session.reset()
        chat = Conversation(
            session, tokenizer, Sampler(), stop_ids=manifest.tokenizer.eos_ids, max_new_tokens=CHAT_TOKENS
        )
        expected = "".join(chat.say(QUESTION if pictures else TEXT, pictures))
        print(f"    chat: {said[:70]!r}")
        expect(
            format != "onnx" or said == expected, f"{bundle.name}, .{format}: Python says {expected!r}, not {said!r}"
        )
    if len(formats) > 1:
        for language in ("Python", "Kotlin"):
            compare(f"{language}, .onnx and .pte", runs[f"{language} .onnx"], runs[f"{language} .pte"], equal=False)


def _request(session: Any, ids: Sequence[int], pictures: Sequence[Picture], work: Path) -> list[dict[str, Any]]:
    request: list[dict[str, Any]] = []
    for call in calls(session, ids, [pixels for picture in pictures for pixels in picture.pixels]):
        if call.image is None:
            request.append({"ids": list(call.ids)})
        else:
            file = work / f"image-{len(request)}.rgb"
            file.write_bytes(call.image.tobytes())
            request.append({"image": str(file)})
    return request


def self_checks(kotlin: Kotlin, bundle: Path, formats: Sequence[str], work: Path) -> None:
    for format in formats:
        verdict = kotlin("check", bundle, format)
        print(f"  self-check, .{format}: {'passed' if verdict['passed'] else verdict}, {verdict['checks']} figures")
        expect(verdict["passed"], f"{bundle.name}: the self-check of the .{format} fails: {verdict}")
    names = list(read_manifest(bundle).files)
    for number, name in enumerate(names):
        changed = work / "changed"
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(bundle, changed)
        content = bytearray((changed / name).read_bytes())
        content[len(content) * (number + 1) // (len(names) + 1)] ^= 1 << number % 8
        (changed / name).write_bytes(content)
        verdict = kotlin("check", changed, formats[0])
        expect(name in (verdict["refused"] or ""), f"{bundle.name}: a changed byte in {name} gives {verdict}")
    print(f"  one changed byte: found and named in each of {len(names)} files")


def planted(work: Path) -> Iterator[tuple[str, Path]]:
    """Bundles whose .onnx has a fault of scripts/planted_faults.py, and the right one; all hashes are right.

    A row of scales that is the next one's is too small a fault for a replay in either language. Export finds it, as
    it reads every integer back, and later the hashes do.
    """
    from export.bundle import draft_bundle
    from export.target import Export, Target
    from quant.quantize import in_recipe
    from quant.recipe import scheme_recipe
    from quant.source import open_source
    from runtime_py.api import export_bundle
    from runtime_py.backends import backend_of
    from scripts.planted_faults import CHUNK, CONTEXT, FAULTS, RIGHT, not_sealed, small_checkpoint

    checkpoint = small_checkpoint(work / "checkpoint", 3, 8.0)
    right = work / "right"
    quantized = in_recipe(open_source(checkpoint), scheme_recipe("int4-block32"))
    export_bundle(quantized, right, formats=["onnx"], context=CONTEXT, chunk=CHUNK)
    yield RIGHT.name, right
    target: Target = backend_of("onnx").target
    for fault in FAULTS:
        if fault is RIGHT or fault.images or fault.style or "reset" in fault.name or "bad position" in fault.name:
            continue  # those are faults of a session; the core's own tests plant them

        def export(config: Any, weights: Any, *rest: Any, fault: Any = fault) -> Any:
            return target.export(fault.config(config), fault.weights(dict(weights)), *rest)

        wrong = work / fault.name.replace(" ", "-")
        shutil.copytree(right, wrong)
        with (
            not_sealed(),
            draft_bundle(
                quantized,
                work / "draft",
                targets=[replace(target, export=cast(Export, export))],
                context=CONTEXT,
                chunk=CHUNK,
            ) as draft,
        ):
            for name in ("model.onnx", "model.onnx.data"):
                shutil.copyfile(draft.directory / name, wrong / name)
        manifest = json.loads((wrong / MANIFEST).read_text())
        for name in ("model.onnx", "model.onnx.data"):
            manifest["files"][name] = {"size": (wrong / name).stat().st_size, "sha256": sha256_of(wrong / name)}
        (wrong / MANIFEST).write_text(json.dumps(manifest))
        yield fault.name, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path)
    parser.add_argument("--java", type=Path, required=True, help="a file with the JVM's options")
    parser.add_argument("--formats", type=lambda text: text.split(","), required=True)
    parser.add_argument("--faults", action="store_true")
    arguments = parser.parse_args()
    kotlin = Kotlin(arguments.java)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in ("demo", "demo-vision"):
            print(f"{name}:")
            bundle = (arguments.bundles / name).resolve()
            tokens_and_chat(kotlin, bundle, arguments.formats, work)
            self_checks(kotlin, bundle, arguments.formats, work)
        if arguments.faults:
            print("planted faults:")
            for fault, bundle in planted(work):
                verdict = kotlin("check", bundle, "onnx")
                found = sorted({*verdict["failed"]})
                print(f"  {fault}: {', '.join(found) or 'passes'}")
                expected = sorted({check.id for check in validate(bundle) if not check.passed})
                expect(verdict["refused"] is None, f"{fault}: {verdict['refused']}")
                expect(found == expected, f"{fault}: found by {found}, but in Python by {expected}")
                expect(bool(found) == ("window" in fault or "RoPE" in fault), f"{fault}: found by {found}")
    if problems:
        sys.exit(f"{len(problems)} of the comparisons are wrong")


if __name__ == "__main__":
    main()
