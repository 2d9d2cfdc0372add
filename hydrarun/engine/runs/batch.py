"""The driver's side of a run of batches: sends missing pictures to the ranks, retries failed ones, writes run.json.

The ledger records which pictures exist. The same command continues from it, however the last one ended.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydrarun.config import batches
from hydrarun.config.batches import BatchJob, Config, PendingBatch
from hydrarun.core.errors import RunError, UsageError, WriteError
from hydrarun.core.progress import Progress
from hydrarun.engine.runs.batch_ledger import BatchLedger
from hydrarun.outputs.writer import current_timestamp, write_run

#: temporary names of pictures, videos and run.json
HALF_WRITTEN = (".[0-9][0-9][0-9][0-9]*-*.tmp", ".run.json.*.tmp")

#: runs a `BatchJob` (as JSON) in this process or on the ranks
DoJob = Callable[[dict[str, Any]], Any]


def run_batches(config: Config, folder: Path, do_job: DoJob) -> dict[str, Any]:
    """Draw every picture that is not in `folder` yet; return the content of run.json. The caller has locked `folder`.

    Raises RunError at the end if any picture failed. Stops at once and raises the error of `do_job` if it fails before
    any batch starts, or with a UsageError, which other batches would probably raise too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_half_written(folder)
    plan = BatchPlan(config, folder, Progress())
    created = current_timestamp()
    try:
        with recording_failures(lambda: plan, created):
            plan.draw_all(do_job)
        record = write_run(folder, plan.summarize(created, None))
    except WriteError as error:
        saved = f"{len(plan.find_done())} of {len(plan.items)} are saved"
        raise WriteError(f"{error}; {saved}. Run the same command again to draw the others: {folder}") from None
    if record["batches"]:  # else there are no times to show
        plan.progress.table(record, folder)
    if record["status"] == "failed":
        said = record["error"]["message"].split("\n")
        raise RunError(*said, f"Run the same command again to retry them: {folder}")
    return record


@contextmanager
def recording_failures(open_plan: Callable[[], BatchPlan], created: str) -> Iterator[None]:
    """Write run.json if the block raises, Ctrl-C included, after any process was ready to draw.

    `open_plan` is called only if the block raises.
    """
    try:
        yield
    except BaseException as error:
        plan = open_plan()
        if plan.ledger.select_rows("begun"):
            with suppress(WriteError):  # the disk is full, which `error` says, or will: the ledger has everything
                write_run(plan.folder, plan.summarize(created, error))
        raise


class BatchPlan:
    """The items and batches of a run, and its ledger: which pictures exist, and which are missing."""

    def __init__(self, config: Config, folder: Path, progress: Progress) -> None:
        """Open the ledger. Raises UsageError as `BatchLedger` does."""
        self.config = config
        self.folder = folder
        self.progress = progress
        self.items = batches.list_items(config)
        self.batches = batches.group_batches(self.items, batches.max_batch_size(config))
        self.ledger = BatchLedger(folder, config)
        self.file_names = self.ledger.name_files(self.items)
        self.verified: dict[int, dict[str, Any]] = {}

    def find_done(self) -> dict[int, dict[str, Any]]:
        """Return the records of existing pictures, by index. A file that was verified is not read again."""
        self.verified = self.ledger.find_done(self.file_names, self.verified)
        return self.verified

    def find_missing(self, numbers: Iterable[int]) -> list[PendingBatch]:
        """Return the incomplete ones of these batches.

        Batches that were started before come last: if one of them ends the process, the others are already done.
        """
        done, starts = self.find_done(), self.ledger.count_starts()
        order = sorted(numbers, key=lambda number: starts[self.batches[number][0].index])
        pending = [
            PendingBatch(number, items, tuple(item.index for item in items if item.index not in done))
            for number, items in ((number, self.batches[number]) for number in order)
        ]
        return [batch for batch in pending if batch.missing]

    def draw_all(self, do_job: DoJob) -> None:
        """Draw all missing pictures, and retry failed ones up to `retry` times."""
        self.print_done()
        for attempt in range(self.config["retry"] + 1):
            pending = self.find_missing(range(len(self.batches)))
            if not pending:
                return
            if attempt:
                count = sum(len(batch.missing) for batch in pending)
                self.progress.note(f"retry {attempt} of {self.config['retry']}: {count} failed")
            if not self.draw_once(do_job, pending) and self.config["fail_fast"]:
                return

    def draw_once(self, do_job: DoJob, pending: list[PendingBatch]) -> bool:
        """Draw these batches, and continue after one that fails. Returns whether no picture failed."""
        failures = len(self.ledger.select_rows("failed"))
        while pending:
            row_count = self.ledger.row_count
            try:
                self.send_job(do_job, pending)
                break
            except (OSError, WriteError):
                raise
            except Exception as error:
                number = self.find_last_begun(row_count)
                if number is None:
                    raise
                self.record_failure(number, error, row_count)
                if isinstance(error, UsageError):  # the other batches would probably fail too
                    raise UsageError(*f"{self.format_line(number)}{error}".split("\n")) from None
                if self.config["fail_fast"]:
                    break
                numbers = [batch.number for batch in pending]
                pending = self.find_missing(numbers[numbers.index(number) + 1 :])
        return len(self.ledger.select_rows("failed")) == failures

    def send_job(self, do_job: DoJob, pending: list[PendingBatch]) -> None:
        """Send these batches to be drawn, then read the rows that rank 0 added to the ledger, also after a failure."""
        job = BatchJob(self.folder, pending, len(self.batches))
        try:
            do_job(job.to_json(self.config))
        finally:
            self.ledger.refresh()

    def find_last_begun(self, row_count: int) -> int | None:
        """Return the number of the last batch started since the ledger had `row_count` rows; None if there was none."""
        drawing = self.ledger.select_rows("drawing", row_count)
        if not drawing:
            return None
        return next(number for number, items in enumerate(self.batches) if items[0].index == drawing[-1][0])

    def format_line(self, number: int) -> str:
        """Return the start of a message about a batch: the line of its first item; empty without a file of prompts."""
        line = self.batches[number][0].line
        return f"line {line} of input.prompts: " if line else ""

    def record_failure(self, number: int, error: Exception, row_count: int) -> None:
        """Record and print that a batch failed, unless a rank has recorded it since the ledger had `row_count` rows."""
        recorded = {index for row in self.ledger.select_rows("failed", row_count) for index in row["indices"]}
        missing = [index for batch in self.find_missing([number]) for index in batch.missing]
        if new := [index for index in missing if index not in recorded]:
            self.ledger.record_failure(new, error)
            expected = isinstance(error, (RunError, UsageError))
            text = str(error) if expected else "".join(traceback.format_exception(error)).rstrip()
            for line in f"failed: {text}".split("\n"):
                self.progress.note(line)

    def print_done(self) -> None:
        """Print how many pictures exist, and which files must be drawn again."""
        done = self.find_done()
        if broken := self.ledger.list_broken(self.file_names, done):
            self.progress.note(f"drawn again, because the file is missing or changed: {', '.join(broken)}")
        if done:
            known = f"{len(done)} of {len(self.items)} are there and verified"
            self.progress.note(f"{known}, {len(self.items) - len(done)} to draw: {self.folder}")

    def summarize(self, created: str, stopped: BaseException | None) -> dict[str, Any]:
        """Return the content of run.json so far. `stopped`: the error that ended the run early."""
        return self.ledger.summarize(self.items, self.find_done(), created, stopped)


def remove_half_written(folder: Path) -> None:
    """Remove the temporary files that a killed run left. The user's own files stay."""
    for pattern in HALF_WRITTEN:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
