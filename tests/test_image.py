"""The container image, as far as it can be read: building it takes Docker, which CI has."""

import fnmatch
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def test_what_is_copied_is_there_and_enough_to_install():
    ignored = [
        line.removeprefix("**/")
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    needed = ["requirements.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"]
    needed += ["guided_diffusion", "evaluations", "esddpm_io", "scripts", "models", "precomputed"]
    assert not [name for name in needed if any(fnmatch.fnmatch(name, i) for i in ignored)]
    for source in re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE):
        assert (REPOSITORY / source).exists()


def test_the_image_gets_the_pinned_packages_without_tensorflow_and_mpi():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if "==" in line]
    left_out = re.search(r"grep -vE '(.*?)'", DOCKERFILE)[1]
    kept = [pin for pin in pins if not re.search(left_out, pin)]
    assert {"numpy", "scipy", "pillow", "matplotlib"} <= {pin.split("==")[0] for pin in kept}
    assert not re.search("tensorflow|mpi", "".join(kept))
    assert sum(pin.startswith("torch==") for pin in pins) == 1
