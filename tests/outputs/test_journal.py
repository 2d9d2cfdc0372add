"""A ledger that two writers append to: each reads the rows of the other, and none twice."""

from __future__ import annotations

import pytest

from hydrarun.core.errors import UsageError
from hydrarun.outputs.journal import Ledger, append_row

IDENTITY = {"model": "m"}


@pytest.fixture
def ledger(tmp_path):
    """A ledger of two rows, the second one by another writer."""
    made = Ledger(tmp_path / "ledger.jsonl", IDENTITY, "rows")
    made.add({"number": 0})
    append_row(made.file, {"text": "“zwei”\n"})
    made.refresh()
    return made


def rows(ledger: Ledger) -> list[dict]:
    """Read the rows of the whole file anew."""
    return Ledger(ledger.file, IDENTITY, "rows").rows


def test_refresh_reads_what_others_have_appended(ledger):
    assert ledger.rows == [{"number": 0}, {"text": "“zwei”\n"}] == rows(ledger)
    ledger.refresh()
    assert len(ledger.rows) == 2
    append_row(ledger.file, {"number": 2})
    append_row(ledger.file, {"number": 3})
    ledger.refresh()
    ledger.add({"number": 4})
    ledger.refresh()
    assert [row["number"] for row in ledger.rows[2:]] == [2, 3, 4]
    assert ledger.rows == rows(ledger)


def test_refresh_reads_nothing_twice(ledger):
    before = ledger.file.read_bytes()
    ledger.file.write_bytes(b"?" * len(before))  # reading this part again would be an error
    append_row(ledger.file, {"number": 2})
    ledger.refresh()
    assert ledger.rows == [{"number": 0}, {"text": "“zwei”\n"}, {"number": 2}]


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_refresh_cuts_a_torn_last_line_off(ledger, whole):
    for number in range(whole):
        append_row(ledger.file, {"number": number})
    size = ledger.file.stat().st_size
    with ledger.file.open("ab") as file:
        file.write('{"text": "ü'.encode()[:-1])  # as if the writer was killed in the middle of a character
    ledger.refresh()
    assert ledger.file.stat().st_size == size
    ledger.add({"text": "next"})
    assert ledger.rows[2:] == [*({"number": number} for number in range(whole)), {"text": "next"}]
    assert ledger.rows == rows(ledger)


def test_refresh_names_a_damaged_line(ledger):
    append_row(ledger.file, {"number": 2})
    with ledger.file.open("ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(UsageError, match="line 5 is damaged"):
        ledger.refresh()
