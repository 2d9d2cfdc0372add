"""What the user sees, on a terminal and in a log."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from hydrarun.core.printable import PrintableStream
from hydrarun.core.progress import Progress

RECORD = {
    "outputs": [{"path": f"{index:04d}-{'a-long-slug' * 12}.png"} for index in range(2)],
    "timings": {
        "load_s": 1.5,
        "warmup_s": 0.75,
        "compile_s": 0.0,
        "encode_s": 0.25,
        "denoise_s": 2.0,
        "decode_s": 0.125,
        "save_s": 0.01,
        "total_s": 4.0,
        "steps_s": [0.5, 0.1, 0.3, 0.2],
    },
    "memory": {"peak_host_bytes": 512 * 2**20, "peak_device_bytes": 0},
}


def in_a_log() -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, width=80)), text


def on_a_terminal() -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, width=100, force_terminal=True)), text


def test_phase_without_steps_is_two_lines_in_a_log():
    progress, text = in_a_log()
    with progress.phase("load weights"):
        pass
    start, end = text.getvalue().splitlines()
    assert start == "load weights ..."
    assert end.startswith("load weights: ")
    assert end.endswith(" s")


def test_steps_in_a_log_are_the_first_every_tenth_and_the_last():
    progress, text = in_a_log()
    with progress.phase("denoise", total=50) as advance:
        for _ in range(50):
            advance()
    steps = [line.split(",")[0] for line in text.getvalue().splitlines()[1:-1]]
    assert steps == [f"denoise {step}/50" for step in (1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50)]
    assert "s/step" in text.getvalue()


@pytest.mark.parametrize("total", [1, 2, 3])
def test_few_steps_are_each_shown_once(total):
    progress, text = in_a_log()
    with progress.phase("denoise", total=total) as advance:
        for _ in range(total):
            advance()
    assert len(text.getvalue().splitlines()) == total + 2


def test_bar_on_a_terminal_counts_steps_and_leaves_nothing_behind():
    progress, text = on_a_terminal()
    with progress.phase("denoise", total=4) as advance:
        for _ in range(4):
            advance()
    assert "4/4" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K")  # the bar's own line is erased at the end


def test_bar_without_a_total_works():
    progress, text = on_a_terminal()
    with progress.phase("load weights"):
        pass
    assert "load weights" in text.getvalue()


@pytest.mark.parametrize("make", [in_a_log, on_a_terminal])
def test_an_error_inside_a_phase_passes_through(make):
    progress, text = make()
    with pytest.raises(ValueError, match="boom"), progress.phase("decode", total=2):
        raise ValueError("boom")
    assert "decode: " not in text.getvalue()


def test_reading_in_a_log_tells_bytes_and_their_rate(monkeypatch):
    """Every ten seconds, and at the end."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress, text = in_a_log()
    with progress.reading("loading weights") as tally:
        tally.expect(10_000_000_000)
        for now in (104.0, 108.0, 112.0, 116.0, 125.0):  # noqa: B007 - the mocked clock reads it
            tally.add(2_000_000_000)
    assert text.getvalue().splitlines() == [
        "loading weights ...",
        "loading weights 6.0 GB of 10.0 GB in 12.00 s, 500.0 MB/s",
        "loading weights: 10.0 GB in 25.00 s, 400.0 MB/s",
    ]


def test_reading_on_a_terminal_is_a_bar_of_bytes():
    progress, text = on_a_terminal()
    with progress.reading("loading weights") as tally:
        tally.expect(4_000_000)
        tally.expect(4_000_000)
        tally.add(2_000_000)
        tally.add(6_000_000)
    assert "8.0/8.0 MB" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K")


def test_bytes_told_by_many_threads_add_up():
    progress, _ = in_a_log()
    with progress.reading("loading weights") as tally, ThreadPoolExecutor(8) as pool:
        list(pool.map(tally.add, range(2000)))
    assert tally.done == sum(range(2000))


def test_table_shows_what_was_read():
    progress, text = in_a_log()
    progress.table({"outputs": [], "timings": {"read_bytes": 41_000_000_000, "read_bytes_per_s": 3.3e9}, "memory": {}})
    assert " ".join(text.getvalue().split()) == "weights read 41.0 GB, 3.3 GB/s"


def test_notes_are_neither_wrapped_nor_read_as_markup():
    progress, text = in_a_log()
    note = "[bold]kept[/bold] " + "long " * 40
    progress.note(note)
    assert text.getvalue() == note + "\n"


