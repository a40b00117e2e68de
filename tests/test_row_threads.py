"""Rows are dealt out whole and once, by torch's team and by the pool alike, and nothing that fails goes unnoticed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import row_threads
from row_threads import compiled, deal, run_rows, team_of


@compiled()
def _count(counts, amount, start, stop):
    for i in range(start, stop):
        counts[i] += amount


@team_of(_count)
def _count_team(rows, pieces, threads, *arguments):
    return deal(_count, arguments, rows, pieces, threads)


@compiled()
def _refuse(counts, bad, start, stop):
    for i in range(start, stop):
        if i == bad:
            raise MemoryError
        counts[i] += 1


@team_of(_refuse)
def _refuse_team(rows, pieces, threads, *arguments):
    return deal(_refuse, arguments, rows, pieces, threads)


@compiled()
def _who(pieces, firsts, start, stop):
    # Which piece a row came in, by the row that it begins with.
    for i in range(start, stop):
        firsts[i] = start
    pieces[start] = stop - start


@team_of(_who)
def _who_team(rows, pieces, threads, *arguments):
    return deal(_who, arguments, rows, pieces, threads)


@pytest.fixture(params=["team", "pool"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "team" and row_threads.RUNS_IN != "team":
        pytest.skip("torch has no OpenMP here whose team can be entered")
    threads = torch.get_num_threads()
    monkeypatch.setattr(row_threads, "RUNS_IN", request.param)
    yield request.param
    torch.set_num_threads(threads)


def test_torchs_threads_are_found_on_linux() -> None:
    if sys.platform == "linux" and "parallel backend: OpenMP" in torch.__config__.parallel_info():
        assert row_threads.RUNS_IN == "team"


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 64, 1001])
@pytest.mark.parametrize("columns", [0, 1, 4096, 1 << 20])
def test_every_row_is_done_once(way: str, rows: int, columns: int, threads: int) -> None:
    torch.set_num_threads(threads)
    counts = np.full(rows, 5, np.int64)
    run_rows(_count, rows, rows * columns, counts, 3)
    assert (counts == 8).all()


def test_few_elements_are_one_piece_and_many_are_more(way: str) -> None:
    torch.set_num_threads(3)
    for elements, most in ((1000, 1), (row_threads.SMALLEST, 2), (1 << 24, 3 * row_threads.PIECES)):
        pieces, firsts = np.zeros(1000, np.int64), np.full(1000, -1, np.int64)
        run_rows(_who, 1000, elements, pieces, firsts)
        begun = np.flatnonzero(pieces)
        assert len(begun) == most and pieces.sum() == 1000
        assert (firsts == np.repeat(begun, pieces[begun])).all()
        assert np.ptp(pieces[begun]) <= 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bad", [0, 499, 999])
def test_a_row_that_has_no_memory_is_an_error(way: str, bad: int, threads: int) -> None:
    torch.set_num_threads(threads)
    counts = np.zeros(1000, np.int64)
    with pytest.raises(MemoryError):
        run_rows(_refuse, 1000, 1 << 24, counts, bad)
    assert counts[bad] == 0 and counts.max() <= 1
    # And the threads are as before.
    run_rows(_refuse, 1000, 1 << 24, counts[:], -1)
    assert counts[bad] == 1


def test_threads_of_python_have_teams_of_their_own(way: str) -> None:
    torch.set_num_threads(2)
    found: list[np.ndarray] = []

    def work() -> None:
        for _ in range(20):
            counts = np.zeros(4000, np.int64)
            run_rows(_count, 4000, 1 << 24, counts, 1)
            found.append(counts)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 60 and all((counts == 1).all() for counts in found)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchs_threads_outlive_a_small_kernel() -> None:
    """OpenMP ends threads that a smaller team has no use for; making them again takes longer than any kernel."""
    if row_threads.RUNS_IN != "team":
        pytest.skip("torch has no OpenMP here whose team can be entered")
    torch.set_num_threads(4)
    torch.ones(1 << 22).add_(1)
    before = set(os.listdir("/proc/self/task"))
    counts = np.zeros(4000, np.int64)
    for elements in (10, row_threads.SMALLEST, 1 << 24):
        run_rows(_count, 4000, elements, counts, 1)
        assert set(os.listdir("/proc/self/task")) == before
    torch.ones(1 << 22).add_(1)
    assert set(os.listdir("/proc/self/task")) == before and (counts == 3).all()
    torch.set_num_threads(1)


def test_a_forked_process_has_the_pool() -> None:
    """OpenMP waits for ever for the threads that only its parent has."""
    torch.set_num_threads(2)
    counts = np.zeros(4000, np.int64)
    run_rows(_count, 4000, 1 << 24, counts, 1)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        run_rows(_count, 4000, 1 << 24, counts, 1)
        os._exit(0 if row_threads.RUNS_IN == "pool" and (counts == 2).all() else 1)
    torch.set_num_threads(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (counts == 1).all()
