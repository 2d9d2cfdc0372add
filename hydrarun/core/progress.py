"""What a user sees during a run: bars on a terminal, plain lines in a log, and a closing table.

Everything goes to stderr, so that stdout stays free for results.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from hydrarun.core.printable import find_raw_stream, make_printable, printable_output

TIMINGS = {
    "load_s": "load weights",
    "warmup_s": "warm up",
    "compile_s": "compile",
    "encode_s": "encode prompt",
    "denoise_s": "denoise",
    "decode_s": "decode",
    "save_s": "save",
    "total_s": "total",
    "quality_s": "measure quality (not in total)",
}

#: name, digits, unit
MEASURES = {"psnr": ("PSNR", 1, " dB"), "ssim": ("SSIM", 4, ""), "snr": ("SNR", 1, " dB")}


#: seconds between lines about bytes in a log
SECONDS_BETWEEN_LINES = 10.0


class RawConsole(Console):
    """Writes to stderr, below the filter of control characters: bars consist of them."""

    @property  # type: ignore[misc]
    def file(self) -> IO[str]:  # type: ignore[override]
        """The stream of the moment; tests and redirections replace it."""
        return find_raw_stream(sys.stderr)


class ByteCounter:
    """Counts the bytes to read and the bytes read, and the seconds since it was made. Thread-safe."""

    def __init__(self, show: Callable[[ByteCounter], None]) -> None:
        """`show` is called with this counter after each change, by one thread at a time."""
        self.show = show
        self.lock = threading.Lock()
        self.start = time.perf_counter()
        self.expected = self.done = 0

    def expect(self, count: int) -> None:
        """Add `count` to the bytes to read."""
        with self.lock:
            self.expected += count
            self.show(self)

    def add(self, count: int) -> None:
        """Add `count` to the bytes read."""
        with self.lock:
            self.done += count
            self.show(self)

    @property
    def seconds(self) -> float:
        """Seconds since the counter was made."""
        return time.perf_counter() - self.start

    def __str__(self) -> str:
        seconds = self.seconds
        of = f" of {decimal(self.expected)}" if self.done < self.expected else ""
        return f"{decimal(self.done)}{of} in {seconds:.2f} s, {decimal(int(self.done / seconds))}/s"


class Progress:
    """Shows the user how far a run is. One phase at a time."""

    def __init__(self, console: Console | None = None, quiet: bool = False):
        """`console`: where to write instead of stderr; `quiet`: print nothing."""
        self.console = console or RawConsole(quiet=quiet)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show the phase `name` while the block runs; yields a function to call after each of `total` steps."""
        with (self._bar if self.console.is_terminal else self._lines)(name, total) as advance:
            yield advance

    @contextmanager
    def reading(self, name: str) -> Iterator[ByteCounter]:
        """Show the phase `name`, which reads files, while the block runs; yields the `ByteCounter` to update."""
        with (self._reading_bar if self.console.is_terminal else self._reading_lines)(name) as tally:
            yield tally

    def note(self, text: str) -> None:
        """Print a line that the user must see: a choice made for them, a warning."""
        self.console.print(make_printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line about something that makes the result differ from what the user may expect."""
        self.note(text)

    def table(self, record: dict[str, Any], folder: Path = Path()) -> None:
        """Print the closing table of a run: stage timings, steps, memory, quality, and the files in `folder`.

        `record`: the content of run.json (docs/outputs.md).
        """
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for label, value in _summary_rows(record):
            table.add_row(label, value)
        self.console.print(table)
        for output in record["outputs"]:
            self.note(str(folder / output["path"]))

    @contextmanager
    def _show_bars(self, *columns: ProgressColumn) -> Iterator[Bars]:
        """Show bars while the block runs. Other output goes above them, through rich, which would obey its escapes."""
        with Bars(*columns, console=self.console, transient=True) as bars, printable_output():
            yield bars

    @contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        text, elapsed = TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        steps = (BarColumn(), MofNCompleteColumn(), elapsed, TextColumn("left"), TimeRemainingColumn())
        columns = (text, *steps) if total else (SpinnerColumn(), text, elapsed)
        with self._show_bars(*columns) as bars:
            task = bars.add_task(name, total=total)
            yield lambda: bars.advance(task)

    @contextmanager
    def _lines(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        start = time.perf_counter()
        done = 0
        shown = {1, total, *(round(total * tenth / 10) for tenth in range(1, 10))} if total else set()

        def advance() -> None:
            nonlocal done
            done += 1
            if done in shown:
                self.note(f"{name} {done}/{total}, {(time.perf_counter() - start) / done:.3g} s/step")

        self.note(f"{name} ...")
        yield advance
        self.note(f"{name}: {time.perf_counter() - start:.2f} s")

    @contextmanager
    def _reading_bar(self, name: str) -> Iterator[ByteCounter]:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with self._show_bars(*columns, TimeElapsedColumn()) as bars:
            task = bars.add_task(name, total=None)
            yield ByteCounter(lambda tally: bars.update(task, total=tally.expected, completed=tally.done))

    @contextmanager
    def _reading_lines(self, name: str) -> Iterator[ByteCounter]:
        shown = 0.0

        def show(tally: ByteCounter) -> None:
            nonlocal shown
            if tally.seconds >= shown + SECONDS_BETWEEN_LINES and tally.done < tally.expected:
                shown = tally.seconds
                self.note(f"{name} {tally}")

        self.note(f"{name} ...")
        tally = ByteCounter(show)
        yield tally
        self.note(f"{name}: {tally}")


class SilentProgress(Progress):
    """The progress of the Python API: prints nothing. What `warn` would print becomes a Python warning."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        """Issue a `UserWarning`."""
        warnings.warn(make_printable(text), stacklevel=2)


def _summary_rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    timings, memory = record["timings"], record["memory"]
    for key, label in TIMINGS.items():
        if timings.get(key) is not None and (timings[key] or key not in ("warmup_s", "compile_s")):
            yield label, f"{timings[key]:.2f} s"
    if timings.get("read_bytes"):
        yield "weights read", f"{decimal(timings['read_bytes'])}, {decimal(int(timings['read_bytes_per_s']))}/s"
    steps = timings.get("steps_s") or []
    # without a warm-up the first step includes its cost: the two figures are never mixed
    if steps:
        yield "first step", f"{steps[0] * 1000:.1f} ms"
    if len(steps) > 1:
        yield "steady step (median)", f"{statistics.median(steps[1:]) * 1000:.1f} ms"
    yield from _cache_rows(record.get("cache", {}))
    for key, label in (("peak_host_bytes", "peak host memory"), ("peak_device_bytes", "peak device memory")):
        if memory.get(key):
            yield label, f"{memory[key] / 2**20:,.0f} MiB"
    quality = record.get("quality", {})
    yield from _quality_rows("", quality)
    for name, block in quality.get("noise_floor", {}).items():
        yield from _quality_rows(f"noise floor {name}: ", block)


def _cache_rows(block: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of a cache's savings; none if every block ran."""
    if block and block["blocks"]["run"] < block["blocks"]["all"]:
        yield "blocks run", "{run} of {all}".format(**block["blocks"])
        kinds = (("computed", block["computed_step_s"]), ("skipped", block["skipped_step_s"]))
        for kind, seconds in kinds:
            if seconds is not None:
                yield f"{kind} step (median)", f"{seconds * 1000:.1f} ms"


def _quality_rows(of: str, block: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, (name, digits, unit) in MEASURES.items():
        if key in block:
            numbers = " / ".join(f"{block[key][which]:.{digits}f}" for which in ("mean", "p95", "worst"))
            yield f"{of}{name}, mean / p95 / worst", f"{numbers}{unit}"
    if "accuracy" in block:
        yield f"{of}accuracy (uncached)", "{outputs:.1%} ({twins:.1%})".format(**block["accuracy"])
