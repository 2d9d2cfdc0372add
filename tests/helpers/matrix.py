"""The matrix of every model with every acceleration: how each cell is run, and the tables in docs/matrix.md.

Rows are the options of `model`. Columns are the options of each group in `GROUPS`; of `parallel` only those for two
ranks. New options become columns automatically.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch._dynamo.utils import counters

from hydrarun.acceleration.compilation import CompileFull
from hydrarun.config.checks import compatibility
from hydrarun.config.checks.values import find_cfg_scale, get_unguided_scale
from hydrarun.config.options import load_option
from hydrarun.config.targets import instantiate
from hydrarun.core import resources
from hydrarun.core.distributed.degrees import split_evenly, world_size
from hydrarun.engine.runner import Runner
from tests.helpers import caches, parallel_runs, subjects, watched
from tests.helpers.deeper import deeper_subject
from tests.helpers.paths import ROOT
from tests.helpers.subjects import CONFIGS, LONG, MODELS, SHORT

PAGE = ROOT / "docs" / "matrix.md"
#: groups whose options are columns, by the title of their table
TABLES = {
    "Over two ranks": ("parallel",),
    "Caches": ("cache",),
    "Memory and compilation": ("offload", "quantization", "compile"),
}
GROUPS = tuple(group for groups in TABLES.values() for group in groups)


class Kind(NamedTuple):
    """The tolerance of a cell: the largest difference of latents from the plain run, or (`lossy`) its root mean square
    relative to the standard deviation of the latents."""

    most: float
    why: str
    lossy: bool = False


#: kinds by option or by group; the option goes first
KINDS = {
    "parallel": Kind(1e-4, "ranks sum in another order, in float32"),
    "parallel=data2": Kind(1e-4, "each picture is drawn in a smaller batch, whose products sum in another order"),
    "offload": Kind(0.0, "the same kernels get the same numbers"),
    "offload=modulation": Kind(1e-5, "one product of many rows sums in another order than many products of few rows"),
    "compile": Kind(1e-5, "the same operations, except that rotations use no complex numbers"),
    "quantization=int8_weight_only": Kind(1e-1, "weights in 8 bits, a scale for each row", lossy=True),
    "quantization=int8": Kind(2e-1, "weights and activations in 8 bits", lossy=True),
    "quantization=fp8": Kind(2e-1, "as fp8_weight_only; only on GPUs", lossy=True),
    "quantization=fp8_weight_only": Kind(2e-1, "weights with 3 bits of mantissa", lossy=True),
    "cache": Kind(
        1.0, "a quarter to half of the steps is skipped, and random weights are hardest to predict", lossy=True
    ),
}
#: steps of a run: one for each of two experts; caches need more, to skip some
STEPS, CACHE_STEPS = 2, 8
#: settings with which measuring caches skip too: no difference exceeds the threshold, and some steps are computed
SKIPPING = {"residual_diff_threshold": 1e9, "max_warmup_steps": 2, "max_continuous_cached_steps": 1}
SKIPPING_GATE = {"threshold": 1e9, "first": 1, "last": 5}


@dataclass(frozen=True)
class Column:
    """An option of a group."""

    group: str
    name: str

    def __str__(self) -> str:
        return f"{self.group}={self.name}"

    @property
    def kind(self) -> Kind:
        return KINDS[str(self)] if str(self) in KINDS else KINDS[self.group]

    def steps(self, name: str) -> int:
        """Return the steps of a model's run; with TeaCache those that its coefficients are for, if it has any."""
        if self.group != "cache":
            return STEPS
        fitted = (CONFIGS[name]["model"]["teacache"] or {}).get("num_inference_steps")
        return max(CACHE_STEPS, *(fitted or [])[:1], 0) if self.name == "teacache" else CACHE_STEPS

    def config(self, name: str, guided: bool = True) -> dict[str, Any]:
        """Return the configuration of a model's small run with this option, with guidance on unless not `guided`."""
        config = CONFIGS[name]
        asked = {**request(name, self.steps(name)), "negative_prompt": None, "seed": 0}
        if not guided:
            del asked[find_cfg_scale(config)[0]]
        sampling = {**config["sampling"], **asked}
        file = resources.find_folder("conf") / self.group / f"{self.name}.yaml"
        node = load_option(config, self.group, file)
        if self.group == "parallel":
            node = {**config["parallel"], **node}
        if self.group == "cache":
            node = set_to_skip({**caches.option(self.name, None), **node})  # with its predictor
        device = "cpu" if self.group != "offload" else "fake"  # offloading needs a device
        return {**config, "dtype": "auto", "device": device, "sampling": sampling, self.group: node}


