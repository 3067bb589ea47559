"""Run trials side by side with a progress bar, and keep their rows in a file so that a killed run continues."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from wcr_optim.files import written_whole

try:
    import fcntl
except ImportError:  # no such locks on this system: one command at a time then
    fcntl = None

T = TypeVar("T")
Row = dict[str, Any]

_steps_done: Any = None


def run(
    work: Callable[..., list[Row]],
    trials: Sequence[T],
    steps: Callable[[T], int],
    jobs: int,
    done: Callable[[list[Row]], None] = lambda rows: None,
    unit: str = "step",
) -> list[list[Row]]:
    """Run trials on one thread each, with a bar over all their steps and the time left.

    Args:
        work: Called with a trial and a function without arguments to be called after every step; returns rows. It and
            the trials are sent to other processes.
        trials: What to run, begun in this order.
        steps: How many steps a trial takes.
        jobs: Processes side by side. A single one is this process, which starts faster and can be debugged.
        done: Called with the rows of each trial as it ends (default: nothing)
        unit: What the bar counts (default: "step")

    Returns:
        The rows of each trial, in the trials' order.
    """
    if not trials:
        return []
    with tqdm(
        total=sum(map(steps, trials)),
        unit=unit,
        desc="training",
        dynamic_ncols=True,
        smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:
        return _in_turn(work, trials, done, bar) if jobs == 1 else _side_by_side(work, trials, jobs, done, bar)


def _in_turn(
    work: Callable[..., list[Row]], trials: Sequence[T], done: Callable[[list[Row]], None], bar: Any
) -> list[list[Row]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = []
        for trial in trials:
            result.append(work(trial, bar.update))
            done(result[-1])
        return result
    finally:
        torch.set_num_threads(threads)


def _side_by_side(
    work: Callable[..., list[Row]], trials: Sequence[T], jobs: int, done: Callable[[list[Row]], None], bar: Any
) -> list[list[Row]]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(counter, jobs)) as pool:
        futures = [pool.submit(_in_process, work, trial) for trial in trials]
        pending = set(futures)
        try:
            while pending:
                ended, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in sorted(ended, key=_raised):  # what has ended well is kept, whatever ended beside it
                    done(future.result())
        finally:
            if pending:  # an error or an interruption: runs of minutes are not waited for, and leave no rows
                processes = list((pool._processes or {}).values())  # which the pool forgets as it shuts down
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.join()
                    while process.exitcode is None:  # the pool's thread was first to reap it, and has yet to say so
                        time.sleep(0.001)
    return [future.result() for future in futures]


def _raised(future: Future[list[Row]]) -> bool:
    return future.exception() is not None


def _start(counter: Any, jobs: int) -> None:
    global _steps_done
    _steps_done = counter
    torch.set_num_threads(1)
    # Read when a task is first compiled: as many compilers as there are cores, rather than as many for each process.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed without a chance to end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_process(work: Callable[..., list[Row]], trial: Any) -> list[Row]:
    return work(trial, _count)


def _count() -> None:
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += 1


class Results:
    """A CSV file of rows; those of one trial are added all at once or not at all, whatever kills the process.

    Commands side by side may share a file.

    Args:
        path: The file; it need not exist.
        columns: Its columns.
        key: Those that tell trials apart.
        numbers: Those that hold a number or nothing (default: none)
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str], numbers: Sequence[str] = ()) -> None:
        self.path, self.columns, self.key, self.numbers = path, tuple(columns), tuple(key), tuple(numbers)

    def read(self) -> list[dict[str, str]]:
        """Return all rows.

        Raises:
            ValueError: If the file has other columns, or a line of it is damaged.

        """
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(f"{self.path} has other columns than this version writes; name another file")
            try:
                rows = list(reader)
            except csv.Error as error:
                raise ValueError(f"line {reader.line_num} of {self.path} is damaged: {error}") from error
        for number, row in enumerate(rows, start=2):
            if None in row or None in row.values() or not all(_is_number(row[name]) for name in self.numbers):
                raise ValueError(
                    f"line {number} of {self.path} is damaged: {','.join(map(str, row.values()))[:80]!r}; delete all "
                    f"lines of that run, which is then run again, or name another file"
                )
        return rows

    def keys(self) -> set[tuple[str, ...]]:
        """Return the keys of the trials that the file holds."""
        return {tuple(row[name] for name in self.key) for row in self.read()}

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one trial, nothing if the file has them by now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if tuple(str(rows[0][name]) for name in self.key) in self.keys():
                return
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            if not self.path.exists():
                writer.writeheader()
            writer.writerows(rows)
            before = self.path.read_bytes() if self.path.exists() else b""
            before += b"\n" if before and not before.endswith(b"\n") else b""  # an editor may have left out the last
            with written_whole(self.path) as temporary:
                temporary.write_bytes(before + text.getvalue().encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def run_missing(
    work: Callable[..., list[Row]],
    trials: Sequence[Any],
    steps: Callable[[Any], int],
    results: Results,
    jobs: int,
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Run those trials whose rows a file does not hold yet, and add them as each ends.

    Args:
        work: As for `run`.
        trials: What to run, with a `key` each.
        steps: As for `run`.
        results: Where the rows are.
        jobs: As for `run`.
        prepare: Called once, if anything is to run: what all of them need, done by this process with all cores rather
            than by each of the others with one (default: nothing)
    """
    held, trials = results.keys(), list(dict.fromkeys(trials))
    missing = [trial for trial in trials if trial.key not in held]
    print(f"{len(trials) - len(missing)} of {len(trials)} runs are in {results.path} already", flush=True)
    if not missing:
        return
    started = time.perf_counter()
    prepare()
    run(work, missing, steps, jobs, results.append)
    print(f"{len(missing)} runs in {time.perf_counter() - started:.0f} s", flush=True)
