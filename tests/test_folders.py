"""Folders are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from on_disk import listing

from multum.core.folders import cache_home, check_writable, digest, read_json, whole_folder, write_json
from multum.errors import InputError, MultumError


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as work:
        (work / "a.txt").write_text(text, encoding="utf-8")


def test_it_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "target") as work:
        (work / "a.txt").write_text("one", encoding="utf-8")
        assert not (tmp_path / "deep" / "target").exists()
    assert listing(tmp_path) == ["deep", "deep/target", "deep/target/a.txt"]


def test_it_replaces_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "target", "one")
    (tmp_path / "target" / "b.txt").touch()
    fill(tmp_path / "target", "two")
    assert listing(tmp_path) == ["target", "target/a.txt"]
    assert (tmp_path / "target" / "a.txt").read_text(encoding="utf-8") == "two"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "target", "one")

    def fail() -> None:
        with whole_folder(tmp_path / "target") as work:
            (work / "a.txt").write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail()
    assert listing(tmp_path) == ["target", "target/a.txt"]
    assert (tmp_path / "target" / "a.txt").read_text(encoding="utf-8") == "one"


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_leftovers_of_killed_processes_are_swept_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    dead, alive = dead_process(), os.getppid()
    for process in (dead, alive):
        (tmp_path / f".target.{process}.part").mkdir()
    (tmp_path / ".target.notes.part").mkdir()
    fill(tmp_path / "target", "one")
    assert listing(tmp_path) == [f".target.{alive}.part", ".target.notes.part", "target", "target/a.txt"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "target", "one")
    (tmp_path / "target").rename(tmp_path / f".target.{dead_process()}.old")
    with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "target"):
        raise ValueError("stop")
    assert (tmp_path / "target" / "a.txt").read_text(encoding="utf-8") == "one"


FULL_DISK = """
import resource, signal, sys
import tiny
from multum.errors import MultumError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = tiny.model()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save(sys.argv[1])
except MultumError as error:
    print(error)
"""


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """The system refuses to write more than 20,000 bytes, less than the weights take."""
    tests = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=tests)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {tmp_path / 'model'}" in done.stdout
    assert listing(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MultumError, match="cannot write"), whole_folder(tmp_path / "file" / "target"):
        pass
    with pytest.raises(MultumError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, None]})
    assert read_json(path) == {"ü": [1, None]}
    assert listing(tmp_path) == ["a.json"]
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path / "b.json")
    path.write_text(json.dumps({"a": 1})[:-1], encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        read_json(path)


def test_digests_depend_on_content_and_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one", encoding="utf-8")
    assert digest("one", b"two") == digest(b"one", "two")
    assert digest(tmp_path / "a") == digest("one")
    assert len({digest("one", "two"), digest("two", "one"), digest("onetwo"), digest("one")}) == 4


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MULTUM_CACHE", str(tmp_path))
    assert cache_home() == tmp_path
    monkeypatch.delenv("MULTUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "multum"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "multum"


def test_a_place_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "down")
    assert listing(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file is a file, so that .* cannot be a folder"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(Path("/proc/multum/run"))
