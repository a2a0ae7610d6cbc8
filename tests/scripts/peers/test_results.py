"""The arithmetic and the tables of the comparison with other runtimes."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from gemma3 import typed_json
from scripts.peers.plot import picture, round_steps
from scripts.peers.results import BASE, Depth, Results, Row, Run, figure, first_token_seconds, ratio, spread, tables

LLAMA = Row(
    name=BASE,
    version="llama-cpp-python 1",
    context=64,
    file_bytes=100_000_000,
    load_seconds=0.5,
    libraries_bytes=1 << 26,
    prefill_seconds=(1.0, 2.0, 4.0),
    depths=(Depth(8, 0, 0.0, (0.010, 0.020, 0.040), 3 << 20), Depth(32, 16, 2.0, (0.020, 0.030, 0.060), 5 << 20)),
    divergence=0.0,
)
OURS = replace(
    LLAMA,
    name="ours",
    prefill_seconds=(0.5, 1.0, 1.0),
    depths=(Depth(8, 0, 0.0, (0.005, 0.020, 0.020), 4 << 20),),
    divergence=None,
)
RUN = Run(
    model="3 layers of 64",
    machine="a machine",
    threads=2,
    prompt=8,
    steps=4,
    bandwidth=1e9,
    weight_bytes=9_000_000,
    cache_bytes={"8": 1_000_000, "32": 3_000_000},
    rows=(LLAMA, OURS),
    skipped={"another": "it is not installed"},
)


def cells(text: str, name: str) -> list[list[str]]:
    """The cells of every line of the tables that is about ``name``."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0] == name]


def test_a_ratio_compares_what_ran_in_the_same_round() -> None:
    # The machine became slower from round to round, for both: the ratio of the medians would be 1.
    assert ratio((1.0, 2.0, 4.0), (0.5, 2.0, 2.0)) == 2.0


def test_a_spread_is_half_the_range_over_the_median() -> None:
    assert spread((9.0, 10.0, 12.0)) == pytest.approx(0.15)
    assert figure((9.0, 10.0, 12.0), 1) == "10.0 ± 15 %"


def test_the_floor_is_the_time_to_read_weights_and_caches() -> None:
    assert RUN.floor_seconds(8) == pytest.approx(0.010)
    assert RUN.floor_seconds(32) == pytest.approx(0.012)
    ((_, _, _, at_8, _, at_32, _),) = cells(tables(RUN), "*least*")
    assert (at_8, at_32) == ("10.00", "12.00")


def test_the_time_of_a_long_prompt_includes_what_decoding_fed() -> None:
    # 24 of 32 tokens were read in 2 + 2 s; the other eight were decoded on the way.
    assert first_token_seconds(LLAMA, 8, 32) == pytest.approx(4.0 * 32 / 24)
    assert first_token_seconds(OURS, 8, 32) is None


def test_the_tables_have_medians_ratios_and_gaps() -> None:
    speed, prompt, memory = cells(tables(RUN), "ours")
    assert speed == ["ours", "8 ± 50 %", "2.00", "20.00 ± 38 %", "2.00", "–", "–"]
    assert prompt == ["ours", "–"]
    assert memory == ["ours", "llama-cpp-python 1", "100", "0.50", "64", "4", "–", "–"]
    assert "Skipped: another: it is not installed" in tables(RUN)


def test_without_llama_cpp_there_are_no_ratios() -> None:
    speed, *_ = cells(tables(replace(RUN, rows=(OURS,))), "ours")
    assert [speed[2], speed[4], speed[6]] == ["–"] * 3


def test_results_survive_a_file() -> None:
    results = Results((RUN,))
    assert typed_json.decode(Results, json.loads(typed_json.encode(results)), "results") == results


def test_the_picture_has_a_point_for_each_measurement() -> None:
    root = ElementTree.fromstring(picture([RUN, RUN]))
    points = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(points) == 2 * ((2 + 1 + 2) + (2 + 1))  # decode with the floor, and memory
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(0 <= float(one.attrib["cx"]) <= width and 0 <= float(one.attrib["cy"]) <= height for one in points)


@pytest.mark.parametrize(("largest", "last"), [(4.0, 4.0), (161.0, 180.0), (7.5, 8.0), (1030.0, 1200.0)])
def test_axes_end_at_or_above_the_largest_value(largest: float, last: float) -> None:
    steps = round_steps(largest)
    assert steps[0] == 0
    assert steps[-1] == pytest.approx(last)
    assert 4 <= len(steps) - 1 <= 10
