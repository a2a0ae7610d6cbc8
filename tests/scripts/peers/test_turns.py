"""Who is asked what, with peers that answer at once and write down what they were asked."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma3.config import parse_config
from gemma3.errors import BadInput
from scripts.bench_peers import cache_bytes, find_peers, named, wanted
from scripts.peers.prepare import Environments, SkippedError, Step, last_line, litert_folder, make, run
from scripts.peers.turns import Peer, Plan, divergence, take_turns
from tests.bundles import CONFIG

# It is told which request to die at by the path that it is to open.
FAKE = """#!{python}
import json, sys
opened = json.loads(sys.argv[3])
with open({log!r}, "a") as log:
    print(json.dumps({{"version": "1", "load_seconds": 0.5, "libraries_bytes": 1000}}), flush=True)
    for number, line in enumerate(sys.stdin):
        if opened["path"].endswith(f"dies-at-{{number}}"):
            sys.exit("it died\\n")
        request = json.loads(line)
        kind = "decode" if "decode" in request else "prefill"
        print(json.dumps([opened["context"], kind, request["reset"], request[kind]]), file=log, flush=True)
        seconds = len(request[kind]) * 0.001
        print(json.dumps({{"seconds": seconds, "peak_bytes": 2000 + number}}), flush=True)
"""
PLAN = Plan(ids=range(100), prompt=8, depths=(8, 32), steps=3, rounds=2, patience=60)


class Fakes:
    """Peers that are a script in place of an interpreter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._script = folder / "python"
        self._script.write_text(FAKE.format(python=sys.executable, log=str(self._log)))
        self._script.chmod(0o755)

    def peer(self, context: int, path: str = "file") -> Peer:
        file = self._folder / "weights"
        file.write_bytes(b"12345")
        return Peer(f"peer {context}", "fake", str(self._script), Path(path), context, (file,))

    def asked(self, context: int) -> list[tuple[str, bool, list[int]]]:
        lines: list[list[Any]] = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [(kind, reset, ids) for whom, kind, reset, ids in lines if whom == context]

    def order(self) -> list[int]:
        return [json.loads(line)[0] for line in self._log.read_text().splitlines()]


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def test_the_cache_is_filled_once_and_steps_go_on_from_there(fakes: Fakes) -> None:
    left: list[float] = []
    (row,), skipped = take_turns([fakes.peer(64)], 1, PLAN, left.append)
    ids = list(range(100))
    assert (
        fakes.asked(64)
        == [
            ("prefill", True, ids[:8]),  # the warm-up
            ("decode", False, ids[8:11]),
            ("prefill", True, ids[:8]),
            ("prefill", True, ids[:8]),
            ("decode", False, ids[8:11]),
            ("decode", False, ids[11:14]),
            ("prefill", False, ids[14:32]),
            ("decode", False, ids[32:35]),
            ("decode", False, ids[35:38]),
        ]
    )
    assert skipped == {}
    assert row.file_bytes == 5
    assert row.prefill_seconds == pytest.approx((0.008, 0.008))
    assert [(one.depth, one.fill_tokens, one.peak_bytes) for one in row.depths] == [(8, 0, 2005), (32, 18, 2008)]
    assert row.depths[1].step_seconds == pytest.approx((0.001, 0.001))
    assert left == [pytest.approx(2 * 0.008 + 4 * 0.003 + 0.024, abs=0.001)]


def test_peers_take_turns_in_every_round(fakes: Fakes) -> None:
    take_turns([fakes.peer(63), fakes.peer(64)], 1, PLAN, lambda _: None)
    order = fakes.order()
    assert order[4:] == [63, 64] * 7


def test_steps_end_within_the_context(fakes: Fakes) -> None:
    take_turns([fakes.peer(32)], 1, PLAN, lambda _: None)
    *_, fill, first, second = fakes.asked(32)
    assert fill == ("prefill", False, list(range(14, 22)))  # four more would fit, of which some runtimes need two
    assert (first, second) == (("decode", False, [22, 23, 24]), ("decode", False, [25, 26, 27]))


def test_a_cache_without_room_for_the_steps_is_left_out(fakes: Fakes) -> None:
    (row,), skipped = take_turns([fakes.peer(13), fakes.peer(64)], 1, PLAN, lambda _: None)
    assert row.context == 64
    assert skipped == {"peer 13": "caches of 13 have no room for the decode steps; see --rounds and --steps"}


def test_a_short_cache_is_left_out_of_larger_depths(fakes: Fakes) -> None:
    (short, long), skipped = take_turns([fakes.peer(16), fakes.peer(64)], 1, PLAN, lambda _: None)
    assert [one.depth for one in short.depths] == [8]
    assert [one.depth for one in long.depths] == [8, 32]
    assert skipped == {}


