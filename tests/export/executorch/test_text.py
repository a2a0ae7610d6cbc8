"""The .pte file compared with the eager network for every kind of shape, and its bytes with what they should be."""

import gc
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir.schema import DelegateCall, KernelCall
from executorch.exir.tensor import TensorSpec
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from export.executorch.file import PteFile, cache_shapes_pte, early_reads, unpack_nibbles
from export.executorch.layers import GELU_A, GELU_B, Embedding, Linear, pack_embedding, project, rope_half, rows
from export.executorch.lower import export_pte, lower
from export.executorch.read_back import join_halves, stored_integers
from export.executorch.text import Attention, ExecutorchModel, Flag
from gemma3.cache import cache_layout
from gemma3.config import FULL
from gemma3.errors import BadInput
from gemma3.model import new_cache
from quant.activations import fake_quantize_per_token, per_token
from quant.integers import IntegerWeight, round_to_nearest
from runtime_py.proof.plan import Plan
from runtime_py.proof.single_steps import agreeing, feed, steps
from runtime_py.sessions.pte import open_program
from tests.pte_models import CHUNK, TinyPte, tiny_pte
from tests.shapes import random_model, random_tokens, tiny_config

TOLERANCE = 1e-4


def plan_of(ids: list[int]) -> Plan:
    return Plan(ids=tuple(ids), walks={}, landmarks={})


# The ring of most tiny shapes holds 16 positions. The length is four windows of 8 past its first wrap, plus 6.
LENGTH = 16 + 4 * 8 + 6
# Shapes of tests/shapes.py with no more layers than each needs to make its point: every layer costs seconds here.
OTHER_SHAPES = {
    "like-27b": {"num_hidden_layers": 2, "sliding_window_pattern": 2},
    "untied": {"num_hidden_layers": 2},
    "all-local": {},
    "all-global": {},
    "global-first": {},
    "window-of-one": {"num_hidden_layers": 2, "sliding_window_pattern": 2},
    "window-over-positions": {},
    "other-ropes": {"num_hidden_layers": 2},
}


