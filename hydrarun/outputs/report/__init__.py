"""The report on a sweep: report.html, a self-contained file, and report.json."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: Path, reference: str | None = None) -> Path:
    """Write report.html and report.json about the runs in and below `folder`; returns the path of the page.

    `reference`: the setting to compare with, by its label or the name of a point in it; by default the first without
    cache and quantization. Points that failed, were killed or are damaged are shown with their error. Raises UsageError
    if there are no runs or no such reference, RunError if nothing can be written.
    """
    from hydrarun.outputs.report import collect, layout

    arranged = layout.arrange_grid(collect.collect_points(folder), reference)
    from hydrarun.outputs.report import page  # imports numpy and Pillow, so only after the checks

    return page.write_page(folder, arranged)
