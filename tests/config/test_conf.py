"""Users read conf/: every option file begins with a description, and every field has a comment above it."""

import re
from pathlib import Path

import pytest

from hydrarun.cli.commands.list import read_first_comment
from hydrarun.core import resources

CONF = resources.find_folder("conf")
FILES = sorted(CONF.rglob("*.yaml"))
KEY = re.compile(r"^( *)(- )?([A-Za-z_]\w*):")


def uncommented(file: Path) -> list[str]:
    """Return the fields without a comment in the line above them or above their heading.

    Exceptions: `_target_`, the defaults list, headings, a `name` equal to the file's, a model's `sampling` section
    (conf/sampling/default.yaml explains its fields), files that extend another option, and Hydra's own settings.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    if any(re.match(r"  - (?!_self_|schema)\w+$", line) for line in lines):
        return []
    found: list[str] = []
    headings: dict[int, tuple[str, bool]] = {}  # indent: key, and whether it has a comment
    for above, line in zip(["", *lines], lines, strict=False):
        if not (match := KEY.match(line)):
            continue
        indent, key = len(match[1]), match[3]
        headings = {depth: heading for depth, heading in headings.items() if depth < indent}
        commented = above.strip().startswith("#")
        path = [name for name, _ in headings.values()]
        covered = bool(headings) and headings[max(headings)][1]
        if not line.split(":", 1)[1].strip():
            headings[indent] = (key, commented)
        elif not (commented or covered or key == "_target_" or line.strip() == f"name: {file.stem}") and not {
            "defaults",
            "sampling",
            "hydra",
        } & {*path}:
            found.append(".".join([*path, key]))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_an_option_says_what_it_is(file):
    assert len(read_first_comment(file)) > 10
    first = next(line for line in file.read_text().splitlines() if line and not line.startswith("# @"))
    assert first.startswith("# ")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_field_has_a_comment_above_it(file):
    if "help" in file.parts or file.parent.name == "parallel":  # none.yaml explains the degrees
        return
    assert uncommented(file) == []


def test_the_rule_finds_a_field_without_a_comment(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "# what it is\nname: bad\nmode: 1\n# said\nother: 2\nsection:\n  inner: 3\n# said\nnext:\n  in: 4\n"
    )
    assert uncommented(file) == ["mode", "section.inner"]


def test_sampling_explains_every_field():
    from dataclasses import fields

    from hydrarun.config.schema import Sampling

    text = (CONF / "sampling" / "default.yaml").read_text()
    explained = set(re.findall(r"^#   ([\w, ]+?)  ", text, re.MULTILINE))
    names = {name.strip() for names in explained for name in names.split(",")}
    assert names == {field.name for field in fields(Sampling)}


def test_parallel_explains_every_degree():
    from dataclasses import fields

    from hydrarun.config.schema import Parallel

    text = (CONF / "parallel" / "none.yaml").read_text()
    assert re.findall(r"^#   (\w+)  ", text, re.MULTILINE) == [field.name for field in fields(Parallel)]
