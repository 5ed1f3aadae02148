"""Jobs that a folder's runs were handed to Slurm as, and how they stand."""

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from esddpm_io.files import is_blob

JOBS_FILE = "slurm_jobs.txt"  # ids; a line for each time that the folder's run was submitted
_LOOK_S = 15.0  # Slurm's controller has others to serve
_PATIENCE_S = 10.0


class JobQueue:
    """What Slurm says of the jobs of some folders; silent where there is none, or no Slurm."""

    def __init__(self, folders: Iterable[str]):
        # A point of a sweep is sampled by the jobs of the sweep, which lies around it.
        places = {place for f in folders if not is_blob(f) for place in (f, os.path.dirname(f))}
        self._files = [Path(place, JOBS_FILE) for place in sorted(places)]
        self._next_look, self._line = 0.0, ""

    def look(self) -> str:
        """One line as "Slurm: 3 of 4_[1-3] PENDING (Resources), …"; "" if no job is left."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            self._line = self._ask()
        return self._line

    def _ask(self) -> str:
        texts = [path.read_text() for path in self._files if path.is_file()]
        jobs = [word for text in texts for word in re.findall(r"\d+", text)]
        if not jobs or shutil.which("squeue") is None:
            return ""
        # Job, state, and what it waits for; -r: a line for each element of an array.
        argv = ["squeue", "--noheader", "-r", "-o", "%F %T %r", f"--jobs={','.join(jobs)}"]
        try:
            found = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "Slurm: squeue does not answer"
        # An error where all jobs are long gone.
        counts = Counter(tuple(line.split(None, 2)) for line in found.stdout.splitlines())
        parts = []
        for (job, state, reason), number in sorted(counts.items()):
            waits = f" ({reason.strip()})" if state == "PENDING" else ""
            parts.append(f"job {job}: {number} {state}{waits}")
        return f"Slurm: {', '.join(parts)}" if parts else ""
