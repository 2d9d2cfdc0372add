"""Checks the JSON configs of a checkpoint's components: keys that run code, and numbers that no model has.

diffusers and transformers read these files, and trust them. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrarun.config.bounds import BOUNDS, MAX_BLOCKS, describe_excess
from hydrarun.config.checks.checkpoint import read_json
from hydrarun.core.errors import raise_mistakes

#: every file whose keys become settings of a class; tokenizer.json, vocabularies and indices of shards do not
FILES = ("model_index.json", "*config*.json", "*/*config*.json", "*/*/*config*.json")

#: keys by which a checkpoint names code to run: an attention may be a kernel that transformers downloads from the hub
CODE = re.compile(r"_*attn_implementation(_internal)?|auto_map|custom_generate")

#: keys for a number of blocks, of which modules are built one by one
BLOCKS = re.compile(r"(num|n)_(\w+_)?(layers|blocks)|layers_per_block|depth")


def check_component_files(folder: Path) -> None:
    """Raise `UsageError` that lists every key and number that is refused, in the files of the checkpoint `folder`."""
    raise_mistakes(
        f"{path}: {text}"
        for path in sorted({path for pattern in FILES for path in folder.glob(pattern)})
        for text in find_refused_keys(read_json(path))
    )


def find_refused_keys(node: Any, path: str = "") -> Iterator[str]:
    """Yield a sentence for each refused key, at any depth."""
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from find_refused_keys(value, f"{path}[{index}]")
    elif isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else key
            if CODE.fullmatch(key) and value is not None:
                yield f"{here} is not allowed: it names code that would be run with the checkpoint. Remove it"
            elif text := _describe_number(key, value):
                yield f"{here}: {text}"
            else:
                yield from find_refused_keys(value, here)


def _describe_number(key: str, value: Any) -> str | None:
    if BLOCKS.fullmatch(key):
        counts = value if isinstance(value, list) else [value]
        return next(filter(None, (describe_excess(count, 0, MAX_BLOCKS) for count in counts)), None)
    return describe_excess(value, *BOUNDS["scheduler"][key]) if key in BOUNDS["scheduler"] else None