def differences(tiny: TinyPte, pieces: list[int]) -> Tensor:
    """Largest |Δlogit| against the eager model after each prefill of so many ids."""
    ids = random_tokens(tiny.config, LENGTH)
    expected = tiny.eager_logits(ids)
    assert expected.std() > 0.1
    session = tiny.session()
    found = []
    for piece in pieces:
        logits = torch.from_numpy(session.prefill(ids[session.position : session.position + piece]))
        found.append((logits - expected[session.position - 1]).abs().max())
    assert session.position <= LENGTH
    return torch.stack(found)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> TinyPte:
    return tiny_pte(tiny_config(), tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def block32(tmp_path_factory: pytest.TempPathFactory) -> TinyPte:
    """Several key/value heads, a factor on the global RoPE."""
    return tiny_pte(
        tiny_config("like-4b", num_hidden_layers=6), tmp_path_factory.mktemp("block32"), "int4-block32", "int8"
    )


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> TinyPte:
    """A separate head. Only sliding layers, so that what a flipped rounding changes leaves the cache again."""
    config = tiny_config("all-local", tie_word_embeddings=False)
    return tiny_pte(config, tmp_path_factory.mktemp("channel"), "int4-channel", "int4")


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [CHUNK, 7, 3, 1])
def test_fp32_equals_eager(fp32: TinyPte, chunk: int) -> None:
    pieces = [chunk] * (LENGTH // chunk)
    assert differences(fp32, pieces).max() <= TOLERANCE


@pytest.mark.slow
def test_prompts_of_changing_length(fp32: TinyPte) -> None:
    """Some are longer than the chunk: the session splits them."""
    assert differences(fp32, [5, 1, 20, 1, 1, 8, 13, 2]).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_every_kind_of_shape(shape: str, tmp_path: Path) -> None:
    tiny = tiny_pte(tiny_config(shape, **OTHER_SHAPES[shape]), tmp_path)
    assert differences(tiny, [8, 7, 1, 1, 1, 8, 8, *[1] * 10]).max() <= TOLERANCE


@pytest.mark.parametrize(("shape", "kv_heads"), [("like-270m", 1), ("like-4b", 4), ("like-27b", 2), ("like-270m", 4)])
@pytest.mark.parametrize("image", [None, 0, 1])
def test_full_attention_equals_attention_in_float64(shape: str, kv_heads: int, image: int | None) -> None:
    """Calls of one token give their query heads as positions, except at the first positions."""
    config = tiny_config(shape, num_key_value_heads=kv_heads)
    layout = cache_layout(config, "ring", 64, CHUNK)
    model = ExecutorchModel(config, random_model(config).state_dict(), layout)
    full = [spec.kind for spec in config.layers].index(FULL)
    attention = cast(Attention, model.get_submodule(f"layers.{full}.attention"))
    heads, groups, dim = config.num_attention_heads, config.num_attention_heads // kv_heads, config.head_dim
    flag = None if image is None else Flag(image, torch.tensor([float(image)]))
    keys, values = torch.randn(2, 64, kv_heads, dim)
    start = 0
    for length in (1, 1, 1, 1, 5, 1, 1, 8, 1, 3, 1):
        end, positions = start + length, torch.arange(start, start + length)
        step = model.step(FULL, start, positions, positions[-1:], flag)
        single = step.single is not None and step.single.number == 1
        assert single == (length == 1 and start >= groups - 1 > 0)
        queries = torch.randn(1, length, heads, dim)
        found = attention.attend(queries, keys[None, start:end], values[None, start:end], step)
        visible = torch.arange(end) <= positions[:, None]
        expected = F.scaled_dot_product_attention(
            queries[0].transpose(0, 1).double(),
            keys[:end].repeat_interleave(groups, 1).transpose(0, 1).double(),
            values[:end].repeat_interleave(groups, 1).transpose(0, 1).double(),
            torch.ones_like(visible) if image else visible,
            scale=1.0,
        )
        assert found.shape == (1, length, heads, dim)
        assert (found[0] - expected.transpose(0, 1)).abs().max() <= 1e-5
        start = end


@pytest.mark.slow
def test_a_ring_as_long_as_the_context_and_chunks_of_one(tmp_path: Path) -> None:
    config = tiny_config("all-local", sliding_window=60)
    tiny = tiny_pte(config, tmp_path, context=64)
    assert tiny.layout.layers[0].slots == 64
    assert differences(tiny, [1] * LENGTH).max() <= TOLERANCE
    # A file that takes one token at a time has no symbolic lengths at all.
    layout = cache_layout(config, "ring", 64, 1)
    weights = tiny.weights.tensors
    export_pte(config, weights, layout, [1], tmp_path / "one.pte")
    assert differences(replace(tiny, path=tmp_path / "one.pte", layout=layout), [1] * LENGTH).max() <= TOLERANCE


@pytest.mark.slow
def test_one_delegate_per_layer(fp32: TinyPte, block32: TinyPte) -> None:
    """One for the RoPE angles and the first layer's projections, one per layer from there on, one for the head."""
    for tiny in (fp32, block32):
        undelegated = tiny.report.details["undelegated"]
        assert tiny.report.details["delegates"] == tiny.config.num_layers + 2
        full = sum(layer.kind == FULL for layer in tiny.layout.layers)
        assert undelegated["llama::custom_sdpa"] == 2 * full  # per query head, and query heads as positions
        assert not {"aten::linear", "aten::mm", "aten::addmm", "aten::mul", "aten::bmm"} & set(undelegated)
        # A layer writes keys and values; one of full attention also takes the last query apart. What is left is done
        # once per step: 46 calls. One more for each sliding-window layer would be 51 or more.
        assert sum(undelegated.values()) - 2 * tiny.config.num_layers - 3 * full < 49


@pytest.mark.slow
def test_caches_are_written_before_attention_reads_them(fp32: TinyPte) -> None:
    """XNNPACK's delegates get views of the rings' caches. Were the calls in another order, the export would fail."""
    (plan,) = PteFile(fp32.path).networks
    assert early_reads(plan) == []
    instructions = plan.chains[0].instructions
    calls = [instruction.instr_args for instruction in instructions]
    names = [plan.operators[call.op_index].name if isinstance(call, KernelCall) else "" for call in calls]
    first = names.index("llama::update_cache_with_indices")
    reader = next(index for index in range(first, len(calls)) if isinstance(calls[index], DelegateCall))
    instructions.insert(reader, instructions.pop(first))  # behind its reader, which moves up
    assert early_reads(plan) == [reader - 1]
    instructions.insert(0, instructions.pop(names.index("llama::custom_sdpa")))
    assert early_reads(plan) == [0, reader]


@pytest.mark.slow
def test_constant_methods(block32: TinyPte) -> None:
    file = PteFile(block32.path)
    expected = {
        "get_max_seq_len": CHUNK,
        "get_max_context_len": 128,
        "get_vocab_size": block32.config.vocab_size,
        "get_bos_id": 2,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    assert {name: file.constant_method(name) for name in expected} == expected
    assert open_program(block32.path).load_method("get_eos_ids").call(()) == [1, 106]


@pytest.mark.slow
def test_local_caches_do_not_grow_with_the_context(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2, sliding_window_pattern=2)
    for context in (128, 256):
        shapes = cache_shapes_pte(PteFile(tiny_pte(config, tmp_path, context=context).path))
        # keys and values of 16 slots and of the context, one head of 32 floats
        assert [torch.Size(shape).numel() for shape in shapes] == [16 * 32] * 2 + [context * 32] * 2


@pytest.mark.slow
def test_a_second_export_gives_the_same_bytes(channel: TinyPte, tmp_path: Path) -> None:
    again = tmp_path / "again.pte"
    export_pte(channel.config, channel.weights.tensors, channel.layout, [1, 106], again)
    assert again.read_bytes() == channel.path.read_bytes()


@pytest.mark.slow
def test_integers_in_the_file_are_the_quantizers(block32: TinyPte, channel: TinyPte) -> None:
    for tiny in (block32, channel):
        stored, counts = tiny.stored(), tiny.counts()
        assert stored.keys() == tiny.weights.integers.keys()
        for name, weight in tiny.weights.integers.items():
            assert torch.equal(stored[name].codes, weight.codes), name
            assert torch.equal(stored[name].scales, weight.scales), name
            assert counts.equal[name] == weight.codes.numel()
        assert not any(counts.unequal.values())
        uses = [name for name, _ in stored_integers(PteFile(tiny.path))]
        assert uses.count("model.embed_tokens.weight") == 1 + tiny.config.tie_word_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("place", ["codes", "scales"])
def test_a_changed_integer_is_counted(block32: TinyPte, place: str) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    weight = block32.weights.integers[name]
    changed = replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())
    if place == "codes":
        changed.codes[5, 7] ^= 1
    else:
        changed.scales[5, 0] *= 2
    unequal = block32.counts({**block32.weights.integers, name: changed}).unequal
    assert {name: count for name, count in unequal.items() if count} == {name: 1 if place == "codes" else 32}


@pytest.mark.slow
def test_both_copies_of_a_tied_table_are_compared(block32: TinyPte, tmp_path: Path) -> None:
    data = bytearray(block32.path.read_bytes())
    table = block32.weights.integers["model.embed_tokens.weight"].codes.numpy().tobytes()
    data[data.index(table)] ^= 1
    (tmp_path / "changed.pte").write_bytes(data)
    unequal = replace(block32, path=tmp_path / "changed.pte").counts().unequal
    assert {name: count for name, count in unequal.items() if count} == {"model.embed_tokens.weight": 1}


@pytest.mark.slow
def test_size(block32: TinyPte) -> None:
    report = block32.report
    ideal = block32.weights.ideal_bytes + report.details["second_table_bytes"]
    assert ideal < block32.path.stat().st_size < 2 * ideal
    table = block32.weights.integers["model.embed_tokens.weight"]
    assert report.details["second_table_bytes"] == table.ideal_bytes == table.codes.numel() + 2 * len(table.scales)


@pytest.mark.slow
def test_integer_steps_equal_eager_but_for_flipped_roundings(block32: TinyPte, channel: TinyPte) -> None:
    """From the same cache, a step agrees to float32 accuracy unless an activation lies within float error of a rounding
    boundary, which is rare. (With caches of their own, the two drift apart after the first such step, as do two eager
    runs that differ by one unit in the last place: what was rounded the other way stays in the cache and flips further
    roundings.)"""
    for tiny in (block32, channel):
        ids = random_tokens(tiny.config, LENGTH)
        fed = feed(tiny.session(), plan_of(ids), set(range(LENGTH)))
        found = steps(fed, tiny.config, tiny.weights, per_token)
        assert sum(step.file.max_abs <= TOLERANCE for step in found) >= 0.8 * LENGTH
        assert sum(step.file.kl for step in found) <= 1e-5 * LENGTH
        agreed, least = agreeing(found, TOLERANCE)
        assert agreed > 0.8 > least > 0.35


@pytest.mark.slow
def test_a_step_from_the_same_cache_shows_a_wrong_window(block32: TinyPte) -> None:
    """A window that is too long shows at every position past the window, and at none before."""
    window = block32.config.sliding_window
    wrong = replace(block32.config, sliding_window=window + 1)
    ids = random_tokens(wrong, LENGTH)
    fed = feed(block32.session(), plan_of(ids), set(range(LENGTH)))
    found = steps(fed, wrong, block32.weights, per_token)
    kl = [step.file.kl for step in found]
    assert median(kl[:window]) <= 1e-10
    assert min(kl[window:]) > 1e-5
    # Only the keys and values of the first layer, which attention has not touched, are the same.
    agreed, least = agreeing(found[window:], TOLERANCE)
    assert agreed == pytest.approx(1 / (1 + wrong.num_layers))
    assert agreed < least


@pytest.mark.slow
def test_caches_hold_what_the_eager_models_caches_hold(fp32: TinyPte) -> None:
    """Slot by slot, also in rings that have wrapped."""
    ids = random_tokens(fp32.config, LENGTH)
    session, expected = fp32.session(), new_cache(fp32.layout)
    session.prefill(ids)
    with torch.no_grad():
        for start in range(0, LENGTH, CHUNK):
            fp32.eager()(torch.tensor([ids[start : start + CHUNK]]), expected, start)
    for layer, theirs in enumerate(expected):
        held = range(LENGTH - min(LENGTH, theirs.keys.shape[2]), LENGTH)
        slots = torch.tensor(held) % theirs.keys.shape[2]
        for ours, kept in zip(session.rows(layer, held), (theirs.keys, theirs.values), strict=True):
            assert (torch.from_numpy(ours) - kept[0, :, slots].transpose(0, 1)).abs().max() <= 1e-4


class OneLinear(nn.Module):
    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__()
        self.linear = Linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.linear)[0]


