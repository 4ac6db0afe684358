"""Building and caching the kernels, with a compiler that is a script and counts its calls."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers.kernels import build

# Answers -dM with a macro, compiles by touching the output, and writes a line for each call.
COMPILER = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  *-dM*) echo '#define __VERSION__ "1.2.3"'; exit 0;;
esac
{behaviour}
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str = "") -> Path:
    """A compiler as $CXX and an empty cache; returns the log of its calls."""
    log, compiler = folder / "calls", folder / "compiler"
    log.touch()
    compiler.write_text(COMPILER.format(log=log, behaviour=behaviour))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(folder / "cache"))
    return log


def compiled(log: Path) -> int:
    return sum("-dM" not in line for line in log.read_text().splitlines())


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(tmp_path, monkeypatch)
    first = build.build()
    calls = compiled(log)
    assert calls == len(list(build.SOURCES.glob("*.cpp"))) + 1  # each source, and the link
    assert first.path.read_text() == "library\n"
    assert first.compiler == "gcc-1.2.3"
    assert build.build() == first
    assert compiled(log) == calls
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]  # nothing left beside it


def test_a_build_ahead_is_the_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(tmp_path, monkeypatch)
    build.build_ahead().join(60)
    calls = compiled(log)
    assert calls
    build.build()
    assert compiled(log) == calls
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.build_ahead().join(60)  # whoever loads the library is told
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.build()


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", sources)
    first = build.build()
    (sources / "a.h").write_text("int b;")
    assert build.build().key != first.key


def test_of_builders_that_race_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(tmp_path, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        built = [future.result() for future in [pool.submit(build.build) for _ in range(4)]]
    assert len(set(built)) == 1
    assert compiled(log) == len(list(build.SOURCES.glob("*.cpp"))) + 1
    assert [p.name for p in built[0].path.parent.iterdir()] == [built[0].path.name]


def test_what_the_compiler_says_reaches_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, behaviour="echo 'no such instruction' >&2; exit 3")
    with pytest.raises(build.BuildError, match=r"status 3:\nno such instruction"):
        build.build()
    assert not list(build.cache_dir().glob("*.so"))


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(build.BuildError, match="install g\\+\\+"):
        build.build()
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.build()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(build.BuildError, match="UNDERSTUDY_CACHE"):
        build.build()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("UNDERSTUDY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(build.BuildError, match=r"home directory.*UNDERSTUDY_CACHE"):
        build.build()


def test_a_library_that_does_not_load_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(tmp_path, monkeypatch)
    broken = build.build()
    calls = compiled(log)
    with pytest.raises(build.BuildError, match="cannot be loaded"):
        build.load()
    assert compiled(log) == 2 * calls
    assert broken.path.exists()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    assert build.cache_dir() == tmp_path / "kernels"
    monkeypatch.delenv("UNDERSTUDY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "understudy" / "kernels"
