"""Helpers for runs of several pictures with a tiny model: configurations, and pictures that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydrarun.config.compose import compose_config
from hydrarun.engine.runs import batch_worker
from tests.helpers import tiny


def compose_lines(
    tiny_folder: Path, folder: Path, *rows: dict[str, Any], words: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Write the rows to a prompt file in `folder`; return the configuration of a run of this file."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [word for word in tiny.overrides(tiny_folder) if not word.startswith("sampling.prompt=")]
    return compose_config([*plain, f"input.prompts={file}", *words])


def prompts(*texts: str) -> list[dict[str, Any]]:
    return [{"prompt": text, "seed": seed} for seed, text in enumerate(texts)]


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def failing(monkeypatch, texts: dict[str, list[BaseException]]) -> list[str]:
    """Make pictures of these prompts raise their errors, one per attempt. Return the list of drawn prompts."""
    drawn: list[str] = []
    finished = batch_worker.make_pictures

    def pictures(state):
        drawn.extend(state.prompts)
        for prompt in state.prompts:
            if texts.get(prompt):
                raise texts[prompt].pop(0)
        return finished(state)

    monkeypatch.setattr(batch_worker, "make_pictures", pictures)
    return drawn
