"""Builds the C++ kernels for the CPU it runs on, once, and keeps the library in a cache.

The library is never shipped: `-march=native` makes it as fast as the CPU allows, and the cache's key (sources, flags,
and the compiler's own macros, which name its version and every instruction set it will use) keeps it from other CPUs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
# No contraction and no reassociation: what the source says is what every row computes.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off")
TIMEOUT_S = 300.0


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why. Plain kernels do the same work more slowly."""


@dataclass(frozen=True, slots=True)
class Library:
    """A built library. `key` names sources, flags, compiler and instruction sets; `compiler` is for people."""

    path: Path
    key: str
    compiler: str


def cache_dir() -> Path:
    """Where libraries are kept: `$UNDERSTUDY_CACHE`, else `~/.cache/understudy` (`$XDG_CACHE_HOME` respected).

    Raises:
        BuildError: none of them is set and this user has no home.
    """
    root = os.environ.get("UNDERSTUDY_CACHE")
    if root:
        return Path(root) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "understudy" / "kernels"
    except RuntimeError as error:  # a user without an entry, as in containers, and without $HOME
        raise BuildError(f"there is no place to keep the kernels: {error}; set UNDERSTUDY_CACHE") from error


def find_compiler() -> list[str]:
    """The C++ compiler's command: `$CXX` (which may hold arguments), else g++, else clang++.

    Raises:
        BuildError: none is there.
    """
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"CXX={named!r} is not a command; unset it or name a C++17 compiler")
        return command
    for name in ("g++", "clang++"):
        path = shutil.which(name)
        if path:
            return [path]
    raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++); install g++ for the fast kernels")


def build() -> Library:
    """The library for this CPU: from the cache, or built now (some seconds). Of processes that race one builds, and the
    others wait for it.

    Raises:
        BuildError: no compiler, or it failed; the message carries what it said.
    """
    compiler = find_compiler()
    macros = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    version = _version(macros)
    digest = hashlib.sha256()
    for part in (" ".join(FLAGS), macros, *_texts()):
        digest.update(hashlib.sha256(part.encode()).digest())
    key = digest.hexdigest()[:24]
    path = cache_dir() / f"{key}.so"
    if not path.exists():
        with _one_at_a_time(path):
            if not path.exists():
                _compile(compiler, path)
    return Library(path, key, version)


def build_ahead() -> threading.Thread:
    """Begins to build, or to find, the library in a thread of its own. Whoever loads it waits, or hears what failed."""

    def attempt() -> None:
        with suppress(BuildError):
            build()

    thread = threading.Thread(target=attempt, name="kernels", daemon=True)
    thread.start()
    return thread


def load() -> tuple[ctypes.CDLL, Library]:
    """The loaded library. A cached file that cannot be loaded is built once more.

    Raises:
        BuildError: it can be neither built nor loaded.
    """
    library = build()
    try:
        return ctypes.CDLL(str(library.path)), library
    except OSError:
        library.path.unlink(missing_ok=True)
    library = build()
    try:
        return ctypes.CDLL(str(library.path)), library
    except OSError as error:
        raise BuildError(f"{library.path} was built but cannot be loaded: {error}") from error


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """A replica's ranks and hosts start together. Where there are no file locks, all build, and the last one wins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise BuildError(f"cannot write the kernel library {path}: {error}; set UNDERSTUDY_CACHE") from error
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _texts() -> list[str]:
    files = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    return [text for p in files for text in (p.name, p.read_text(encoding="utf-8"))]


def _version(macros: str) -> str:
    defined = dict(line.split(" ", 2)[1:] for line in macros.splitlines() if line.count(" ") >= 2)
    name = "clang" if "__clang__" in defined else "gcc"
    return f"{name}-{defined.get('__VERSION__', 'unknown').strip(chr(34)).split()[-1 if name == 'clang' else 0]}"


def _compile(compiler: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
            sources = sorted(SOURCES.glob("*.cpp"))
            objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
            commands = [[*compiler, *FLAGS, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                list(pool.map(_run, commands))
            built = Path(folder) / path.name
            _run([*compiler, *FLAGS, "-shared", *objects, "-o", str(built)])
            os.replace(built, path)  # whoever comes last wins, and all wrote the same
    except OSError as error:
        raise BuildError(f"cannot write the kernel library {path}: {error}; set UNDERSTUDY_CACHE") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout
