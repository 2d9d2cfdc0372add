"""A run of batches from the driver's side: what is left to do, again after a failure, and run.json at the end.

The ledger says what is there. The same command again goes on from it, whatever ended the last one.
"""

from __future__ import annotations

import fcntl
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydrarun.config import batches
from hydrarun.config.batches import Config
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.progress import Progress
from hydrarun.engine.runs.batch_ledger import Book
from hydrarun.outputs.writer import now, write_run

LOCK = ".lock"

#: pictures, videos and run.json under their temporary names
HALF_WRITTEN = (".[0-9][0-9][0-9][0-9]*-*.tmp", ".run.json.*.tmp")

#: a job for this process or its ranks: to draw what is `left` into `output_dir`
Do = Callable[[dict[str, Any]], None]


def run(config: Config, folder: Path, do: Do) -> dict[str, Any]:
    """Draw into `folder` what is not there yet; returns run.json.

    Raises RunError if any picture could not be made, after all others are; what `do` raises before it begins with a
    picture; and UsageError of one, which may well be that of others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        clear_away(folder)
        todo = Todo(config, folder, Progress())
        created = now()
        with told(todo, created):
            todo.work(do)
        record = write_run(folder, todo.book().summary(created, todo.done(), None))
    todo.progress.table(record, folder)
    if record["status"] == "failed":
        raise RunError(f"{record['error']['message']}\nThe same command again tries them: {folder}")
    return record


@contextmanager
def told(todo: Todo, created: str) -> Iterator[None]:
    """Where the block is left by an exception, Ctrl-C too, run.json says what is there."""
    try:
        yield
    except BaseException as error:
        if todo.book().rows("begun"):
            write_run(todo.folder, todo.book().summary(created, todo.done(), error))
        raise


class Todo:
    """What is left of a run."""

    def __init__(self, config: Config, folder: Path, progress: Progress) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.items = batches.items(config)
        self.every = batches.together(self.items, batches.limit(config))
        self.names = self.book().names(self.items)
        self.known: dict[int, dict[str, Any]] = {}

    def book(self) -> Book:
        """The ledger as it is now: a rank may have added to it."""
        return Book(self.folder, self.config)

    def done(self) -> dict[int, dict[str, Any]]:
        """The records of what is there, by their places."""
        self.known = self.book().done(self.names, self.known)
        return self.known

    def left(self, among: Sequence[int]) -> dict[int, list[int]]:
        """Of these batches, by their numbers, the places of pictures that are not there.

        What was begun before comes last: if it takes the process down with it, the others are there by then.
        """
        done, begun = self.done(), self.book().begun()
        left = {number: [item.index for item in self.every[number] if item.index not in done] for number in among}
        order = sorted(left, key=lambda number: begun[self.every[number][0].index])
        return {number: left[number] for number in order if left[number]}

    def work(self, do: Do) -> None:
        """Draw everything; what failed again as often as `retry` says."""
        self.tell()
        for attempt in range(self.config["retry"] + 1):
            left = self.left(range(len(self.every)))
            if not left:
                return
            if attempt:
                self.progress.note(
                    f"once more, {attempt} of {self.config['retry']}: {sum(map(len, left.values()))} failed"
                )
            if not self.through(do, left) and self.config["fail_fast"]:
                return

    def through(self, do: Do, left: dict[int, list[int]]) -> bool:
        """Draw these batches, and go on behind one that fails; whether none did."""
        before = len(self.book().rows("failed"))
        while left:
            rows = len(self.book().ledger.rows)
            try:
                do({"output_dir": str(self.folder), "left": {str(number): places for number, places in left.items()}})
                break
            except OSError:
                raise
            except Exception as error:
                number = self.culprit(rows)
                if number is None:  # nothing was begun
                    raise
                self.failed(number, error, rows)
                if isinstance(error, UsageError):  # the others may well fail alike
                    raise UsageError(f"{self.place(number)}{error}") from None
                if self.config["fail_fast"]:
                    break
                numbers = list(left)
                left = self.left(numbers[numbers.index(number) + 1 :])
        return len(self.book().rows("failed")) == before

    def culprit(self, rows: int) -> int | None:
        """The number of the batch that was drawn last since the ledger had so many rows; None: there was none."""
        drawing = [row["drawing"] for row in self.book().ledger.rows[rows:] if "drawing" in row]
        if not drawing:
            return None
        return next(number for number, batch in enumerate(self.every) if batch[0].index == drawing[-1][0])

    def place(self, number: int) -> str:
        """The line that a batch begins with, to say what is wrong there."""
        line = self.every[number][0].line
        return f"line {line} of input.prompts: " if line else ""

    def failed(self, number: int, error: Exception, rows: int) -> None:
        """Keep and say that a batch failed, if a rank did not since the ledger had so many rows."""
        book, places = self.book(), self.left([number]).get(number, [])
        known = {place for row in book.ledger.rows[rows:] if "failed" in row for place in row["failed"]["indices"]}
        if new := [place for place in places if place not in known]:
            book.fail(new, error)
            foreseen = isinstance(error, (RunError, UsageError))
            said = str(error) if foreseen else "".join(traceback.format_exception(error)).rstrip()
            self.progress.note(f"failed: {said}")

    def tell(self) -> None:
        """Say what is there already."""
        done, book = self.done(), self.book()
        if gone := book.broken(self.names, done):
            self.progress.note(f"drawn again, because the file is gone or not what was written: {', '.join(gone)}")
        if done:
            known = f"{len(done)} of {len(self.items)} are there and verified"
            self.progress.note(f"{known}, {len(self.items) - len(done)} to draw: {self.folder}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from drawing into the same folder meanwhile. Raises UsageError."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{folder}: another process is drawing into it; wait for it, or hydra.run.dir=…") from None
        yield


def clear_away(folder: Path) -> None:
    """Take away what a process that was killed had half written; in a folder of the user's nothing else."""
    for pattern in HALF_WRITTEN:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