def run_one_linear(weight: IntegerWeight, x: Tensor, path: Path) -> Tensor:
    """The linear layer alone, through export, lowering and XNNPACK, in calls of several lengths."""
    program = torch.export.export(
        OneLinear(weight), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1, max=len(x))}}
    )
    with path.open("wb") as stream:
        lower(program, {}).write_to_file(stream)
    method = open_program(path).load_method("forward")
    return torch.cat([method.call((piece.contiguous(),))[0] for piece in torch.split(x, [1, 2, 7, len(x) - 10])])


def spread_rows(count: int, columns: int) -> Tensor:
    """Rows of many magnitudes and offsets, one of zeros, one all positive, one all negative."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, columns, generator=generator) * torch.logspace(-3, 3, count)[:, None]
    x += torch.randn(count, 1, generator=generator)
    x[3], x[4], x[5] = 0.0, x[4].abs(), -x[5].abs()
    return x


@pytest.mark.slow
def test_activations_round_as_xnnpack_rounds_them_bit_for_bit(tmp_path: Path) -> None:
    """With the identity as its weight, XNNPACK's linear layer returns the rounded input."""
    size = 512
    identity = IntegerWeight(torch.eye(size, dtype=torch.int8), torch.ones(size, 1), 8)
    x = spread_rows(1024, size)
    assert torch.equal(run_one_linear(identity, x, tmp_path / "identity.pte"), fake_quantize_per_token(x))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, None), (8, None)])