def test_table_shows_timings_first_and_steady_step_memory_and_whole_file_names():
    progress, text = in_a_log()
    progress.table(RECORD, Path("outputs/demo"))
    shown = text.getvalue()
    lines = {" ".join(line.split()) for line in shown.splitlines()}
    assert {"load weights 1.50 s", "warm up 0.75 s", "denoise 2.00 s", "total 4.00 s", "first step 500.0 ms"} <= lines
    assert {"steady step (median) 200.0 ms", "peak host memory 512 MiB"} <= lines
    assert "device memory" not in shown
    assert "compile" not in shown  # nothing was compiled
    for output in RECORD["outputs"]:
        assert str(Path("outputs/demo") / output["path"]) in shown


def test_table_shows_what_a_cache_saved():
    progress, text = in_a_log()
    saved = {"blocks": {"run": 78, "all": 144}, "computed_step_s": 0.2, "skipped_step_s": 0.003}
    progress.table({"outputs": [], "timings": {}, "memory": {}, "cache": saved})
    assert [" ".join(line.split()) for line in text.getvalue().splitlines()] == [
        "blocks run 78 of 144",
        "computed step (median) 200.0 ms",
        "skipped step (median) 3.0 ms",
    ]
    progress, text = in_a_log()
    none = {"blocks": {"run": 144, "all": 144}, "computed_step_s": 0.2, "skipped_step_s": None}
    progress.table({"outputs": [], "timings": {}, "memory": {}, "cache": none})
    assert not text.getvalue().strip()


def test_table_shows_quality_and_the_noise_floor():
    progress, text = in_a_log()
    psnr, ssim = {"mean": 34.06, "p95": 31.0, "worst": 30.2}, {"mean": 0.98765, "p95": 0.9, "worst": 0.8}
    accuracy = {"outputs": 0.975, "twins": 0.98, "count": 200}
    block = {"psnr": psnr, "ssim": ssim, "accuracy": accuracy}
    quality = {"twin": "t", **block, "noise_floor": {"repeat": {"psnr": dict.fromkeys(psnr, 100.0)}}}
    progress.table({"outputs": [], "timings": {"quality_s": 2.0}, "memory": {}, "quality": quality})
    assert [" ".join(line.split()) for line in text.getvalue().splitlines()] == [
        "measure quality (not in total) 2.00 s",
        "PSNR, mean / p95 / worst 34.1 / 31.0 / 30.2 dB",
        "SSIM, mean / p95 / worst 0.9877 / 0.9000 / 0.8000",
        "accuracy (uncached) 97.5% (98.0%)",
        "noise floor repeat: PSNR, mean / p95 / worst 100.0 / 100.0 / 100.0 dB",
    ]


def test_table_of_a_run_without_steps():
    progress, text = in_a_log()
    progress.table({"outputs": [], "timings": {"load_s": 1.0}, "memory": {}})
    assert text.getvalue().split() == ["load", "weights", "1.00", "s"]


def test_everything_goes_to_stderr(capsys):
    progress = Progress()
    with progress.phase("load weights"):
        progress.note("device: cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "device: cpu" in captured.err


def test_quiet_says_nothing(capsys):
    progress = Progress(quiet=True)
    with progress.phase("denoise", total=2) as advance:
        advance()
    progress.note("device: cpu")
    progress.table(RECORD)
    assert capsys.readouterr() == ("", "")


HOSTILE = "[bold]a[/] :cat: \x1b[2J\u202e\nb"


@pytest.mark.parametrize("make", [in_a_log, on_a_terminal])
def test_what_is_noted_is_one_literal_line(make):
    progress, text = make()
    progress.note(HOSTILE)
    assert text.getvalue() == "[bold]a[/] :cat: ?[2J? b\n"


def test_the_paths_below_the_table_are_literal_too():
    progress, text = in_a_log()
    progress.table({**RECORD, "outputs": [{"path": HOSTILE}]}, Path("[red]x"))
    assert text.getvalue().splitlines()[-1] == "[red]x/[bold]a[/] :cat: ?[2J? b"


def test_stderr_is_that_of_the_moment_and_below_its_filter(monkeypatch):
    progress, first, second = Progress(), io.StringIO(), io.StringIO()
    for stream in (first, second):
        monkeypatch.setattr("sys.stderr", PrintableStream(stream))
        progress.note("a")
        assert progress.console.file is stream
    assert first.getvalue() == second.getvalue() == "a\n"
