"""Output files of a run: writing, reading back, quality metrics, and the report on a sweep."""
