"""Command lines, one file each; `scripts/*.py` are their published names."""
