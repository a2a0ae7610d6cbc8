import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime_genai
import pytest

from export import bundle as module
from export.bundle import Draft, check_exportable, draft_bundle
from export.checks import Check
from export.manifest import MANIFEST, chat_format, read_manifest
from export.onnx.target import ONNX
from gemma3.chat import CHAT_TEMPLATE, GEMMA, Message
from gemma3.errors import BadInput, DoesNotFit, VerificationFailed
from gemma3.generation_config import Sampling
from gemma3.tokenizer import Tokenizer
from gemma3.tokenizer_files import parse_model
from gemma3.write_tokenizer_json import as_tokenizer_json
from quant.quantize import in_recipe
from quant.recipe import scheme_recipe
from quant.source import open_source
from runtime_py import api
from scripts.random_checkpoint import made_up_tokenizer
from tests.bundles import write_checkpoint

CONTEXT, CHUNK = 96, 8
CHECK = Check("onnx", "id", "b", "a", 0.5, 1.0, True)


Prove = Callable[[Draft], Sequence[Check]]


def export(checkpoint: Path, out: Path, prove: Prove = lambda _: (), context: int = CONTEXT) -> None:
    """``runtime_py.api.export_bundle`` with ``prove`` in place of its proof."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "prove", prove)
        api.export_bundle(
            checkpoint, out, recipe=scheme_recipe("int4-block32"), formats=["onnx"], context=context, chunk=CHUNK
        )


def test_the_bundle_appears_with_everything_it_lists(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", lambda _: [CHECK])
    manifest = read_manifest(tmp_path / "out")
    assert {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == {MANIFEST, *manifest.files}
    assert manifest.artifacts["onnx"].methods[0].inputs[0].name == "input_ids"
    assert manifest.artifacts["onnx"].opsets[""] >= 23
    assert manifest.weights["model.embed_tokens.weight"].scheme == "int8-channel"
    assert manifest.tokenizer.eos_ids == (1, 106)
    assert manifest.validation == (CHECK,)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_inputs_give_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(checkpoint, tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_the_draft_to_prove_is_a_readable_bundle(checkpoint: Path, tmp_path: Path) -> None:
    drafts: list[Draft] = []

    def prove(draft: Draft) -> tuple[Check, ...]:
        assert read_manifest(draft.directory) == draft.manifest
        drafts.append(draft)
        return ()

    export(checkpoint, tmp_path / "out", prove)
    assert drafts[0].weights["onnx"].integers
    assert drafts[0].directory.parent == tmp_path


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_nothing_is_left_when_proving_raises(checkpoint: Path, tmp_path: Path, error: BaseException) -> None:
    def prove(_: Draft) -> tuple[Check, ...]:
        raise error

    with pytest.raises(type(error)):
        export(checkpoint, tmp_path / "out", prove)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_a_check_fails(checkpoint: Path, tmp_path: Path) -> None:
    failing = Check("onnx", "walk/one-by-one", "kl_mean", "one by one", 0.25, 0.001, False)
    with pytest.raises(VerificationFailed, match=r"\.onnx, one by one: kl_mean is 0\.25, the limit is 0\.001"):
        export(checkpoint, tmp_path / "out", lambda _: [failing])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["export_artifact", "write_manifest", "describe_files", "staging"])
def test_nothing_is_left_when_a_step_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="No space"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="exists; remove it"):
        export(tmp_path / "no checkpoint is even looked for", tmp_path / "out")


def test_a_draft_that_is_not_sealed_does_not_appear(checkpoint: Path, tmp_path: Path) -> None:
    quantized = in_recipe(open_source(checkpoint))
    with (
        pytest.raises(RuntimeError, match="was not sealed"),
        draft_bundle(quantized, tmp_path / "out", targets=[ONNX], context=CONTEXT, chunk=CHUNK),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_exporting(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr(module, "export_artifact", None)
    with pytest.raises(DoesNotFit, match="1 MiB free, the bundle needs"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="context 161"):
        export(checkpoint, tmp_path / "out", context=161)
    assert list(tmp_path.iterdir()) == []


def test_another_models_tokenizer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    larger = write_checkpoint(tmp_path / "larger", vocab_size=700)
    (larger / "tokenizer.model").replace(checkpoint / "tokenizer.model")
    with pytest.raises(BadInput, match="has 700 tokens with the added ones, the embedding table 640 rows"):
        export(checkpoint, tmp_path / "out")


def test_a_token_that_only_the_tokenizer_has(tmp_path: Path) -> None:
    # As in the released text-only checkpoints: the image token is one past their embedding table.
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    added = {"640": {"content": "<image_soft_token>", "special": True}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


def with_added_words(directory: Path) -> Path:
    """A checkpoint of 640 pieces and 8 rows for added words, of which its tokenizer has three."""
    checkpoint = write_checkpoint(directory, vocab_size=648)
    (checkpoint / "tokenizer.model").write_bytes(made_up_tokenizer(640))
    (checkpoint / "added_tokens.json").write_text(json.dumps({"[SCRATCH]": 640, "Xylo phone": 641, "<X_1>": 642}))
    return checkpoint


def test_added_words_are_in_the_bundle_and_onnxruntime_genai_reads_the_same(tmp_path: Path) -> None:
    export(with_added_words(tmp_path / "checkpoint"), tmp_path / "out")
    ours = Tokenizer(tmp_path / "out" / "tokenizer.model")
    model = onnxruntime_genai.Model(str(tmp_path / "out"))
    stock = onnxruntime_genai.Tokenizer(model)
    for text in ("[SCRATCH] and Xylo phone", "a[SCRATCH]<X_1>b", "x\n\n  def f(): 12", "é🦊 [SCRA", "<X_1> <X_1>"):
        ids = ours.encode(text, bos=False)
        assert list(stock.encode(text)) in (ids, [ours.bos_id, *ids])
        assert stock.decode(ids) == ours.decode(ids) == text
    assert ours.encode("Xylo phone", bos=False) == [641]


def test_a_word_past_the_embedding_table(tmp_path: Path) -> None:
    checkpoint = with_added_words(tmp_path / "checkpoint")
    (checkpoint / "added_tokens.json").write_text(json.dumps({"[SCRATCH]": 648}))
    with pytest.raises(BadInput, match="has 649 tokens with the added ones, the embedding table 648 rows"):
        export(checkpoint, tmp_path / "out")
    with pytest.raises(BadInput, match="has 649 tokens"):
        api.quantize(open_source(checkpoint))


def test_a_quantized_checkpoint_keeps_the_tokenizer(tmp_path: Path) -> None:
    checkpoint = with_added_words(tmp_path / "checkpoint")
    model = parse_model((checkpoint / "tokenizer.model").read_bytes(), checkpoint)
    (checkpoint / "tokenizer.json").write_text(as_tokenizer_json(model), encoding="utf-8")
    with pytest.raises(BadInput, match=r"'\[SCRATCH\]' is not in tokenizer\.json"):
        api.quantize(open_source(checkpoint))
    (checkpoint / "added_tokens.json").unlink()
    (checkpoint / "tokenizer.model").unlink()
    api.save_checkpoint(api.quantize(open_source(checkpoint)), tmp_path / "quantized")
    assert open_source(tmp_path / "quantized").tokenizer.model == open_source(checkpoint).tokenizer.model


def test_no_tokenizer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.model").unlink()
    with pytest.raises(BadInput, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stop_ids_are_united_for_every_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    proposed = {"eos_token_id": [1, 300, 9999], "do_sample": True, "top_k": 64, "repetition_penalty": 1.1}
    (checkpoint / "generation_config.json").write_text(json.dumps(proposed))
    with caplog.at_level("INFO"):
        export(checkpoint, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert manifest.tokenizer.eos_ids == tuple(genai["model"]["eos_token_id"]) == (1, 106, 300)
    assert manifest.sampling == Sampling(1.0, 64, 1.0)
    assert "stop id 9999 is left out: the vocabulary has 640 tokens" in caplog.text
    assert "repetition_penalty 1.1 is not applied" in caplog.text


def test_a_chat_template_of_its_own_is_in_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    with caplog.at_level("INFO"):
        export(checkpoint, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tokenizer.chat_format, manifest.tokenizer.chat_template) == ("template", template)
    assert manifest.tokenizer.template_variables["bos_token"] == "<bos>"
    assert "chat_template.jinja" in manifest.files  # for stock runners
    assert "own chat template differs from Gemma's and is used" in caplog.text
    source, opened = open_source(checkpoint), chat_format(manifest)
    messages: list[Message] = [{"role": "user", "content": "a"}]
    assert opened.encode(source.tokenizer, messages) == source.chat.encode(source.tokenizer, messages)


def test_gemmas_own_form_is_said_in_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tokenizer.chat_format, manifest.tokenizer.chat_template) == ("gemma", CHAT_TEMPLATE)
    assert chat_format(manifest) is GEMMA
    assert manifest.sampling == Sampling()


def test_a_bad_companion_is_noticed_before_exporting(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(BadInput, match=r"generation_config\.json: eos_token_id is x"):
        check_exportable(open_source(checkpoint), [ONNX], scheme_recipe("int4-block32"), CONTEXT, CHUNK)
