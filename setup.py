"""A wheel has the scripts inside the package; all else is declared in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithScripts(build_py):
    """Put scripts/*.py where `settings.presets` looks for them, but not for an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "guided_diffusion" / "scripts"
        for script in sorted(Path(__file__).parent.joinpath("scripts").glob("*.py")):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(script, target / script.name)


setup(cmdclass={"build_py": BuildWithScripts})
