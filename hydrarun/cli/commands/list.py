"""`hydrarun list`: tables of the models, the accelerations they support, the options of each group and the recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrarun.cli.arguments import Arguments
from hydrarun.config.checks import compatibility
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale
from hydrarun.config.compose import compose_unchecked
from hydrarun.config.options import load_option
from hydrarun.config.recipes import catalogue
from hydrarun.core import resources
from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.core.resources import list_groups
from hydrarun.core.tables import Table, format_markdown, print_tables
from hydrarun.outputs.media.kinds import KINDS

# parallel methods, by the names of their degrees
METHODS = ("data", "cfg", "ring", "ulysses", "tensor", "hsdp", "vae")

# groups with options that a model may not support
ACCELERATIONS = ("cache", "attention", "compile", "quantization", "offload")

USAGE = """\
usage: hydrarun list [models|accelerations|recipes|GROUP ...] [--markdown]

Lists the available choices: all tables, or the ones you name."""


def list_tables(line: Arguments) -> int:
    """Print the named tables, or all; return the exit code. Raises UsageError for unknown names."""
    tables = [make_table(name) for name in line.words or list_table_names()]
    if "--markdown" in line.flags:
        print("\n\n".join(map(format_markdown, tables)))
    else:
        print_tables(tables)
    return 0


def list_table_names() -> list[str]:
    """Return the names of the tables: models first, recipes last."""
    return ["models", "accelerations", *(group for group in list_groups() if group != "model"), "recipes"]


def make_table(name: str) -> Table:
    """Build a table by name; the singular `model` and `recipe` are accepted too. Raises UsageError."""
    if name in ("models", "model"):
        return _make_models_table()
    if name == "accelerations":
        return _make_accelerations_table()
    if name in ("recipes", "recipe"):
        return Table("recipes", catalogue.HEADER, [entry.cells() for entry in catalogue.list_entries()])
    if name not in list_table_names():
        raise UsageError(
            f"list {name}: no such table.{suggest_name(name, list_table_names())}"
            f" Tables: {', '.join(list_table_names())}."
        )
    files = sorted((resources.find_folder("conf") / name).glob("*.yaml"))
    return Table(name, (f"{name}=", "what it is"), [(file.stem, read_first_comment(file)) for file in files])


def read_first_comment(file: Path) -> str:
    """Return the first comment line with text in a YAML file, skipping headers such as `# @package`."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#\s*(?!@)(\S.*)", line):
            return match[1]
    return ""


def _make_models_table() -> Table:
    header = ("model=", "task", "checkpoint", "parameters", "steps", "guidance", "size")
    rows = []
    for name, config in compose_models():
        model, sampling = config["model"], config["sampling"]
        cells = (model["task"], model["path"], model["facts"].get("parameters", ""), sampling["num_inference_steps"])
        rows.append((name, *map(str, cells), format_guidance(sampling), format_size(sampling)))
    return Table("models", header, rows)


def _make_accelerations_table() -> Table:
    rows = []
    for name, config in compose_models():
        methods = (format_method_support(config, degree) for degree in METHODS)
        rows.append((name, *methods, *(format_group_options(config, group) for group in ACCELERATIONS)))
    return Table("accelerations", ("model=", *METHODS, *ACCELERATIONS), rows)


def compose_models() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each model option with the configuration that it composes to by itself."""
    for file in sorted((resources.find_folder("conf") / "model").glob("*.yaml")):
        yield file.stem, compose_unchecked([f"model={file.stem}"])[0]


def format_guidance(sampling: dict[str, Any]) -> str:
    """Format a model's default guidance scales; with two experts, that of the high-noise expert comes first."""
    names = {"true_cfg_scale": "", "guidance_scale": "", "guidance_scale_2": ""}
    if sampling["true_cfg_scale"] is not None and sampling["guidance_scale"] is not None:
        names["guidance_scale"] = " (embedded)"
        names.pop("true_cfg_scale")
    return ", ".join(f"{sampling[name]}{note}" for name, note in names.items() if sampling[name] is not None)


def format_size(sampling: dict[str, Any]) -> str:
    """Format a model's default width x height and its frames or layers; for sounds, the seconds."""
    if sampling["audio_start_in_s"] is not None:
        end = sampling["audio_end_in_s"]
        return "the longest" if end is None else f"{end - sampling['audio_start_in_s']:g} s"
    lengths = (kind.length(sampling) for kind in KINDS if kind.field and sampling[kind.field] is not None)
    parts = "".join(f", {length}" for length in lengths if length)
    pixels = "of the image" if sampling["height"] is None else f"{sampling['width']}x{sampling['height']}"
    return pixels + parts


def format_method_support(config: dict[str, Any], name: str) -> str:
    """Return whether the model supports a parallel method: `yes`, the guidance that it needs, or `-`.

    Two pictures are drawn, so that the data degree applies.
    """
    degrees = {**config["parallel"], f"{name}_degree": 2}
    scale, off = find_cfg_scale(config)[0], get_unguided_scale(config)
    for answer, more in (("yes", {}), (f"{scale} > {off:g}", {scale: off + 1})):
        sampling = {**config["sampling"], "num_images_per_prompt": 2, "seed": 0, **more}
        if not any(compatibility.find_violations({**config, "parallel": degrees, "sampling": sampling})):
            return answer
    return "-"


def format_group_options(config: dict[str, Any], group: str) -> str:
    """List the options of `group` that the model supports; `all`, or `-` for none."""
    files = sorted(file for file in (resources.find_folder("conf") / group).glob("*.yaml") if file.stem != "none")
    names: list[str] = []
    others: list[str] = []
    for file in files:
        node = load_option(config, group, file)
        (others if any(compatibility.find_violations({**config, group: node})) else names).append(file.stem)
    if len(names) > 2:
        return "all" if not others else f"all but {', '.join(others)}"
    return ", ".join(names) or "-"
