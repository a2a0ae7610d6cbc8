import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from gemma3.errors import BadInput
from gemma3.host.atomic import refuse_target, staging, sweep


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


def stay(out: Path) -> None:
    with staging(out) as directory:
        (directory / "file").write_text("half-written")
        time.sleep(600)


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    living, killed = (
        multiprocessing.get_context("spawn").Process(target=stay, args=(tmp_path / name,)) for name in ("a", "b")
    )
    for process in (living, killed):
        process.start()
    try:
        while len(list(tmp_path.glob(".*.partial/file"))) < 2:
            assert living.is_alive()
            time.sleep(0.02)
        killed.kill()
        killed.join()
        with staging(tmp_path / "c"):
            names = sorted(path.name.split(".")[1] for path in tmp_path.iterdir())
            assert names == ["a", "c"]
    finally:
        living.kill()
        living.join()
    assert killed.exitcode == -signal.SIGKILL


def test_only_our_staging_directories_are_swept(tmp_path: Path) -> None:
    for name in ("b.training", ".b.partial", ".b.0123abcd.part", ".b.0123ABCD.partial", "b.0123abcd.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".file.0123abcd.partial").write_text("not a directory")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".link.0123abcd.partial").symlink_to("elsewhere")
    before = sorted(tmp_path.iterdir())
    (tmp_path / ".b.0123abcd.partial").mkdir()
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_another_users_directory_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".b.0123abcd.partial").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep(tmp_path)
    assert (tmp_path / ".b.0123abcd.partial").is_dir()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / ".b.0123abcd.partial").mkdir()
    with staging(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.0123abcd.partial", "out"]


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "\n", ".hidden"])
def test_any_name_that_the_file_system_takes(tmp_path: Path, name: str) -> None:
    with staging(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="File name too long; choose a shorter -o"):
        refuse_target(tmp_path / ("n" * 300))
