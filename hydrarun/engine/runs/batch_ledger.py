"""What became of the pictures of a run of batches: on disk as it happens, and summed up in run.json.

Rows of `ledger.jsonl`, each an object with one key: `begun` (a process is ready to draw: what it uses, what loading
took), `drawing` (a batch: its pictures' places), `done` (a picture's record, once its file is there), `failed` (places,
and the error), `drawn` (a whole batch: timings, memory, cache, quality).
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydrarun.config.batches import Config, Item, configuration, items
from hydrarun.config.checks.report import PAIRED
from hydrarun.core.errors import UsageError
from hydrarun.outputs import reader as recorded
from hydrarun.outputs.journal import Ledger
from hydrarun.outputs.provenance import config_hash
from hydrarun.outputs.writer import FORMAT, as_recorded, described, file_name, pixels_sha256

NAME = "ledger.jsonl"


class Book:
    """The ledger of the run that `config` asks for in `folder`, and what it says."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Begins it or goes on with it. Raises UsageError for one of another configuration, and a damaged one."""
        self.folder = folder
        self.config = config
        # another list of prompts may go on in the same folder: what it has in common with this one is there already
        sampling, given = {**config["sampling"], "prompt": None}, {**config["input"], "prompts": None}
        digest = config_hash(as_recorded({**config, "sampling": sampling, "input": given}))
        self.ledger = Ledger(folder / NAME, {"format": FORMAT, "config": digest}, "pictures")

    def rows(self, kind: str) -> list[Any]:
        """What the rows of one kind hold."""
        return [row[kind] for row in self.ledger.rows if kind in row]

    def add(self, kind: str, content: Any) -> None:
        """Add a row."""
        self.ledger.add({kind: content})

    def fail(self, places: Sequence[int], error: BaseException) -> None:
        """Keep that these pictures could not be made."""
        self.add("failed", {"indices": list(places), "error": described(error)})

    def names(self, found: Iterable[Item]) -> dict[int, str]:
        """The file of each item."""
        recorded_configs: dict[str, Any] = {}
        names = {}
        for item in found:
            key = str(item.images)
            if key not in recorded_configs:
                recorded_configs[key] = as_recorded(configuration(self.config, [item]))
            digest = config_hash({**recorded_configs[key], "sampling": item.sampling})
            prompt, seed = item.sampling["prompt"], item.sampling["seed"]
            names[item.index] = file_name(item.index, prompt, seed, digest, self.config["output"]["format"])
        return names

    def done(self, names: Mapping[int, str], known: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The records of those pictures whose files are there and as they were written, by their places.

        Those of `known` are, and are not looked at again.
        """
        latest = {record["path"]: record for record in self.rows("done")}
        found = {index: latest[name] for index, name in names.items() if name in latest}
        return {index: record for index, record in found.items() if known.get(index) == record or self.whole(record)}

    def begun(self) -> Counter[int]:
        """How often a batch was begun with, by its first picture."""
        return Counter(places[0] for places in self.rows("drawing"))

    def whole(self, record: Mapping[str, Any]) -> bool:
        """Whether a picture's file is there, as it was written, and measured if that is asked for."""
        file = self.folder / record["path"]
        if "quality" not in record and set(PAIRED) & set(self.config["report"]["metrics"]):
            return False
        try:
            if "sha256" in record:
                return hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]
            return pixels_sha256(recorded.read(file)[0]) == record["pixels_sha256"]
        except (OSError, UsageError):
            return False

    def broken(self, names: Mapping[int, str], done: Mapping[int, Any]) -> list[str]:
        """Files of this run that the ledger knows and that are gone, or not what they were."""
        known = {record["path"] for record in self.rows("done")}
        return [name for index, name in names.items() if name in known and index not in done]

    def errors(self) -> dict[int, dict[str, str]]:
        """The last error of each picture that had one."""
        return {index: row["error"] for row in self.rows("failed") for index in row["indices"]}

    def summary(
        self, created: str, done: Mapping[int, dict[str, Any]], stopped: BaseException | None
    ) -> dict[str, Any]:
        """What run.json says of the run so far; `stopped`: what ended it before everything was tried."""
        every = items(self.config)
        begun, drawn = self.rows("begun"), self.rows("drawn")
        number = {index: place for place, batch in enumerate(drawn) for index in batch["outputs"]}
        lines = {item.index: {"line": item.line} if item.line else {} for item in every}
        outputs = [{**done[index], **lines[index], "batch": number.get(index)} for index in sorted(done)]
        errors = self.errors()
        failed = [
            {
                "index": item.index,
                **{key: item.sampling[key] for key in ("prompt", "negative_prompt", "seed")},
                "error": errors.get(item.index),
            }
            for item in every
            if item.index not in done
        ]
        complete = not failed and stopped is None
        facts = begun[-1]["facts"] if begun else {}
        recorded_config = as_recorded(self.config)
        return {
            "status": "complete" if complete else "failed",
            **({} if complete else {"error": described(stopped) if stopped else fault(failed, len(every))}),
            "created": created,
            "config_hash": config_hash(recorded_config),
            "outputs": outputs,
            "failed": failed,
            "batches": drawn,
            **totals(begun, drawn, outputs),
            **facts,
            "inputs": distinct(image for batch in drawn for image in batch["inputs"]),
            "config": recorded_config,
        }


