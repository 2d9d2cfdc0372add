"""SIGTERM and SIGHUP end a command as Ctrl-C does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hydrarun.cli import main
from hydrarun.core.interruption import Interrupted, get_interruption_code, interrupt_on_signals
from hydrarun.engine.ranks import launch
from tests.helpers.paths import environment

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


def end_itself(number: int) -> None:
    """Send a signal to this process and wait for its handler."""
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("number", CODES)
def test_a_run_is_recorded_as_interrupted(number, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "run_configuration", lambda config, output_dir: end_itself(number))
    assert main.main([f"hydra.run.dir={tmp_path / 'run'}"]) == CODES[number]
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["error"] == {"type": "KeyboardInterrupt", "message": f"interrupted by {NAMES[number]}"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sweep_ends_at_once_with_the_points_so_far(monkeypatch, tmp_path, capsys):
    def run(config, output_dir):
        if config["sampling"]["seed"] == 2:
            end_itself(signal.SIGTERM)
        record = {"format": 1, "status": "complete", "outputs": []}
        (output_dir / "run.json").write_text(json.dumps(record))
        return record

    monkeypatch.setattr(launch, "run_configuration", run)
    assert main.main(["-m", "sampling.seed=1,2,3", f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 143
    statuses = [json.loads(file.read_text())["status"] for file in sorted(tmp_path.glob("sweep/*/run.json"))]
    assert statuses == ["complete", "interrupted"]


def test_signals_that_follow_at_once_do_not_disturb_the_end():
    def be_ended():
        try:
            end_itself(signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a terminal's shell may send both
            time.sleep(0.05)

    with pytest.raises(Interrupted) as raised, interrupt_on_signals():
        be_ended()
    assert get_interruption_code(raised.value) == 129


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_set_no_handlers():
    seen = []

    def look():
        with interrupt_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_lost_terminal_does_not_fail_the_end():
    """Writing to a terminal that is gone raises an error, which Python's exit would report with its own code."""
    ours, theirs = os.openpty()
    code = (
        "import sys, time; from hydrarun.core.interruption import discard_lost_terminal; sys.stdin.readline();"
        "discard_lost_terminal(); print('x'); print('x', file=sys.stderr); sys.stdout.flush(); sys.exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, env=environment()
    )
    os.close(theirs)
    os.close(ours)
    process.communicate(b"\n")
    assert process.returncode == 7
