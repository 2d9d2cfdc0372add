"""Formats the numbers of the page."""

from __future__ import annotations

from hydrarun.outputs.quality.metrics import PSNR_CAP


def format_significant(value: float) -> str:
    """Format with three significant digits: 0.0123, 4.56, 78.9, 1234."""
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"
    )


def format_milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds."""
    return format_significant(seconds * 1000)


def format_gibibytes(count: float) -> str:
    """Format bytes as GiB."""
    return f"{count / 2**30:.2f}"


def format_speedup(factor: float) -> str:
    """Format a speedup factor."""
    return f"{factor:.2f}×"


def format_decibels(psnr: float, unit: str = "") -> str:
    """Format a PSNR; `same` for identical pixels."""
    return "same" if psnr >= PSNR_CAP else f"{psnr:.1f}{unit}"


def format_ssim(value: float) -> str:
    """Format an SSIM."""
    return f"{value:.4f}"


def format_percent(value: float) -> str:
    """Format a share (0 to 1) as a percentage."""
    return f"{100 * value:.0f} %"


def format_count(number: int, one: str) -> str:
    """Format a count with its noun: `1 point`, `2 points`."""
    return f"{number} {one}{'' if number == 1 else 's'}"
