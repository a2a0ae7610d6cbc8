import subprocess
import sys

from gemma3.host.memory import peak_rss


def test_a_large_array_shows_and_stays() -> None:
    before = peak_rss()
    assert before > 5e6
    block = bytearray(before + (64 << 20))
    assert peak_rss() >= before + (64 << 20)
    del block
    assert peak_rss() >= before + (64 << 20)


def test_a_parents_memory_does_not_count() -> None:
    code = "from gemma3.host.memory import peak_rss; print(peak_rss())"
    block = bytearray(256 << 20)
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < len(block)
