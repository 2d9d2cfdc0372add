"""run.json of runs that end before they write one."""

from __future__ import annotations

import json

import pytest

from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError
from hydrarun.outputs import failure_record
from hydrarun.outputs.failure_record import record_failure

CONFIG = compose_config([])


def read(folder):
    return json.loads((folder / "run.json").read_text())


def fail(folder, error, config=CONFIG):
    with pytest.raises(type(error)), record_failure(config, folder):
        raise error


def test_an_interruption_is_no_failure(tmp_path):
    fail(tmp_path, KeyboardInterrupt())
    assert read(tmp_path)["status"] == "interrupted"
    assert read(tmp_path)["outputs"] == []


def test_what_a_batch_has_made_stays_listed(tmp_path):
    """A line that is refused when a batch goes on must not empty its run.json."""
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "error": {"message": "x"}, "outputs": [{}]}))
    (tmp_path / "ledger.jsonl").touch()
    fail(tmp_path, UsageError("line 7 of input.prompts: no"))
    assert read(tmp_path) | {"format": 1} == {
        "format": 1,
        "status": "failed",
        "error": {"type": "UsageError", "message": "line 7 of input.prompts: no"},
        "outputs": [{}],
    }


def test_another_runs_record_is_replaced(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "complete", "outputs": [{}]}))
    fail(tmp_path, UsageError("no"))
    assert read(tmp_path)["outputs"] == []


def test_a_refused_text_is_recorded(tmp_path):
    """Half of a surrogate pair, for which the configuration is refused, has no bytes."""
    fail(tmp_path, UsageError("no"), {**CONFIG, "sampling": {**CONFIG["sampling"], "prompt": "a\ud800"}})
    assert read(tmp_path)["config"]["sampling"]["prompt"] == "a\ud800"


def test_a_full_disk_hides_no_error(tmp_path, monkeypatch):
    def write(*_):
        raise failure_record.WriteError("no space")

    monkeypatch.setattr("hydrarun.outputs.writer.write_run", write)
    fail(tmp_path, UsageError("no"))
    assert not (tmp_path / "run.json").exists()