def set_to_skip(node: dict[str, Any]) -> dict[str, Any]:
    """Return a cache node with the values of `SKIPPING` that apply, and without TeaCache's check of the weights."""
    if "gate" in node:
        gate = {key: SKIPPING_GATE.get(key, value) for key, value in node["gate"].items()}
        if gate.get("fit"):
            gate["fit"] = {**gate["fit"], "weights": None}
        return {**node, "gate": gate}
    return {key: SKIPPING.get(key, value) for key, value in node.items()}


@cache
def columns() -> tuple[Column, ...]:
    """Return all columns."""
    found = []
    for group in GROUPS:
        for file in sorted((resources.find_folder("conf") / group).glob("*.yaml")):
            column = Column(group, file.stem)
            if file.stem != "none" and (group != "parallel" or ranks(column) == 2):
                found.append(column)
    return tuple(found)


def ranks(column: Column) -> int:
    return world_size(column.config("demo")["parallel"])


def request(name: str, steps: int = STEPS) -> dict[str, Any]:
    """Return a request of two prompts of unequal length, with guidance."""
    guidance = {find_cfg_scale(CONFIGS[name])[0]: 3.0}
    return {
        "prompt": [SHORT, LONG],
        "negative_prompt": ["x", LONG],
        "seed": [3, 4],
        "num_inference_steps": steps,
        **guidance,
    }


def refusal(name: str, column: Column) -> str | None:
    """Return why a model does not support an option, with an alternative; None if it supports it."""
    for rule in compatibility.find_violations(column.config(name)):
        sentence = rule.sentence.replace("another model than {model}", "another model")
        sentence = sentence.replace("model {model}", "the model").replace("{steps}", str(column.steps(name)))
        fixes = ", or ".join(rule.list_fixes(column.config(name))).replace(f"model={name}", "model=MODEL")
        return f"{sentence[0].upper()}{sentence[1:]}. Use {fixes}."
    return None


def condition(name: str, column: Column) -> str:
    """Return the condition under which a model supports an option; usually empty."""
    if not any(compatibility.find_violations(column.config(name, guided=False))):
        return ""
    return f"{find_cfg_scale(CONFIGS[name])[0]} > {get_unguided_scale(CONFIGS[name]):g}"


# --- running a cell --------------------------------------------------------------------------------------------------


