"""The ledger of a run of batches: records on disk what happens to each picture; run.json summarizes it.

Each row of `ledger.jsonl` is an object with one key: `begun` (a process is ready to draw: its facts and loading times),
`drawing` (a batch starts: the indices of its pictures), `done` (a picture's record, once its file is written), `failed`
(indices, and the error), `drawn` (a whole batch: timings, memory, cache, quality).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydrarun.config.batches import BatchItem, Config, derive_batch_config
from hydrarun.config.checks.report import PAIRED
from hydrarun.core.errors import UsageError
from hydrarun.core.files import compute_sha256
from hydrarun.engine.runs.ledger_rows import is_ledger_row
from hydrarun.outputs.journal import Ledger
from hydrarun.outputs.media.read import read_output
from hydrarun.outputs.provenance import hash_config
from hydrarun.outputs.run_folder import LEDGER_FILE
from hydrarun.outputs.writer import (
    FORMAT,
    describe_end,
    describe_error,
    format_file_name,
    hash_pixels,
    to_recorded_config,
)


class BatchLedger:
    """The ledger of the run of `config` in `folder`. The driver reads and writes it; rank 0 only appends to it."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Create or read the ledger. Raises UsageError if it is damaged, or of another configuration."""
        self.folder = folder
        self.config = config
        # a run of other prompts may use the same folder: pictures that both runs share are drawn once
        sampling, given = {**config["sampling"], "prompt": None}, {**config["input"], "prompts": None}
        digest = hash_config(to_recorded_config({**config, "sampling": sampling, "input": given}))
        self.ledger = Ledger(folder / LEDGER_FILE, {"format": FORMAT, "config": digest}, "pictures")

        self._check_rows(0)

    @property
    def row_count(self) -> int:
        """Number of rows read or added so far."""
        return len(self.ledger.rows)

    def refresh(self) -> None:
        """Read the rows that a rank has appended since the last read."""
        known = self.row_count
        self.ledger.refresh()
        self._check_rows(known)

    def _check_rows(self, start: int) -> None:
        """Raise UsageError for a row, from row `start` on, that no version of hydrarun has written."""
        for number, row in enumerate(self.ledger.rows[start:], start):
            if not is_ledger_row(row):
                raise self.ledger.damage_error(number)

    def select_rows(self, kind: str, start: int = 0) -> list[Any]:
        """Return the contents of the rows of one kind, from row `start` on."""
        return [row[kind] for row in self.ledger.rows[start:] if kind in row]

    def add_row(self, kind: str, content: Any) -> None:
        """Append a row."""
        self.ledger.add({kind: content})

    def record_failure(self, indices: Sequence[int], error: BaseException) -> None:
        """Append a row that these pictures failed."""
        self.add_row("failed", describe_failure(indices, error))

    def name_files(self, items: Iterable[BatchItem]) -> dict[int, str]:
        """Return the file name of each item, by index."""
        recorded_configs: dict[str, Any] = {}
        names = {}
        for item in items:
            key = str(item.images)
            if key not in recorded_configs:
                recorded_configs[key] = to_recorded_config(derive_batch_config(self.config, [item]))
            digest = hash_config({**recorded_configs[key], "sampling": item.sampling})
            prompt, seed = item.sampling["prompt"], item.sampling["seed"]
            names[item.index] = format_file_name(item.index, prompt, seed, digest, self.config["output"]["format"])
        return names

    def find_done(
        self, file_names: Mapping[int, str], verified: Mapping[int, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """Return the records of the pictures whose files exist unchanged, by index.

        The files of `verified` records are not read again.
        """
        latest = {record["path"]: record for record in self.select_rows("done")}
        found = {index: latest[name] for index, name in file_names.items() if name in latest}
        return {i: record for i, record in found.items() if verified.get(i) == record or self.is_intact(record)}

    def count_starts(self) -> Counter[int]:
        """Count how often each batch was started, by the index of its first picture."""
        return Counter(indices[0] for indices in self.select_rows("drawing"))

    def is_intact(self, record: Mapping[str, Any]) -> bool:
        """Return whether a picture's file exists unchanged, and is measured if the run measures."""
        file = self.folder / record["path"]
        if "quality" not in record and set(PAIRED) & set(self.config["report"]["metrics"]):
            return False
        try:
            if "sha256" in record:
                return compute_sha256(file) == record["sha256"]
            return hash_pixels(read_output(file)[0]) == record["pixels_sha256"]
        except (OSError, UsageError):
            return False

    def list_broken(self, file_names: Mapping[int, str], done: Mapping[int, Any]) -> list[str]:
        """Return the files of this run that were written once, and are now missing or changed."""
        written = {record["path"] for record in self.select_rows("done")}
        return [name for index, name in file_names.items() if name in written and index not in done]

    def find_last_errors(self) -> dict[int, dict[str, str]]:
        """Return the last error of each picture that had one, by index."""
        return {index: row["error"] for row in self.select_rows("failed") for index in row["indices"]}

    def summarize(
        self,
        items: Sequence[BatchItem],
        done: Mapping[int, dict[str, Any]],
        created: str,
        stopped: BaseException | None,
    ) -> dict[str, Any]:
        """Return the content of run.json so far. `stopped`: the error that ended the run early."""
        begun, drawn = self.select_rows("begun"), self.select_rows("drawn")
        number = {index: place for place, batch in enumerate(drawn) for index in batch["outputs"]}
        lines = {item.index: {"line": item.line} if item.line else {} for item in items}
        outputs = [{**done[index], **lines[index], "batch": number.get(index)} for index in sorted(done)]
        errors = self.find_last_errors()
        failed = [
            {
                "index": item.index,
                **{key: item.sampling[key] for key in ("prompt", "negative_prompt", "seed")},
                "error": errors.get(item.index),
            }
            for item in items
            if item.index not in done
        ]
        facts = begun[-1]["facts"] if begun else {}
        recorded_config = to_recorded_config(self.config)
        return {
            **describe_status(stopped, failed, len(items)),
            "created": created,
            "config_hash": hash_config(recorded_config),
            "outputs": outputs,
            "failed": failed,
            "batches": drawn,
            **sum_results(begun, drawn, outputs),
            **facts,
            "inputs": list_distinct_images(image for batch in drawn for image in batch["inputs"]),
            "config": recorded_config,
        }


def describe_failure(indices: Sequence[int], error: BaseException) -> dict[str, Any]:
    """Return the content of a `failed` row."""
    return {"indices": list(indices), "error": describe_error(error)}


def describe_status(stopped: BaseException | None, failed: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Return the `status` of run.json, with the `error` that ended the run early, or that of pictures that failed."""
    if stopped:
        return describe_end(stopped)
    if not failed:
        return {"status": "complete"}
    first = next((one["error"]["message"] for one in failed if one["error"]), "not drawn")
    message = f"{len(failed)} of {count} failed; the first: {first}"
    return {"status": "failed", "error": {"type": "RunError", "message": message}}


def list_distinct_images(images: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each input image once."""
    return list({image["path"]: image for image in images}.values())


def sum_results(
    begun: Sequence[Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the run's total timings, peak memory, cache savings and quality; empty before any batch is drawn."""
    if not drawn:
        return {}
    found: dict[str, Any] = {
        "timings": sum_timings([*(start["timings"] for start in begun), *(batch["timings"] for batch in drawn)]),
        "memory": {key: max(one["memory"][key] for one in (*begun, *drawn)) for key in drawn[0]["memory"]},
        "cache": merge_caches([batch["cache"] for batch in drawn]),
    }
    if quality := merge_quality([batch["quality"] for batch in drawn if "quality" in batch], outputs):
        found["quality"] = quality
    return found


def sum_timings(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum seconds and bytes, join all steps in order, and compute bytes per second over all that was read."""
    keys = dict.fromkeys(key for one in timings for key in one)
    total: dict[str, Any] = {key: sum(one.get(key) or 0 for one in timings) for key in keys if key != "steps_s"}
    total["steps_s"] = [step for one in timings for step in one.get("steps_s", ())]
    rates = [(one["read_bytes"], one["read_bytes_per_s"]) for one in timings if one.get("read_bytes")]
    seconds = sum(count / rate for count, rate in rates)
    total["read_bytes_per_s"] = total["read_bytes"] / seconds if seconds else None
    return total


def merge_caches(caches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the blocks. Seconds of a step are the median of the batches' medians."""
    if len(caches) == 1:
        return dict(caches[0])
    blocks = {key: sum(one["blocks"][key] for one in caches) for key in ("run", "all")}
    found: dict[str, Any] = {"blocks": blocks}
    for key in ("computed_step_s", "skipped_step_s"):
        seconds = [one[key] for one in caches if one[key] is not None]
        found[key] = statistics.median(seconds) if seconds else None
    return found


def merge_quality(blocks: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the quality of all pictures, with the keys of a run of one batch. `blocks`: that of each batch."""
    from hydrarun.outputs.quality.metrics import summarize_measures

    each = [output["quality"] for output in outputs if "quality" in output]
    found: dict[str, Any] = summarize_measures(each, list(each[0])) if each else {}
    floors = [output["noise_floor"] for output in outputs if "noise_floor" in output]
    if floors:
        found["noise_floor"] = {
            name: summarize_measures([floor[name] for floor in floors], list(floors[0][name])) for name in floors[0]
        }
    if shares := [block["accuracy"] for block in blocks if "accuracy" in block]:
        count = sum(share["count"] for share in shares)
        mean = {key: sum(share[key] * share["count"] for share in shares) / count for key in ("outputs", "twins")}
        found["accuracy"] = {**mean, "count": count}
    return found
