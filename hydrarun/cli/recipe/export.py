"""`hydrarun recipe export`: writes a finished run as a recipe, with its results as evidence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydrarun.cli.recipe import evidence, minimal, pixel_digest
from hydrarun.cli.recipe.preview import describe_outputs, quote_recipe
from hydrarun.config.checks.configuration import check_configuration
from hydrarun.config.compose import compose_config
from hydrarun.config.prompts import LINE
from hydrarun.config.recipes import file
from hydrarun.config.recipes.metadata import FORMAT, Evidence, Measurement
from hydrarun.config.recipes.yaml_loader import parse_sections
from hydrarun.config.schema import fill_defaults
from hydrarun.core.errors import UsageError
from hydrarun.core.files import read_file, write_atomically
from hydrarun.core.inputs import image_paths
from hydrarun.core.resources import read_options
from hydrarun.core.strict_yaml import dump_yaml
from hydrarun.outputs.provenance import expand_home, keep_pixel_settings
from hydrarun.outputs.reader import read_run_json

MAX_IMAGES = 16 * 2**20  # most bytes of input images that are copied next to a recipe


def export_run(run_dir: Path, path: Path) -> None:
    """Write the recipe of the run in `run_dir` to `path`, with its thumbnail and input files, and print a summary.

    Raises UsageError for a run that no recipe can reproduce, and for files that already exist. Raises RunError if
    outputs of the run are missing or changed.
    """
    if path.suffix != ".yaml":
        raise UsageError(f"recipe export: {path}: the name of a recipe ends in .yaml.")
    record = read_finished_run(run_dir)
    config = check_recorded_config(record)
    measured = evidence.measure_run(record, run_dir, path.with_suffix(".webp").name)
    images, lines = collect_images(config, measured, path), collect_prompts(config, path)
    thumbnail = path.with_suffix(".webp")
    for target in (path, thumbnail, *images, *lines):
        if os.path.lexists(target):
            raise UsageError(
                f"recipe export: {target} exists; choose another: hydrarun recipe export {run_dir} FILE.yaml"
            )
    wanted = pin_config(config, measured)
    try:
        content = minimal.make_minimal_recipe(wanted)
    except minimal.InexpressibleError as reason:
        raise UsageError(f"recipe export: {run_dir}: {reason}") from None
    if images or lines:
        given = {"images": [image.name for image in images], "prompts": next((one.name for one in lines), None)}
        content["input"] = {key: value for key, value in given.items() if value}
    beside = {**images, **lines, thumbnail: pixel_digest.make_thumbnail(evidence.read_first_output(record, run_dir))}
    recipe = parse_recipe(path, format_recipe(content, config))
    text = file.replace_evidence(recipe, Evidence(FORMAT, "unverified", "", measured))
    write_recipe_files(path, text, beside, wanted)
    print_summary(path, config, list(beside))


def read_finished_run(run_dir: Path) -> dict[str, Any]:
    """Read the run.json of a complete run. Raises UsageError."""
    where = f"recipe export: {run_dir}"
    if not os.path.lexists(run_dir / "run.json"):
        if points := list_points(run_dir):
            raise UsageError(f"{where}: a sweep of {len(points)} runs; give the folder of one: {run_dir / points[0]}")
        raise UsageError(f"{where}: holds no run.json; give the folder of a finished run.")
    record = read_run_json(run_dir / "run.json")
    if record.get("status") != "complete":
        raise UsageError(
            f"{where}: the run did not finish (status {record.get('status')!r}); only a finished run can be exported."
        )
    return record


def list_points(folder: Path) -> list[str]:
    """Return the names of the runs in the folder of a sweep; none if it is no folder."""
    return sorted(point.parent.name for point in folder.glob("*/run.json")) if os.path.isdir(folder) else []


def check_recorded_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """Check the untrusted configuration in run.json like one from the command line. Raises UsageError."""
    config = record.get("config")
    if not isinstance(config, dict):
        raise UsageError("recipe export: run.json holds no configuration.")
    config = fill_defaults(expand_home(config))
    check_configuration(config)
    if any("images" in line for line in config["input"]["prompts"] or ()):
        raise UsageError(
            "recipe export: the run's prompts have input images of their own: export a run of one of them."
        )
    return config


def collect_images(config: Mapping[str, Any], measured: Measurement, path: Path) -> dict[Path, bytes]:
    """Return the input images by their new paths next to the recipe. Raises UsageError for images that changed."""
    found: dict[Path, bytes] = {}
    for index, (name, known) in enumerate(zip(image_paths(config), measured.inputs, strict=False)):
        try:
            data = read_file(name, MAX_IMAGES)
        except OSError as error:
            raise UsageError(f"recipe export: the input image {name}: {error.strerror}.") from None
        if hashlib.sha256(data).hexdigest() != known:
            raise UsageError(f"recipe export: the input image {name} was changed since the run.")
        found[path.with_name(f"{path.stem}-input-{index}{Path(name).suffix.lower()}")] = data
    if sum(map(len, found.values())) > MAX_IMAGES:
        raise UsageError(
            f"recipe export: the input images are more than {MAX_IMAGES >> 20} MiB, too much to go with a recipe."
        )
    return found


def collect_prompts(config: Mapping[str, Any], path: Path) -> dict[Path, bytes]:
    """Return the lines of `input.prompts` as the .jsonl file that the recipe names; empty if there are none."""
    lines = config["input"]["prompts"]
    if lines is None:
        return {}
    own = ({key: value for key, value in line.items() if key != LINE} for line in lines)
    return {path.with_suffix(".jsonl"): "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in own).encode()}


def pin_config(config: Mapping[str, Any], measured: Measurement) -> dict[str, Any]:
    """Return the configuration that the recipe must compose to: the one of the run, without paths of the machine.

    Device kind and dtype are set to the ones that the run used, because pixels depend on both.
    """
    model = {**config["model"]}
    if evidence.is_local_path(model["path"]):
        model["path"] = read_options("model").get(model["name"], {}).get("model", {}).get("path", model["path"])
    elif measured.weights.revision:
        model["revision"] = measured.weights.revision
    used = {"device": measured.device.partition(":")[0], "dtype": measured.dtype}
    return {**config, **used, "model": model, "input": {"images": None, "prompts": None}}


def format_recipe(content: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Format the recipe as YAML, without its evidence."""
    about = {"about": {"description": f"{config['model']['name']}: {describe_outputs(config)}"}}
    parts = ({key: value} for key, value in {**about, **content}.items())
    return "\n".join(map(dump_yaml, parts))


