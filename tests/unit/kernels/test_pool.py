"""The kernels' thread pool, through a kernel that cuts its work into pieces: forks, sizes, callers at once, exit."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from workers.kernels.build import BuildError, load

PRELUDE = """
import ctypes, os, threading
from workers.kernels.build import load

lib = load()[0]
rows, n = 4, 20000
x = (ctypes.c_float * (rows * n))(*(float(i % 7919) for i in range(rows * n)))
want = bytes()

def logprobs():
    out = (ctypes.c_float * (rows * n))()
    lib.understudy_logprobs(0, x, ctypes.c_long(n), out, ctypes.c_long(rows), ctypes.c_long(n))
    return bytes(out)

lib.understudy_set_threads(2)
want = logprobs()
"""


def run(code: str) -> None:
    """Runs code after PRELUDE in a process of its own, which has to end by itself and well."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    try:
        load()
    except BuildError as reason:
        pytest.skip(str(reason))


def test_every_size_gives_the_same_bits() -> None:
    run("""
        for count in (1, 2, 3, 5, 2):
            lib.understudy_set_threads(count)
            assert lib.understudy_threads() == count
            for _ in range(20):
                assert logprobs() == want
        lib.understudy_set_threads(0)
        assert lib.understudy_threads() == len(os.sched_getaffinity(0))
    """)


def test_a_forked_child_gets_threads_of_its_own() -> None:
    run("""
        child = os.fork()
        if child == 0:
            os._exit(0 if logprobs() == want and lib.understudy_threads() == 2 else 1)
        assert logprobs() == want
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


def test_a_forked_child_ends_as_any_other_process() -> None:
    run("""
        child = os.fork()
        if child == 0:
            assert logprobs() == want
            raise SystemExit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """)


def test_the_caller_takes_part_however_many_jobs_there_were() -> None:
    """A job's number has 32 bits, and the first is close to the last: 300 jobs go beyond it."""
    run("""
        run_pieces = lib._ZN10understudy10run_piecesEllPFvPvllES0_
        run_pieces.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        meeting, seen = threading.Barrier(2), []

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
        def meet(context, begin, end):
            try:
                meeting.wait(20)  # a piece ends when the other one has begun, in another thread
                seen.append(begin)
            except threading.BrokenBarrierError:
                pass

        for job in range(300):
            run_pieces(2, 1, meet, None)
            assert sorted(seen) == [0, 1], f"job {job}"
            seen.clear()
    """)


def test_threads_that_sleep_wake_up() -> None:
    run("""
        lib.understudy_set_spin.argtypes = [ctypes.c_double]
        lib.understudy_set_spin(0.0)
        for _ in range(200):
            assert logprobs() == want
    """)


def test_several_callers_at_once() -> None:
    run("""
        results = []
        callers = [threading.Thread(target=lambda: results.extend(logprobs() for _ in range(20))) for _ in range(4)]
        for caller in callers:
            caller.start()
        lib.understudy_set_threads(3)
        for caller in callers:
            caller.join()
        assert len(results) == 80 and set(results) == {want}
    """)
