"""The report on a sweep: report.html, one file that needs no other, and report.json."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: Path, reference: str | None = None) -> Path:
    """Write report.html and report.json about the runs in and below `folder`; returns the page's path.

    `reference`: the setting, by its label or a point of it, that the others are compared to; by default the first
    without cache and quantization. Points that failed, were killed or are damaged are rows that say so. Raises
    UsageError where there are no runs or no such reference, RunError where nothing can be written.
    """
    from hydrarun.outputs.report import collect, layout

    arranged = layout.arrange_grid(collect.collect_points(folder), reference)
    from hydrarun.outputs.report import page  # numpy and Pillow only now

    return page.write_page(folder, arranged)
