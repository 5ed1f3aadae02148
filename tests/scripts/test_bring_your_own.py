"""The commands of docs/bring_your_own.md for denoisers of others run, on a few images."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from guided_diffusion.commands import convert, driver, propose, sweep

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "bring_your_own.md"
# What makes a run of minutes one of seconds; the last of a flag counts.
_FEW = "--limit 8 --steps 2 --devices cpu --eval_backend torch"
MAINS = {
    "convert_checkpoint.py": (convert.main, ""),
    "generate_processes_diffusion_and_reverse.py": (driver.main, _FEW),
    "propose_t_prime.py": (propose.main, f"{_FEW} --num_images 4"),
    "sweep.py": (sweep.main, f"{_FEW} --t_prime 200"),
}


def commands() -> list[list[str]]:
    """Those that convert, and those that sample with what was converted."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    whole_lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [shlex.split(line, comments=True) for line in whole_lines]
    return [words[1:] for words in lines if "pipeline" in words or "convert" in " ".join(words)]


def test_they_run(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) == 7
    for script, *flags in found:
        main, few = MAINS[Path(script).name]
        paths = [str(REPOSITORY / f) if f.startswith("scripts/") else f for f in flags]
        main([*paths, *few.split()])
    with np.load(tmp_path / "with_pipeline" / "samples_all.npz") as npz:
        assert npz["arr_0"].shape == (8, 32, 32, 3)
    assert (tmp_path / "with_pipeline" / "metrics.json").is_file()
    assert (tmp_path / "sweep" / "sweep.csv").is_file()
    for name in ("emoji32.safetensors", "guided.pt", "guided.json", "pipeline/README.md"):
        assert (tmp_path / name).is_file()
