"""Proofs with recorded logits and Python's figures, for the Kotlin tests of the self-check.

Each folder has a bundle without graphs, ``calls.json`` with what the session was asked in order, ``logits.bin`` and
``soft_tokens.bin`` with its answers, and ``figures.json`` with the checks of runtime_py/proof/walks.py. The logits of
made-up bundles are drawn; those of bundles that are given come from their graphs. ``damaged`` has proofs that Python
refuses, with the file that its error names.
"""

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from export.manifest import (
    GOLDEN,
    MANIFEST,
    PLAN,
    SCHEMA_VERSION,
    TOKENIZER,
    Artifact,
    FileEntry,
    Manifest,
    TokenizerInfo,
    read_manifest,
    sha256_of,
)
from gemma3.cache import CacheStyle, cache_layout
from gemma3.config import ModelConfig, VisionConfig, parse_config
from gemma3.errors import VerificationFailed
from gemma3.images import Pixels
from quant.recipe import Verdict
from runtime_py.backends import open_session
from runtime_py.proof import prove
from runtime_py.proof.golden import Recorder, ReferenceLogits, load_golden, reference_keys, save_golden
from runtime_py.proof.limits import stricter, tolerances
from runtime_py.proof.plan import make_plan, plan_images
from runtime_py.proof.plan_file import load_plan, save_plan
from runtime_py.proof.walks import check_session
from runtime_py.sessions.protocol import Image, Logits, Session, SoftTokens, calls, is_pixels

TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 160,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}
SEEING: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": TEXT,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 157,
    "eoi_token_index": 158,
    "image_token_index": 159,
}
LARGE = TEXT | {"vocab_size": 9000}
References = dict[str, tuple[str, ...]]
ROUNDED: References = {"pte": ("int8-per-token",), "onnx": ("int8-per-block", "int8-kleidiai")}
FLOAT: References = {"pte": ("float",), "onnx": ("float",)}
MADE = {"float": (TEXT, FLOAT), "seeing": (SEEING, ROUNDED), "large": (LARGE, ROUNDED)}
AWAY = 0.3  # how far the logits of the first of two references are from the graph's: too far
SEED = 11