def test_one_linear_is_exact_to_float_rounding(bits: int, group: int | None, tmp_path: Path) -> None:
    """Blockwise and per channel alike: no kernel is less exact than another."""
    weight = round_to_nearest(torch.randn(96, 640, generator=torch.Generator().manual_seed(1)) / 25, bits, group)
    x = spread_rows(64, 640)
    found = run_one_linear(weight, x, tmp_path / "linear.pte").double()
    expected = fake_quantize_per_token(x).double() @ weight.dequantize().double().T
    # For a row of zeros XNNPACK's step is 1 and its zero point 127, which the sums over blocks cancel up to 3e-5.
    size = torch.where(x.any(1), x.double().norm(dim=1), 1000.0)[:, None]
    assert ((found - expected).abs() <= 1e-7 * size).all()


def test_kinds_of_integers_without_a_kernel_are_refused() -> None:
    weight = torch.ones(4, 48)
    with pytest.raises(BadInput, match="8-bit weights in groups of 16"):
        Linear(round_to_nearest(weight, 8, 16))
    with pytest.raises(BadInput, match="groups of 16 have no XNNPACK kernel"):
        Linear(round_to_nearest(weight, 4, 16))


def test_a_shorter_last_group_is_refused() -> None:
    weight = round_to_nearest(torch.ones(4, 48), 4, 32, pad=True)
    for module in (Linear, Embedding):
        with pytest.raises(BadInput, match="48 columns in groups of 32 end in a shorter one"):
            module(weight)


