import os
from pathlib import Path

import pytest

from gemma3.errors import BadInput
from gemma3.host.atomic import refuse_target, staging


def test_the_directory_appears_whole(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as directory:
        (directory / "file").write_text("text")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "text"


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staging(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_it_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"), staging(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(BadInput, match=r"cannot write there \(Read-only file system\)"), staging(tmp_path / "out"):
        pass


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists"), staging(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="exists"):
        refuse_target(tmp_path / "out")


def test_a_parent_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        refuse_target(tmp_path / "missing" / "out")


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not stop root, which tests may run as.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadInput, match="not writable"):
        refuse_target(tmp_path / "out")