def parse_recipe(path: Path, text: str) -> file.Recipe:
    """Build a recipe that is not on disk yet."""
    _, whole = parse_sections(text.encode())
    return file.Recipe(path, text, whole, whole, None, None)


def write_recipe_files(path: Path, text: str, beside: Mapping[Path, bytes], wanted: Mapping[str, Any]) -> None:
    """Write all files, and remove them again if the recipe does not compose to `wanted`. Raises UsageError."""
    files = {**beside, path: text.encode()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, data in files.items():
            write_atomically(target, data)
        composed = compose_config([quote_recipe(str(path.absolute()))])
        if found := list_differences(composed, wanted):
            raise UsageError(f"recipe export: a recipe cannot reproduce this run: {', '.join(found)} would differ.")
    except BaseException as error:
        for target in files:
            with suppress(OSError):
                target.unlink()
        if isinstance(error, OSError):
            raise UsageError(f"recipe export: {path} cannot be written: {error.strerror}.") from None
        raise


def list_differences(composed: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the sections whose settings for the pixels differ. `input` is left out, since its files are copies."""
    one, other = (keep_pixel_settings({**config, "input": None}) for config in (composed, wanted))
    return [key for key in one if one[key] != other.get(key)]


def print_summary(path: Path, config: Mapping[str, Any], beside: list[Path]) -> None:
    """Print the written files and the next step."""
    print(f"{path}, and next to it {', '.join(one.name for one in beside)}")
    if evidence.is_local_path(config["model"]["path"]):
        print("the run's weights are a folder, which the recipe does not name; its evidence was measured with them")
    print(f"not verified yet; run: hydrarun recipe verify {path}")
