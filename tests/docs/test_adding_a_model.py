"""docs/adding-a-model.md says what families cost in lines; the figures are the files' own."""

from __future__ import annotations

import re

from tests.helpers.paths import ROOT


def lines(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_line_counts_are_true():
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    figures = re.findall(r"\]\(\.\./(hydrarun/[\w/]+\.py)\): (\d+)", text)
    modules = {f"hydrarun/models/{file.name}" for file in (ROOT / "hydrarun/models").glob("[a-z]*.py")}
    contract = {f"hydrarun/models/{name}.py" for name in ("transformer", "experts")}
    assert {path for path, _ in figures} >= modules - contract
    for path, figure in figures:
        assert int(figure) == lines(path), path


def test_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((\.\./[^)#]+|[\w./-]+\.md)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