class Bench:
    """Runs the cells; results that several cells need are kept."""

    def __init__(self, pool: Any, fake: Any) -> None:
        self.pool = pool
        self.fake = fake
        self.kept: dict[tuple[Any, ...], Any] = {}

    def once(self, *key: Any, make: Any) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def distance(self, subject: subjects.Subject, column: Column) -> float:
        """Return the distance of the latents from the plain run, in the measure of the column's kind."""
        found, want = getattr(self, column.group)(subject, column)
        assert found.shape == want.shape
        assert np.isfinite(found).all()
        difference = found.astype(np.float64) - want
        if column.kind.lossy:
            return float(np.sqrt(np.square(difference).mean()) / want.std())
        return float(np.abs(difference).max())

    def plain(self, subject: subjects.Subject, steps: int = STEPS, **more: Any) -> Any:
        """Return the state of the plain run."""
        fields = {**request(subject.name, steps), **more}
        return self.once(subject.name, steps, *more, make=lambda: subject.draw(**fields))

    def parallel(self, subject: subjects.Subject, column: Column) -> tuple[np.ndarray, np.ndarray]:
        """Draw at a size whose tokens do not divide evenly. Check that all ranks have the same pictures."""
        size = subject.size(3, 5)
        alone = self.plain(subject, **size)
        degrees = column.config(subject.name)["parallel"]
        chosen = {key: value for key, value in degrees.items() if key.endswith("_degree") and value > 1}
        images = CONFIGS[subject.name]["model"]["input_images"][0]
        fields = {**request(subject.name), **size}
        results = self.pool(ranks(column), parallel_runs.draw, subject.name, subject.folder, chosen, images, fields)
        for frames, _, _ in results:
            assert subjects.apart(frames, alone.frames) <= 1
        want = alone.latents.numpy()
        return joined([latents for _, latents, _ in results], degrees["data_degree"], want), want

    def cache(self, subject: subjects.Subject, column: Column) -> tuple[np.ndarray, np.ndarray]:
        """Draw with a cache. Check that some blocks were skipped."""
        steps = column.steps(subject.name)
        node = column.config(subject.name)["cache"]
        if node.get("prune"):
            return self.prune(subject, node, steps)
        want = self.plain(subject, steps).latents.numpy()
        found = subject.draw(cache=node, **request(subject.name, steps)).latents.numpy()
        blocks = subject.runner.built.parts.cache.record()["blocks"]
        assert 0 < blocks["run"] < blocks["all"]
        return found, want

    def prune(self, subject: subjects.Subject, node: dict[str, Any], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """A cache that decides for each block, with the median change as threshold. Also: not all steps are skipped.

        Twice the blocks, since the library never skips the first one of a tiny model's two. Random blocks change less
        once the block before them is skipped, so a step skips all of them or none.
        """
        deep = self.deep(subject)
        subject = replace(deep, runner=watched.runner(deep, "cpu"))
        fields = request(subject.name, steps)
        want = subject.draw(cache={**node, "residual_diff_threshold": 1e-12}, **fields).latents.numpy()
        changes = [change for one in statistics(subject) for step in one["residual_diffs"].values() for change in step]
        node = {**node, "residual_diff_threshold": float(np.median(changes))}
        found = subject.draw(cache=node, **fields).latents.numpy()
        skipped = [count for one in statistics(subject) for count in one["pruned_blocks"][node["max_warmup_steps"] :]]
        assert min(skipped) == 0 < max(skipped), skipped
        return found, want

    def deep(self, subject: subjects.Subject) -> subjects.Subject:
        """The subject with twice the blocks, without a runner."""
        return self.once(subject.name, "deep", make=lambda: deeper_subject(subject, Path(tempfile.mkdtemp())))

    def offload(self, subject: subjects.Subject, column: Column) -> tuple[np.ndarray, np.ndarray]:
        """Draw the second request on a device with separate memory, so that weights are onloaded again.

        The model has twice the blocks, so that blocks can be prefetched in a ring.
        """
        deep = self.deep(subject)
        want = self.once(subject.name, "fake", make=lambda: drawn(watched.runner(deep, "fake")))
        runner = watched.runner(deep, "fake", column.name)
        drawn(runner)
        return drawn(runner), want

    def quantization(self, subject: subjects.Subject, column: Column) -> tuple[np.ndarray, np.ndarray]:
        node = column.config(subject.name)["quantization"]
        runner = Runner({**watched.smallest(subject.name, subject.folder), "quantization": node})
        want = self.once(subject.name, "cpu", make=lambda: drawn(watched.runner(subject, "cpu")))
        return drawn(runner), want

    def compile(self, subject: subjects.Subject, column: Column) -> tuple[np.ndarray, np.ndarray]:
        """Draw with traced code, without code generation. Check for graphs without breaks, a single one for `full`."""
        want = self.plain(subject, prompt="a cat", negative_prompt="a dog", seed=3).latents.numpy()
        fields = {**request(subject.name), "prompt": "a cat", "negative_prompt": "a dog", "seed": 3}
        option = instantiate(column.config(subject.name)["compile"], "compile")
        torch._dynamo.reset()
        counters.clear()
        with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")), uncompiled(subject):
            for transformer in subject.runner.built.parts.experts:
                option.apply(transformer)
            found = subject.draw(**fields).latents.numpy()
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 1 or column.name != "full"
        assert counters["stats"]["unique_graphs"] >= 1
        return found, want


def statistics(subject: subjects.Subject) -> list[dict[str, Any]]:
    """What Cache-DiT measured in the last request, of each expert and branch."""
    found = subject.runner.built.parts.cache.record()["statistics"]
    return [branch for expert in found.values() for branch in expert.values()]


def drawn(runner: Runner) -> np.ndarray:
    """Return the latents of the smallest run."""
    return watched.draw(runner).latents.cpu().numpy()


def joined(shares_of_ranks: Sequence[np.ndarray], data: int, like: np.ndarray) -> np.ndarray:
    """Join the latents of all pictures. Check that ranks with the same pictures agree within tolerance."""
    together = len(shares_of_ranks) // data
    first = shares_of_ranks[::together]
    assert [len(one) for one in first] == list(split_evenly(len(like), data))
    for rank, latents in enumerate(shares_of_ranks):
        assert np.abs(latents - first[rank // together]).max() <= KINDS["parallel"].most
    return np.concatenate(first)


@contextmanager
def uncompiled(subject: subjects.Subject) -> Iterator[None]:
    """Restore the uncompiled transformers of the subject afterwards."""
    try:
        yield
    finally:
        for transformer in subject.runner.built.parts.experts:
            for name in CompileFull.pieces:
                vars(transformer).pop(name, None)
            for block in transformer.all_blocks():
                block._compiled_call_impl = None


# --- docs/matrix.md --------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The result of a cell: a distance and its condition, or the reason for a refusal."""

    distance: float = 0.0
    condition: str = ""
    refusal: str = ""


def written(found: Found, kind: Kind, notes: list[str]) -> str:
    """Format a cell; a refusal is the number of its reason in `notes`, which is added if new."""
    if found.refusal:
        if found.refusal not in notes:
            notes.append(found.refusal)
        return f"– ({notes.index(found.refusal) + 1})"
    number = f"{100 * found.distance:.2g} %" if kind.lossy else f"{found.distance:.0e}"
    number = "0" if found.distance == 0 else number
    return f"{number} ({found.condition})" if found.condition else number


def tables(cells: Mapping[tuple[str, Column], Found]) -> str:
    """Format the tables of docs/matrix.md in Markdown."""
    return "\n\n".join(table(title, groups, cells) for title, groups in TABLES.items())


def table(title: str, groups: Sequence[str], cells: Mapping[tuple[str, Column], Found]) -> str:
    notes: list[str] = []
    own = [column for column in columns() if column.group in groups]
    header = ["model=", *(f"`{column}`" for column in own)]
    rows = [["at most", *(most(column.kind) for column in own)]]
    rows += [[name, *(written(cells[name, column], column.kind, notes) for column in own)] for name in MODELS]
    body = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
    reasons = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([f"**{title}**", "", *body, *(["", *reasons] if reasons else [])])


def most(kind: Kind) -> str:
    return f"{100 * kind.most:g} %" if kind.lossy else f"{kind.most:g}"


MARK, END = "<!-- make matrix -->\n", "<!-- end of the matrix -->\n"


def read_tables() -> str:
    """Read the tables in docs/matrix.md."""
    _, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    shown, end, _ = rest.partition(END)
    assert mark
    assert end
    return shown.strip()


def read_cells() -> dict[tuple[str, str], str]:
    """The text of each cell of docs/matrix.md, by model and column; the reason in place of its number."""
    cells = {}
    for part in read_tables().split("**")[2::2]:
        notes = dict(re.findall(r"^(\d+)\. (.*)$", part, re.MULTILINE))
        header, _, _, *rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        for name, *texts in rows:
            for column, text in zip(header[1:], texts, strict=True):
                number = re.fullmatch(r"– \((\d+)\)", text)
                cells[name, column.strip("`")] = notes[number[1]] if number else text
    return cells


def compare_cell(page: str, found: Found, kind: Kind) -> None:
    """Raise AssertionError where the page says something else; numbers differ from machine to machine."""
    assert shape(page) == shape(found.refusal or written(found, kind, [])), "`make matrix` writes the tables anew"


def write_tables(text: str) -> None:
    """Replace the tables of docs/matrix.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(before + MARK + "\n" + text + "\n\n" + END + rest.partition(END)[2], encoding="utf-8")


def shape(text: str) -> list[list[str]]:
    """Split tables into cells with the numbers replaced by `#`, because distances differ between machines."""
    return [[re.sub(r"^[\d.e+-]+( %)?", "#", cell) for cell in line.split(" | ")] for line in text.splitlines()]