def test_one_that_dies_keeps_what_was_measured_and_says_why(fakes: Fakes) -> None:
    peers = [fakes.peer(62, "dies-at-0"), fakes.peer(63, "dies-at-7"), fakes.peer(64)]
    rows, skipped = take_turns(peers, 1, PLAN, lambda _: None)
    assert [(row.name, len(row.depths)) for row in rows] == [("peer 63", 1), ("peer 64", 2)]
    assert skipped == {"peer 62": "it died", "peer 63": "it died"}


def test_long_fillings_are_left_out(fakes: Fakes) -> None:
    plan = Plan(ids=range(100), prompt=8, depths=(8, 32), steps=3, rounds=2, patience=0.01)
    (row,), skipped = take_turns([fakes.peer(64)], 1, plan, lambda _: None)
    assert [one.depth for one in row.depths] == [8]
    assert "--patience" in skipped["peer 64"]


def test_a_runtime_that_is_not_installed_is_skipped_with_its_reason(tmp_path: Path) -> None:
    peer = Peer("llama.cpp", "llama.cpp", sys.executable, tmp_path / "none.gguf", 64, ())
    rows, skipped = take_turns([peer], 1, PLAN, lambda _: None)
    assert rows == []
    assert skipped == {"llama.cpp": "ModuleNotFoundError: No module named 'llama_cpp'"}


def test_what_was_not_prepared_is_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    peers, skipped = find_peers(tmp_path, {}, Environments(None), 64)
    assert peers == []
    assert skipped["llama.cpp"].startswith("its environment is not given; use --peers")
    assert "run prepare" in skipped["onnxruntime-genai"]
    assert {name.partition(" ")[0] for name in skipped} == {
        "llama.cpp",
        "LiteRT-LM",
        "onnxruntime-genai",
        "transformers",
    }


def test_a_litert_file_has_its_own_context(tmp_path: Path) -> None:
    environment = tmp_path / "litert" / "bin" / "python"
    environment.parent.mkdir(parents=True)
    environment.touch()
    for context in (1280, 4096):
        folder = tmp_path / litert_folder("block 32", context)
        folder.mkdir()
        (folder / "model.litertlm").touch()
    peers, _ = find_peers(tmp_path, {}, Environments(tmp_path), 32768)
    assert [(peer.name, peer.context, peer.path) for peer in peers] == [
        (f"LiteRT-LM block 32, {context}", context, tmp_path / litert_folder("block 32", context) / "model.litertlm")
        for context in (1280, 4096)
    ]


def test_a_failed_converter_leaves_nothing_and_gives_its_last_line(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        run([sys.executable, "-c", "import no_such_module"])

    with pytest.raises(SkippedError, match="No module named 'no_such_module'; exit code 1"):
        make(Step("a", "a", write), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("1")

    make(Step("a", "a", write), tmp_path)
    make(Step("a", "a", lambda path: pytest.fail("made again")), tmp_path)
    assert (tmp_path / "a").read_text() == "1"


def test_the_last_line_is_the_last_that_says_something() -> None:
    assert last_line("one\ntwo\n \n") == "two"
    assert last_line("") == "it printed nothing"


def test_local_layers_read_no_more_than_their_window() -> None:
    # Two local layers with a window of 8 and a global one; one KV head of 32 numbers.
    config = parse_config(CONFIG)
    row = 2 * 4 * 32
    assert cache_bytes(config, 4) == 3 * 4 * row
    assert cache_bytes(config, 100) == (2 * 8 + 100) * row


def test_the_divergence_of_equal_logits_is_zero() -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    assert divergence(logits, logits + 3) == pytest.approx(0, abs=1e-9)
    # p = (2/3, 1/3) and q = (1/2, 1/2)
    seen = divergence(np.log(np.array([2, 1], np.float32)), np.zeros(2, np.float32))
    assert seen == pytest.approx(2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3))


def test_bundles_have_names() -> None:
    assert named(["fast=a/b", "c/d"]) == {"fast": Path("a/b"), "d": Path("c/d")}
    with pytest.raises(BadInput, match="two bundles are named b"):
        named(["a/b", "b=c"])


def test_runners_are_chosen_by_parts_of_their_names() -> None:
    assert wanted("fast .pte", [], [])
    assert wanted("fast .pte", ["llama", ".pte"], ["exact"])
    assert not wanted("fast .pte", ["llama"], [])
    assert not wanted("fast .pte", [".pte"], ["fast"])