def fault(failed: Sequence[Mapping[str, Any]], count: int) -> dict[str, str]:
    """What run.json says of a run in which some pictures failed."""
    first = next((one["error"]["message"] for one in failed if one["error"]), "not drawn")
    return {"type": "RunError", "message": f"{len(failed)} of {count} failed; the first: {first}"}


def distinct(images: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each input image once."""
    return list({image["path"]: image for image in images}.values())


def totals(
    begun: Sequence[Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Timings summed over everything that was done for the run, the peaks of memory, what caches saved, quality."""
    if not drawn:
        return {}
    found: dict[str, Any] = {
        "timings": timings([*(start["timings"] for start in begun), *(batch["timings"] for batch in drawn)]),
        "memory": {key: max(one["memory"][key] for one in (*begun, *drawn)) for key in drawn[0]["memory"]},
        "cache": cache([batch["cache"] for batch in drawn]),
    }
    if quality := qualities([batch["quality"] for batch in drawn if "quality" in batch], outputs):
        found["quality"] = quality
    return found


def timings(all_of_them: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of seconds and bytes; all steps one after the other."""
    keys = dict.fromkeys(key for one in all_of_them for key in one)
    total: dict[str, Any] = {key: sum(one.get(key) or 0 for one in all_of_them) for key in keys if key != "steps_s"}
    total["steps_s"] = [step for one in all_of_them for step in one.get("steps_s", ())]
    rates = [(one["read_bytes"], one["read_bytes_per_s"]) for one in all_of_them if one.get("read_bytes")]
    seconds = sum(count / rate for count, rate in rates)
    total["read_bytes_per_s"] = total["read_bytes"] / seconds if seconds else None
    return total


def cache(all_of_them: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Blocks summed, and the medians' medians."""
    if len(all_of_them) == 1:
        return dict(all_of_them[0])
    blocks = {key: sum(one["blocks"][key] for one in all_of_them) for key in ("run", "all")}
    found: dict[str, Any] = {"blocks": blocks}
    for key in ("computed_step_s", "skipped_step_s"):
        seconds = [one[key] for one in all_of_them if one[key] is not None]
        found[key] = statistics.median(seconds) if seconds else None
    return found


def qualities(blocks: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all pictures what a run of one batch says of its own."""
    from hydrarun.outputs.quality.metrics import summaries

    each = [output["quality"] for output in outputs if "quality" in output]
    found: dict[str, Any] = summaries(each, list(each[0])) if each else {}
    floors = [output["noise_floor"] for output in outputs if "noise_floor" in output]
    if floors:
        found["noise_floor"] = {
            name: summaries([floor[name] for floor in floors], list(floors[0][name])) for name in floors[0]
        }
    if shares := [block["accuracy"] for block in blocks if "accuracy" in block]:
        count = sum(share["count"] for share in shares)
        mean = {key: sum(share[key] * share["count"] for share in shares) / count for key in ("outputs", "twins")}
        found["accuracy"] = {**mean, "count": count}
    return found
