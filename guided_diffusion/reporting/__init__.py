"""Finished runs side by side: read, grouped by what may be compared, drawn, put on a page."""
