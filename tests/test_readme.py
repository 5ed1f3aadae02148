"""What the READMEs tell people to type works."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "datasets/README.md", "evaluations/README.md")
PAGES += tuple(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Words of every `python SCRIPT …` of the pages, those before `python` left out."""
    found = {}
    for page in PAGES:
        for block, inline in CODE.findall((REPOSITORY / page).read_text()):
            for line in (block or inline).replace("\\\n", " ").splitlines():
                if re.search(r"\b(python|torchrun)\b.*\.py\b", line):
                    words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
                    while not words[0].endswith(".py"):
                        del words[0]
                    found[tuple(words)] = None
    return [list(words) for words in found]


def script_of(words: list[str]) -> Path:
    """Published commands are typed in `scripts/`, all others in the repository."""
    return next(
        path
        for path in (REPOSITORY / words[0], REPOSITORY / "scripts" / words[0])
        if path.is_file()
    )


def help_of(script: Path, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def test_every_documented_flag_exists(monkeypatch, capsys):
    documented = commands()
    assert len(documented) > 20
    helps: dict[Path, str] = {}
    for words in documented:
        script = script_of(words)
        if script not in helps:
            helps[script] = help_of(script, monkeypatch, capsys)
        for word in words[1:]:
            if word.startswith("--"):
                flag = word.split("=")[0]
                assert re.search(rf"{flag}\b", helps[script]), f"{' '.join(words)}: {flag}"


SCRIPTS = sorted(
    path
    for folder in ("scripts", "scripts/imagenet_dataloader", "evaluations", "datasets")
    for path in (REPOSITORY / folder).glob("*.py")
    if "__main__" in path.read_text()
)


def test_every_flag_is_explained(monkeypatch, capsys):
    assert len(SCRIPTS) >= 25
    for script in SCRIPTS:
        shown = re.split(r"^options:", help_of(script, monkeypatch, capsys), flags=re.MULTILINE)[1]
        # A flag without help is followed by the next one, or by the end.
        flags = re.split(r"^  (?=-)", shown, flags=re.MULTILINE)[1:]
        bare = [flag for flag in flags if not re.search(r"(  |\n {10,})\S", flag)]
        assert not bare, f"{script}: {bare}"


def test_help_begins_with_a_sentence_and_an_example(monkeypatch, capsys):
    for script in SCRIPTS:
        usage, sentence, example = help_of(script, monkeypatch, capsys).split("\n\n")[:3]
        assert usage.startswith(f"usage: {script.name} ") and "\n" not in usage, script
        assert re.fullmatch(r"[A-Z][^\n]*[.]", sentence), f"{script}: {sentence}"
        assert example.startswith("    ") and "python " in example, f"{script}: {example}"
        written = re.search(r"(\w+)[.]py", example)[1]
        assert written == script.stem.replace("classifier_sample_diff", "image_sample_diff"), script


def anchors(text: str) -> set[str]:
    """The names that headings of a page can be linked by."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    text = (REPOSITORY / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


def test_the_readme_is_for_a_person_in_a_hurry():
    assert len((REPOSITORY / "README.md").read_text().split()) < 1200


def section(page: str, title: str) -> str:
    text = (REPOSITORY / page).read_text()
    (body,) = re.findall(rf"^## {title}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    return body


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_your_own_data_in_five_commands(tmp_path):
    """The README's own words, in a folder that looks like the repository; only fewer steps."""
    text = section("docs/own_data.md", "Your own data in five commands")
    (script,), (preset,) = blocks(text, "bash"), blocks(text, "toml")
    assert script.count("python ") == 5
    for name in ("scripts", "evaluations"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "exps" / "mine").mkdir(parents=True)

    (vae_steps, *_), (ddpm_steps, *_) = (
        re.findall(rf"{flag} (\d+)", script) for flag in ("--iterations", "--lr_anneal_steps")
    )
    shorter = {vae_steps: "3", ddpm_steps: "2", "1000": "6"}
    for number, few in shorter.items():
        for digits, replacement in ((f"{int(number):06d}", f"{int(few):06d}"), (number, few)):
            script = re.sub(rf"(?<!\d){digits}(?!\d)", replacement, script)
            preset = re.sub(rf"(?<!\d){digits}(?!\d)", replacement, preset)
    # Nine images of the data set are enough to fit the prior to.
    with np.load(REPOSITORY / "evaluations/precomputed/VIRTUAL_emoji32_labeled.npz") as reference:
        np.savez(tmp_path / "images.npz", arr_0=reference["arr_0"][::420])
    script = re.sub(r"^DATA=.*$", "DATA=images.npz", script, flags=re.MULTILINE)
    script = script.rstrip() + " --backend torch --json metrics.json"
    (tmp_path / "exps" / "mine" / "mine.toml").write_text(preset)

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "25 of 50 steps" in done.stdout
    with np.load(tmp_path / "exps" / "mine" / "samples" / "samples_all.npz") as samples:
        assert samples["arr_0"].shape == (6, 32, 32, 3)
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert result["images"] == 6
    assert result["metrics"]["frechet_distance"] > 0