@given(seed=st.integers(0, 1000), heads=st.integers(1, 4), half=st.integers(1, 5))
def test_halves_join_to_the_projection(seed: int, heads: int, half: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = round_to_nearest(torch.randn(heads * 2 * half, 64, generator=generator), 4, 32)
    first, second = (rows(weight, rope_half(heads, 2 * half, which)) for which in (0, 1))
    assert isinstance(first, IntegerWeight)
    assert isinstance(second, IntegerWeight)
    joined = join_halves(first, second, 2 * half)
    assert torch.equal(joined.codes, weight.codes)
    assert torch.equal(joined.scales, weight.scales)


@pytest.mark.slow
def test_nothing_of_the_file_stays_in_memory(tmp_path: Path) -> None:
    """The compiler keeps its graphs alive; a large model's constants must not be kept with them."""

    config = tiny_config("like-270m", num_hidden_layers=2)
    table = config.vocab_size * config.hidden_size

    def kept() -> tuple[int, int]:
        """The bytes in stores of delegates' constants, and how many descriptions of tensors hold a table."""
        held = gc.get_objects()
        stores = [one for one in held if isinstance(one, NamedDataStoreOutput)]
        constants = [one.const and one.storage for one in held if isinstance(one, TensorSpec)]
        tables = sum(isinstance(one, torch.UntypedStorage) and one.nbytes() == table for one in constants)
        return sum(len(buffer) for store in stores for buffer in store.buffers), tables

    before = kept()  # of other tests, which lower without writing a file
    tiny_pte(config, tmp_path, "int4-block32", "int8")
    after = kept()
    assert after[0] <= before[0]
    assert after[1] <= before[1]


def test_embedding_nibbles() -> None:
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    packed = pack_embedding(codes)
    assert packed.tolist() == [[0x0F, 0x87]]  # even columns in the high nibble, 8 added
    assert torch.equal(unpack_nibbles(packed, first="high"), codes)


def test_gelu_without_tanh() -> None:
    x = torch.linspace(-12, 12, 10_001, dtype=torch.float64)
    ours = x * torch.sigmoid(x * (GELU_A + GELU_B * x * x))
    assert (ours - nn.functional.gelu(x, approximate="tanh")).abs().max() < 1e-14


def test_files_that_are_not_a_pte(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"short")
    with pytest.raises(BadInput, match=r"5 bytes are not a \.pte"):
        PteFile(path)
    path.write_bytes(b"not a program" * 100)
    with pytest.raises(BadInput, match=r"does not begin like a \.pte"):
        PteFile(path)


@pytest.mark.slow
def test_a_truncated_file(fp32: TinyPte, tmp_path: Path) -> None:
    data = fp32.path.read_bytes()
    (tmp_path / "cut.pte").write_bytes(data[:-100])
    with pytest.raises(BadInput, match=f"{len(data) - 100} bytes, its header says {len(data)}"):
        PteFile(tmp_path / "cut.pte")