def write(folder: Path, bundles: Sequence[Path] = ()) -> None:
    """Write the made-up proofs, and those of ``bundles``, below ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, (config, references) in MADE.items():
        made = _Made(parse_config(config), references)
        made.save(folder / name / "bundle")
        for format in references:
            _record(folder / name / format, folder / name / "bundle", format, made.session)
    for bundle in bundles:
        for format in read_manifest(bundle).artifacts:
            where = folder / "real" / bundle.name
            shutil.copytree(bundle / "proof", where / "bundle" / "proof", dirs_exist_ok=True)
            shutil.copy(bundle / MANIFEST, where / "bundle")
            _record(where / format, bundle, format, partial(open_session, bundle, format))
    _write_plans(folder / "plans.json")
    _damage(folder / "seeing" / "bundle", folder / "damaged")
    _loosen(folder / "seeing" / "bundle", folder / "loosened")


def _manifest(config: ModelConfig, references: References, context: int, chunk: int) -> Manifest:
    styles: dict[str, CacheStyle] = {"pte": "ring", "onnx": "compacting"}

    def artifact(format: str) -> Artifact:
        layout = cache_layout(config, styles[format], context, chunk)
        return Artifact("model", ("model",), layout, (), references[format], (), {}, {}, 1, 1, 1, {}, {})

    return Manifest(
        schema_version=SCHEMA_VERSION,
        gemma_edge="0",
        model=config,
        recipe="",
        rules={},
        method="rtn",
        weights={"a": Verdict("int8-channel", "why")},
        context=context,
        chunk=chunk,
        reference_dtype="float32",
        tokenizer=TokenizerInfo("", 2, (1,), 0, "", {}),
        artifacts={format: artifact(format) for format in references},
        files={},
        validation=(),
    )


class _Made:
    """A made-up model: drawn logits, which are the references' with a little noise."""

    def __init__(self, config: ModelConfig, references: References) -> None:
        self.manifest = _manifest(config, references, context=128, chunk=8)
        self.plan = make_plan(self.manifest)
        self.images = plan_images(self.manifest)
        random = np.random.default_rng(SEED)
        length, vocabulary = len(self.plan.ids), config.vocab_size
        self.logits = random.normal(0, 3, (length, vocabulary)).astype(np.float32)
        tokens = config.vision.tokens_per_image if config.vision else 0
        self.soft_tokens = random.normal(0, 1, (len(self.images), tokens, config.hidden_size)).astype(np.float32)
        if config.vision is None:
            self.soft_tokens = np.zeros((0, 0, 0), np.float32)
        keys = {key: name for of_format in reference_keys(self.manifest).values() for name, key in of_format.items()}
        self.golden = {key: self._reference(name, random) for key, name in keys.items()}

    def _reference(self, name: str, random: np.random.Generator) -> ReferenceLogits:
        recorder = Recorder(self.plan.ids, self.manifest.model.vocab_size)
        away = AWAY if name == "int8-per-block" else 0.0
        for position in self.plan.golden_positions:
            noise = random.normal(0, away, self.logits.shape[1])
            recorder.add(position, (self.logits[position] + noise).astype(np.float32))
        reference = recorder.reference(self.images, self.soft_tokens)
        positions, images = len(self.plan.positions), len(self.images)

        def drawn(size: float, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            return random.exponential(size, count).astype(np.float32)

        if name == "float":
            zeros = np.zeros(positions, np.float32)
            soft_noise = drawn(1e-3, images)
            reference = replace(reference, noise_kl=zeros, cost_kl=zeros, soft_noise=soft_noise)
            return replace(reference, float_error=drawn(3e-3, positions))
        return replace(
            reference,
            float_error=np.zeros(positions, np.float32),
            noise_kl=drawn(1e-4, max(1, positions // 2)),
            cost_kl=drawn(4e-4, positions),
            soft_noise=drawn(1e-3, 4 * images),
            soft_cost=drawn(9e-3, images),
        )

    def save(self, bundle: Path) -> None:
        (bundle / "proof").mkdir(parents=True)
        save_golden(bundle / GOLDEN, self.golden)
        save_plan(bundle / PLAN, self.plan, prove.proofs_of(self.manifest, self.plan, self.golden))
        for name in ("model", TOKENIZER):
            (bundle / name).write_bytes(b"\0")
        files = {name: _entry(bundle / name) for name in (GOLDEN, PLAN, "model", TOKENIZER)}
        tokenizer = replace(self.manifest.tokenizer, sha256=files[TOKENIZER].sha256)
        self.manifest = replace(self.manifest, files=files, tokenizer=tokenizer)
        (bundle / MANIFEST).write_text(self.manifest.to_json(), encoding="utf-8")

    def session(self) -> Session:
        return _MadeSession(self)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256_of(path))


class _MadeSession:
    """Answers with the made-up logits, and with noise that is the same in a walk after each reset."""

    def __init__(self, made: _Made) -> None:
        self._made, self._walk = made, 0
        self.context, self.chunk = made.manifest.context, made.manifest.chunk
        self.vocab_size, self.position = made.manifest.model.vocab_size, 0
        self.vision: VisionConfig | None = made.manifest.model.vision
        self.logits: Logits = np.zeros(0, np.float32)

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        self.position += len(ids)
        random = np.random.default_rng([SEED, self._walk % 4, self.position])
        noise = random.normal(0, 1e-3, self.vocab_size).astype(np.float32)
        self.logits = self._made.logits[self.position - 1] + noise
        return self.logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def reset(self) -> None:
        self._walk, self.position = self._walk + 1, 0

    def encode_image(self, image: Pixels) -> SoftTokens:
        number = _number_of(image, self._made.images)
        noise = np.random.default_rng([SEED, number]).normal(0, 1e-3, self._made.soft_tokens[0].shape)
        return (self._made.soft_tokens[number] + noise).astype(np.float32)


def _number_of(image: Pixels, images: Iterable[Pixels]) -> int:
    return next(number for number, one in enumerate(images) if np.array_equal(image, one))


class _Recording:
    """A session that writes down what it is asked, one entry for each call of the graph."""

    def __init__(self, session: Session, images: Iterable[Pixels]) -> None:
        self._session, self._images = session, images
        self.asked: list[dict[str, Any]] = []
        self.answers: list[Logits] = []
        self.encoded: list[SoftTokens] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def reset(self) -> None:
        self.asked.append({"reset": True})
        self._session.reset()

    def encode_image(self, image: Pixels) -> SoftTokens:
        self.asked.append({"encode": _number_of(image, self._images)})
        self.encoded.append(self._session.encode_image(image))
        return self.encoded[-1]

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        for call in calls(self._session, ids, images):  # the session would cut in the same places
            image = call.image
            if image is not None and is_pixels(image):
                image = self.encode_image(image)
            self.asked.append({"ids": list(call.ids), "image": image is not None})
            self.answers.append(self._session.prefill(call.ids, () if image is None else (image,)).copy())
        return self.answers[-1]


def _record(folder: Path, bundle: Path, format: str, opened: Callable[[], Session]) -> None:
    folder.mkdir(parents=True)
    manifest, proof, golden = read_manifest(bundle), load_plan(bundle / PLAN), load_golden(bundle / GOLDEN)
    figures: dict[str, Any] = {}
    for name in manifest.artifacts[format].references:
        one = proof.artifacts[format][name]
        reference = golden[one.key]
        within = stricter(tolerances(proof.plan, reference, name), one.tolerances)
        session = _Recording(opened(), reference.images)
        checks = check_session(session, proof.plan, reference, format, within)
        figures[name] = [dataclasses.asdict(check) for check in checks]
        (folder / "calls.json").write_text(json.dumps(session.asked))
        (folder / "logits.bin").write_bytes(np.stack(session.answers).astype("<f4").tobytes())
        (folder / "soft_tokens.bin").write_bytes(b"".join(one.astype("<f4").tobytes() for one in session.encoded))
    (folder / "figures.json").write_text(json.dumps(figures))


def _write_plans(path: Path) -> None:
    """Plans for models of many shapes: what a plan must be follows from the manifest."""
    windows, chunks, contexts = (1, 5, 8, 64, 512, 1024), (4, 8, 128, 256), (16, 40, 128, 1024, 8192)
    shapes = itertools.product((TEXT, SEEING), windows, chunks, contexts, (ROUNDED, {"onnx": ("float",)}))
    plans = []
    for config, window, chunk, context, references in shapes:
        text = TEXT | {"sliding_window": window, "max_position_embeddings": 8192}
        whole = config | {"text_config": text} if "text_config" in config else text
        manifest = _manifest(parse_config(whole), references, context, min(chunk, context))
        for longer in (False, True):
            plan = make_plan(manifest, longer)
            plans.append({"manifest": json.loads(manifest.to_json()), "plan": dataclasses.asdict(plan)})
    path.write_text(json.dumps(plans))


KEY = "int8-per-token"
GOLDEN_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda arrays: arrays.pop(f"{KEY}.values"),
    "no-images": lambda arrays: arrays.pop("images"),
    "shorter": lambda arrays: arrays.update({f"{KEY}.argmax": arrays[f"{KEY}.argmax"][:-1]}),
    "empty": lambda arrays: arrays.update({f"{KEY}.log_sum_exp": arrays[f"{KEY}.log_sum_exp"][:0]}),
    "scalar": lambda arrays: arrays.update({f"{KEY}.argmax": np.array(1, np.int32)}),
    "vector": lambda arrays: arrays.update({f"{KEY}.top_values": arrays[f"{KEY}.top_values"][:, 0:0].ravel()}),
    "another-dtype": lambda arrays: arrays.update({f"{KEY}.columns": arrays[f"{KEY}.columns"].astype(np.float32)}),
    "wide": lambda arrays: arrays.update({f"{KEY}.values": arrays[f"{KEY}.values"].astype(np.float64)}),
    "another-axis": lambda arrays: arrays.update({f"{KEY}.log_sum_exp": arrays[f"{KEY}.log_sum_exp"][:, None]}),
    "a-negative-distance": lambda arrays: arrays[f"{KEY}.noise_kl"].__setitem__(0, -1.0),
    "an-infinite-distance": lambda arrays: arrays[f"{KEY}.cost_kl"].__setitem__(0, np.inf),
    "no-number": lambda arrays: arrays[f"{KEY}.soft_noise"].__setitem__(0, np.nan),
    "below-zero": lambda arrays: arrays[f"{KEY}.columns"].__setitem__(0, -1),
    "over-the-vocabulary": lambda arrays: arrays[f"{KEY}.columns"].__setitem__(-1, 10**6),
    "positions-of-no-walk": lambda arrays: arrays[f"{KEY}.positions"].__iadd__(100_000),
    "images": lambda arrays: arrays.update({"images": np.zeros((1, 2, 2, 3), np.uint8)}),
    "small-images": lambda arrays: arrays.update({"images": np.zeros((2, 2, 2, 3), np.uint8)}),
    "no-positions": lambda arrays: arrays.update({f"{KEY}.positions": arrays[f"{KEY}.positions"][:0]}),
    "other-ids": lambda arrays: arrays[f"{KEY}.ids"].__setitem__(1, 3),
}
PLAN_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no-limits-of-a-walk": lambda proof: proof["artifacts"]["pte"][KEY]["tolerances"].pop("walk/chunks"),
    "no-limits-of-reset": lambda proof: proof["artifacts"]["pte"][KEY]["tolerances"].pop("reset"),
    "no-artifact": lambda proof: proof["artifacts"].pop("pte"),
    "no-reference": lambda proof: proof["artifacts"]["pte"].pop(KEY),
    "another-key": lambda proof: proof["artifacts"]["pte"][KEY].update(key="int4"),
    "fewer-ids": lambda proof: proof["plan"]["ids"].pop(),
    "an-image-less": lambda proof: proof["plan"]["image_places"].pop(),
    "a-shorter-walk": lambda proof: proof["plan"]["walks"]["chunks"].pop(),
    "no-walks": lambda proof: proof["plan"].update(walks={}),
    "one-walk": lambda proof: proof["plan"].update(walks={"chunks": proof["plan"]["walks"]["chunks"]}, landmarks={}),
    "an-unknown-image": lambda proof: proof["plan"].update(image_places=[2], image_numbers=[7]),
    "other-images": lambda proof: proof["plan"].update(image_places=[2], image_numbers=[0]),
    "a-huge-id": lambda proof: proof["plan"]["ids"].__setitem__(3, 10**30),
    "an-empty-call": lambda proof: proof["plan"]["walks"]["chunks"].insert(0, 0),
    "a-walk-too-many": lambda proof: proof["plan"]["walks"].update({"\ud800": proof["plan"]["walks"]["chunks"]}),
    "a-negative-landmark": lambda proof: proof["plan"]["landmarks"].update(W=-1),
    "a-huge-limit": lambda proof: proof["artifacts"]["pte"][KEY]["tolerances"]["reset"].update(max_abs=10**400),
    "schema-1": lambda proof: proof.update(schema_version=1),
    "schema-3": lambda proof: proof.update(schema_version=3),
    "schema-text": lambda proof: proof.update(schema_version="2"),
    "another-form": lambda proof: proof.update(plan=[]),
    "a-key-too-many": lambda proof: proof.update(more=1),
    "no-ids": lambda proof: proof["plan"].pop("ids"),
}
TEXT_DAMAGE = {"brace": "{", "list": "[]", "null": "null", "bare": '{"schema_version": 2}', "zero": "\0", "empty": ""}


