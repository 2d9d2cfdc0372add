"""`hydrarun list`: the models, what they go with, the options of each group and the recipes, as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrarun.cli.arguments import Arguments
from hydrarun.config.checks import compatibility as compat
from hydrarun.config.checks.values import cfg_off, cfg_scale
from hydrarun.config.compose import compose_raw
from hydrarun.config.options import load_option
from hydrarun.config.recipes import catalogue
from hydrarun.core import resources
from hydrarun.core.errors import UsageError, nearest
from hydrarun.core.resources import groups
from hydrarun.core.tables import Table, format_markdown, print_tables
from hydrarun.outputs.media.kinds import KINDS

# parallel methods, by their degrees' names
METHODS = ("data", "cfg", "ring", "ulysses", "tensor", "hsdp", "vae")

# groups of which a model may not go with every option
ACCELERATIONS = ("cache", "attention", "compile", "quantization", "offload")

USAGE = """\
usage: hydrarun list [models|accelerations|recipes|GROUP ...] [--markdown]

Shows what there is to choose from: all of it, or the tables you name."""


def list_tables(line: Arguments) -> int:
    """Print the tables that the line names, or all; returns the exit code. Raises UsageError for other names."""
    tables = [table(name) for name in line.words or names()]
    if "--markdown" in line.flags:
        print("\n\n".join(map(format_markdown, tables)))
    else:
        print_tables(tables)
    return 0


def names() -> list[str]:
    """The tables: models first, recipes last."""
    return ["models", "accelerations", *(group for group in groups() if group != "model"), "recipes"]


def table(name: str) -> Table:
    """One table by its name; `model` and `recipe` will do too."""
    if name in ("models", "model"):
        return _models()
    if name == "accelerations":
        return _accelerations()
    if name in ("recipes", "recipe"):
        return Table("recipes", catalogue.HEADER, [entry.cells() for entry in catalogue.entries()])
    if name not in names():
        raise UsageError(f"list {name}: no such table.{nearest(name, names())} Tables: {', '.join(names())}.")
    files = sorted((resources.folder("conf") / name).glob("*.yaml"))
    return Table(name, (f"{name}=", "what it is"), [(file.stem, first_comment(file)) for file in files])


def first_comment(file: Path) -> str:
    """The first comment line of a YAML file that says something; headers such as `# @package` do not."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#\s*(?!@)(\S.*)", line):
            return match[1]
    return ""


def _models() -> Table:
    header = ("model=", "task", "checkpoint", "parameters", "steps", "guidance", "size")
    rows = []
    for name, config in configurations():
        model, sampling = config["model"], config["sampling"]
        cells = (model["task"], model["path"], model["facts"].get("parameters", ""), sampling["num_inference_steps"])
        rows.append((name, *map(str, cells), guidance(sampling), size(sampling)))
    return Table("models", header, rows)


def _accelerations() -> Table:
    rows = []
    for name, config in configurations():
        methods = (method(config, degree) for degree in METHODS)
        rows.append((name, *methods, *(acceleration(config, group) for group in ACCELERATIONS)))
    return Table("accelerations", ("model=", *METHODS, *ACCELERATIONS), rows)


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model option, and what it is composed to by itself."""
    for file in sorted((resources.folder("conf") / "model").glob("*.yaml")):
        yield file.stem, compose_raw([f"model={file.stem}"])[0]


def guidance(sampling: dict[str, Any]) -> str:
    """The scales that a model has by itself; of two experts the high noise's first."""
    names = {"true_cfg_scale": "", "guidance_scale": "", "guidance_scale_2": ""}
    if sampling["true_cfg_scale"] is not None and sampling["guidance_scale"] is not None:
        names["guidance_scale"] = " (embedded)"
        names.pop("true_cfg_scale")
    return ", ".join(f"{sampling[name]}{note}" for name, note in names.items() if sampling[name] is not None)


def size(sampling: dict[str, Any]) -> str:
    """Width x height as a model has them by itself, and frames or layers; of sounds their seconds."""
    if sampling["audio_start_in_s"] is not None:
        end = sampling["audio_end_in_s"]
        return "the longest" if end is None else f"{end - sampling['audio_start_in_s']:g} s"
    lengths = (kind.length(sampling) for kind in KINDS if kind.field and sampling[kind.field] is not None)
    parts = "".join(f", {length}" for length in lengths if length)
    pixels = "of the image" if sampling["height"] is None else f"{sampling['width']}x{sampling['height']}"
    return pixels + parts


def method(config: dict[str, Any], name: str) -> str:
    """Whether the model goes with this parallel method as it is (two pictures are drawn), or with guidance on."""
    degrees = {**config["parallel"], f"{name}_degree": 2}
    scale, off = cfg_scale(config)[0], cfg_off(config)
    for answer, more in (("yes", {}), (f"{scale} > {off:g}", {scale: off + 1})):
        sampling = {**config["sampling"], "num_images_per_prompt": 2, "seed": 0, **more}
        if not any(compat.violations({**config, "parallel": degrees, "sampling": sampling})):
            return answer
    return "-"


def acceleration(config: dict[str, Any], group: str) -> str:
    """The options of `group` that the model goes with; `all` of them, or `-` for none."""
    files = sorted(file for file in (resources.folder("conf") / group).glob("*.yaml") if file.stem != "none")
    names: list[str] = []
    others: list[str] = []
    for file in files:
        node = load_option(config, group, file)
        (others if any(compat.violations({**config, group: node})) else names).append(file.stem)
    if len(names) > 2:
        return "all" if not others else f"all but {', '.join(others)}"
    return ", ".join(names) or "-"