def _damage(bundle: Path, folder: Path) -> None:
    """Copies of ``bundle`` with a damaged proof. ``expected.json`` has for each the file that Python's error names."""
    expected: dict[str, str] = {}

    def add(name: str, change: Callable[[Path], object]) -> None:
        damaged = folder / name
        shutil.copytree(bundle, damaged)
        change(damaged)
        try:
            prove._replay(damaged, read_manifest(bundle))
        except VerificationFailed as error:
            expected[name] = next(file for file in (PLAN, GOLDEN) if str(damaged / file) in str(error))
        else:
            raise AssertionError(f"{name} was replayed")

    def of_golden(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def write_changed(damaged: Path) -> None:
            arrays = load_file(damaged / GOLDEN)
            change(arrays)
            save_file(arrays, damaged / GOLDEN)

        return write_changed

    for name, change in GOLDEN_DAMAGE.items():
        add(f"golden-{name}", of_golden(change))
    for name, change in PLAN_DAMAGE.items():
        add(f"plan-{name}", partial(_change_plan, change=change))
    for name, text in TEXT_DAMAGE.items():
        add(f"plan-{name}", partial(_write_plan, text=text))
    add("no-plan", lambda damaged: (damaged / PLAN).unlink())
    add("no-golden", lambda damaged: (damaged / GOLDEN).unlink())
    add("golden-nonsense", lambda damaged: (damaged / GOLDEN).write_bytes(b"\x10\0\0\0\0\0\0\0nonsense"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


def _write_plan(bundle: Path, text: str) -> None:
    (bundle / PLAN).write_text(text, encoding="utf-8")


def _change_plan(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    proof = json.loads((bundle / PLAN).read_text(encoding="utf-8"))
    change(proof)
    _write_plan(bundle, json.dumps(proof))


def _loosen(bundle: Path, folder: Path) -> None:
    """Copies of ``bundle`` whose plans have limits that everything keeps to. They must not count."""

    def loosened(proof: dict[str, Any]) -> None:
        for reference in _references(proof):
            for limits in reference["tolerances"].values():
                limits.update({metric: 1e300 for metric in limits}, another=0.0)

    def without_limits(proof: dict[str, Any]) -> None:
        for reference in _references(proof):
            reference["tolerances"] = {id: {"another": 0.0} for id in reference["tolerances"]}

    for change in (loosened, without_limits):
        shutil.copytree(bundle, folder / change.__name__)
        _change_plan(folder / change.__name__, change)


def _references(proof: dict[str, Any]) -> list[dict[str, Any]]:
    return [reference for references in proof["artifacts"].values() for reference in references.values()]


if __name__ == "__main__":
    write(Path(sys.argv[1]), [Path(bundle) for bundle in sys.argv[2:]])
