"""Finished runs on one page: what it says, what may stand together, and how a browser shows it."""

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esddpm_io.errors import UserError
from guided_diffusion.commands import driver, report
from guided_diffusion.reporting.points import point_of, read_groups
from guided_diffusion.reporting.strips import strips_of
from tests.tiny_sampling import IMAGE_SIZE, NUM_IMAGES, TinyFiles

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_SECONDS = 120
METRIC = "Frechet distance (emoji32 features)"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A run of the driver's, sampled and scored."""
    root = tmp_path_factory.mktemp("report")
    preset = TinyFiles(root).preset()
    flags = {"t_prime": 400, "steps": 2, "sampler": "dpmpp_2m_sde", "classifier_guidance_scale": 0}
    flags |= {"dataset": preset, "devices": "cpu", "eval_backend": "torch", "batch_size": 4}
    flags |= {"clip_denoised": True, "output_dir": root / "real"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    driver.main(["--execute", *words])
    return root / "real"


class Runs:
    """Folders of runs like the real one, with other settings and metrics."""

    def __init__(self, root: Path, real: Path):
        self.root, self._real = root, real
        self._record = json.loads((real / "metrics.json").read_text())

    def add(self, name: str, t_prime: int | None, distance: float, **changes: object) -> Path:
        """A run at T', its images darkened by it; `changes` are of its point, or of its record."""
        record = copy.deepcopy(self._record)
        point = point_of(record) | {"t_prime": t_prime}
        if t_prime == 0:
            record["run"] = record["sampling"] = None
            point |= {"sampler": None, "steps": 0, "network_evaluations": 0, "timesteps": []}
        result = record["evaluation"]["results"][0]
        result["metrics"] = {"frechet_distance": distance, "recall": 1 / (1 + distance)}
        result["labels"] = {"frechet_distance": METRIC, "recall": "Recall (emoji32 features)"}
        for key, value in changes.items():
            if key in ("intervals", "metrics", "labels"):
                result[key] = value
            elif key in record:
                record[key] = {**record[key], **value} if isinstance(value, dict) else value
            else:
                point[key] = value
        record["point"] = point
        folder = self.root / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(record))
        with np.load(self._real / "samples_all.npz") as samples:
            shade = 255 - (t_prime or 999) // 4
            np.savez(folder / "samples_all.npz", arr_0=np.minimum(samples["arr_0"], shade))
        return folder


@pytest.fixture
def runs(tmp_path, real) -> Runs:
    return Runs(tmp_path / "sweep", real)


@pytest.fixture
def page(tmp_path):
    """Write the report of folders; its text."""

    def call(*folders: Path, **flags: object) -> str:
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        report.main([*map(str, folders), "--output_dir", str(tmp_path / "out"), *words])
        return (tmp_path / "out" / "report.html").read_text()

    return call


class _Tables(HTMLParser):
    """Cells of all tables of a class, row by row, what is bold between asterisks."""

    def __init__(self, kind: str):
        super().__init__()
        self._kind, self._in, self.tables = kind, False, []

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self._in = dict(attributes).get("class") == self._kind
            self.tables += [[]] if self._in else []
        elif self._in and tag == "tr":
            self.tables[-1].append([])
        elif self._in and tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif self._in and tag in ("strong", "small"):
            self.tables[-1][-1][-1] += "*" if tag == "strong" else "|"

    def handle_endtag(self, tag):
        if self._in and tag == "strong":
            self.tables[-1][-1][-1] += "*"
        if tag == "table":
            self._in = False

    def handle_data(self, data):
        if self._in and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()


def tables(text: str, kind: str = "results") -> list[list[list[str]]]:
    parser = _Tables(kind)
    parser.feed(text)
    return parser.tables


def columns(table: list[list[str]], *names: str) -> list[tuple[str, ...]]:
    places = [next(i for i, head in enumerate(table[0]) if head.startswith(n)) for n in names]
    return [tuple(row[place] for place in places) for row in table[1:]]


def test_a_run_of_the_drivers_says_what_its_point_is(real):
    point = point_of(json.loads((real / "metrics.json").read_text()))
    assert (point["t_prime"], point["steps"], point["sampler"]) == (400, 2, "dpmpp_2m_sde")
    assert point["network_evaluations"] == len(point["timesteps"]) == 2
    assert point["seed"] == 0 and point["samples"] == NUM_IMAGES and point["guidance_scale"] == 0
    assert point["start_images"].endswith("images.npz") and point["seconds_per_image"] > 0


def test_one_file_with_all_there_is_to_know(runs, page, real):
    runs.add("t0", 0, 9.0)
    runs.add("t200", 200, 5.0)
    runs.add("noise", None, 7.0, steps=3, network_evaluations=3)
    text = page(runs.root, real)
    # The real run has other metrics, and is set apart from those that were made up.
    found = next(table for table in tables(text) if len(table) == 4)
    assert columns(found, "T'", "Frechet", "Recall") == [
        ("0 (generator)", "9.000", "0.1000"),
        ("200", "*5.000*", "*0.1667*"),
        ("from noise", "7.000", "0.1250"),
    ]
    assert METRIC in text and not re.search(r"\bFID\b", text)
    # Nothing is fetched from anywhere.
    assert not re.search(r"<link|<iframe|@import|url\((?!#)", text)
    assert set(re.findall(r'src="(.{5})', text)) == {"data:"}
    record = json.loads((real / "metrics.json").read_text())
    again = f"--execute --again {real}/metrics.json --output_dir {real}_again"
    for told in (
        again,
        record["inputs"]["checkpoint"]["sha256"],
        record["provenance"]["date"][:10],
    ):
        assert told in text
    assert html.escape(record["provenance"]["command"], quote=False) in text


def test_what_files_say_stays_text(runs, page):
    evil = '<script>alert("&")</script>'
    runs.add("t1", 1, 2.0, dataset=evil, provenance={"host": evil, "command": evil}, sampler=evil)
    text = page(runs.root)
    assert "&lt;script&gt;" in text
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: found.append(tag)
    parser.feed(text)
    assert found.count("script") == 1 and "svg" in found


def test_seeds_are_averaged_and_their_range_is_told(runs, page):
    runs.add("t200", 200, 5.0, intervals={"frechet_distance": [4.0, 6.0]})
    runs.add("t200_1", 200, 7.0, seed=1)
    runs.add("t400", 400, 8.0)
    text = page(runs.root)
    found = columns(tables(text)[0], "T'", "Seeds", "Frechet")
    assert found == [("200", "2", "*6.000*|5.000 to 7.000"), ("400", "1", "8.000")]
    # Each run's own interval is among its settings, not beside a mean.
    results, settings = text.split("Settings and commands")
    assert "range over 2 seeds" in results and "95 %" not in results
    assert "5 (95 % interval 4 to 6)" in settings


def test_intervals_of_single_runs_are_told(runs, page):
    runs.add("t200", 200, 5.0, intervals={"frechet_distance": [4.0, 6.5]})
    runs.add("t400", 400, 8.0)
    text = page(runs.root)
    assert columns(tables(text)[0], "Frechet")[0] == ("*5.000*|4.000 to 6.500",)
    assert "Small numbers: 95 % interval" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation": {"features": "my features", "graph_sha256": "1"}},
        {"inputs": {"reference": {"path": "other.npz", "sha256": "2"}}},
        {"labels": {"frechet_distance": "FID", "recall": "Recall"}},
    ],
    ids=["features", "reference", "names"],
)
def test_other_features_or_references_stand_apart(runs, page, changes):
    runs.add("t200", 200, 5.0)
    runs.add("t300", 300, 6.0)
    changes = copy.deepcopy(changes)
    if "evaluation" in changes:
        results = json.loads((runs.root / "t200" / "metrics.json").read_text())["evaluation"]
        changes["evaluation"] = {**results, **changes["evaluation"]}
    runs.add("u400", 400, 1.0, **changes)
    text = page(runs.root)
    assert "may not be compared" in text
    assert [columns(table, "T'") for table in tables(text)] == [[("200",), ("300",)], [("400",)]]
    # The best of the one part is not measured by the other: both parts have one.
    assert text.count("Best Frechet") + text.count("Best FID") == text.count("<h2>") == 2


def test_a_sweep_stands_for_its_points_and_a_run_counts_once(runs, page):
    first = runs.add("t200", 200, 5.0)
    runs.add("t400", 400, 8.0)
    (runs.root / "logs").mkdir()
    [group] = read_groups([str(first), str(runs.root), str(first)])
    assert [setting.t_prime for setting in group.settings] == [200, 400]


def test_a_sweeps_differences_are_told_with_their_intervals(runs, page):
    runs.add("t200", 200, 5.0)
    runs.add("t300", 300, 5.5)
    runs.add("t400", 400, 8.0)
    best = {"to": "t200", "difference": 0.0, "interval": None}
    near = {"to": "t200", "difference": 0.5, "interval": [-0.25, 1.25]}
    other = {"to": "t200", "difference": 3.0, "interval": [2.5, 3.5]}
    differences = {"t200": best, "t300": near, "t400": other}
    (runs.root / "sweep.json").write_text(json.dumps({"differences": differences}))
    text = page(runs.root)
    found = columns(tables(text)[0], "T'", "Above the best")
    assert found == [("200", "0.00"), ("300", "0.50|-0.25 to 1.25"), ("400", "3.00|2.50 to 3.50")]
    assert "do not tell it apart from T' 300, dpmpp_2m_sde, 2 network evaluations." in text
    # A run of a sweep that stands alone is compared with nothing.
    assert "Above the best" not in page(runs.root / "t400")


def test_runs_that_seem_alike_are_named(runs, page):
    runs.add("first", 200, 5.0)
    runs.add("second", 200, 6.0)
    runs.add("clipped", 200, 7.0, run={"sampler": {"clip_denoised": False}})
    found = columns(tables(page(runs.root))[0], "Run", "Clipping", "Frechet")
    assert found == [
        ("clipped", "not clipped", "7.000"),
        ("first", "clipped", "*5.000*"),
        ("second", "clipped", "6.000"),
    ]


def test_series_are_named_by_what_tells_them_apart(runs):
    runs.add("a", 200, 5.0)
    runs.add("b", 200, 4.0, steps=5, network_evaluations=5)
    runs.add("c", 200, 4.0, sampler="ddim", eta=0.0)
    [group] = read_groups([str(runs.root)])
    assert [series.label for series in group.series] == [
        "ddim, 2 steps, eta 0",
        "dpmpp_2m_sde, 2 steps, eta 1",
        "dpmpp_2m_sde, 5 steps, eta 1",
    ]
    best = group.best_by_evaluations(group.settings, "frechet_distance")
    assert {number: one.value("frechet_distance") for number, one in best.items()} == {2: 4, 5: 4}


def test_the_strip_shows_the_pixels_of_the_same_indices(runs, page, tmp_path, real):
    runs.add("t200", 200, 5.0)
    runs.add("t400", 400, 8.0)
    text = page(runs.root)
    strip = np.asarray(Image.open(tmp_path / "out" / "strip.png").convert("RGB"))
    with np.load(json.loads((real / "metrics.json").read_text())["run"]["start"]["path"]) as npz:
        start = npz["arr_0"]
    samples = [np.load(runs.root / name / "samples_all.npz")["arr_0"] for name in ("t200", "t400")]
    # No run scored the start images, but they are there: first their row, then one a T'.
    scale, gap = 96 // IMAGE_SIZE, 4
    cell = IMAGE_SIZE * scale + gap
    assert strip.shape[0] == 26 + 3 * cell
    left = strip.shape[1] - NUM_IMAGES * cell
    for row, images in enumerate([start, *samples]):
        for column in (0, 7):
            y, x = 26 + row * cell, left + column * cell
            shown = strip[y : y + cell - gap, x : x + cell - gap]
            expected = images[column].repeat(scale, 0).repeat(scale, 1)
            np.testing.assert_array_equal(shown, expected)
    assert re.findall(r'alt="Sample 7, ([^"]+)"', text)[:3] == ["generator", "T' 200", "T' 400"]
    with Image.open(tmp_path / "out" / "sweep.png") as plot:
        assert plot.width > plot.height > 300


def test_the_nearest_real_images_of_the_best(runs, page, real):
    """Samples that are images of the reference have themselves as neighbours."""
    record = json.loads((real / "metrics.json").read_text())
    best = runs.add("t200", 200, 5.0)
    runs.add("t400", 400, 8.0)
    shutil.copy(record["inputs"]["reference"]["path"], best / "samples_all.npz")
    text = page(runs.root)
    near = text[text.index("Nearest real images") :]
    assert "T' 200" in near[: near.index("<table")]
    rows = re.findall(r"<tr><th scope=\"row\">#.*?</tr>", near, re.DOTALL)
    assert len(rows) == 6
    for row in rows:
        sample, first, second = re.findall(r'src="([^"]+)"', row)[:3]
        assert sample == first != second
        distances = [float(number) for number in re.findall(r"<small>([^<]+)", row)]
        assert distances == sorted(distances) and distances[0] < 0.1 < distances[1]
    few = page(runs.root, nearest=2)
    assert len(re.findall(r"<tr><th scope=\"row\">#", few)) == 2
    assert "They were not looked for" in page(runs.root, nearest=0)


def test_without_the_reference_a_sentence_takes_their_place(runs, page):
    for number, reference in enumerate(
        [
            {"path": "/nowhere/ref.npz", "sha256": "0"},
            {"path": __file__, "sha256": "1"},
        ]
    ):
        runs.add(f"t{number}", 200, 5.0, inputs={"reference": reference})
    text = page(runs.root)
    assert "/nowhere/ref.npz is not there any more" in text
    assert f"{Path(__file__).name} is not what it was" in text


def test_rows_show_a_seed_that_all_have(runs, page):
    runs.add("a0", 200, 5.0, seed=0)
    runs.add("a1", 200, 5.0, seed=1)
    runs.add("b1", 400, 5.0, seed=1)
    black = np.zeros((NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    np.savez(runs.root / "a0" / "samples_all.npz", black)
    [group] = read_groups([str(runs.root)])
    [strip] = strips_of(group)
    row = next(row for row in strip.rows if row.name == "T' 200")
    assert strip.seed == 1 and row.images.any()
    runs.add("c2", 600, 5.0, seed=2)
    assert "no seed in common" in page(runs.root)


def test_only_a_generators_images_make_a_page(runs, page):
    runs.add("t0", 0, 5.0)
    text = page(runs.root)
    assert [row[0] for row in tables(text)[0]] == ["T'", "0 (generator)"]
    assert "no samples of a network" in text


def test_images_of_two_sizes_are_refused(runs, tmp_path):
    runs.add("t200", 200, 5.0)
    large = runs.add("t400", 400, 5.0)
    np.savez(large / "samples_all.npz", np.zeros((NUM_IMAGES, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"t400 has images of 16x16, .*t200 of 8x8"):
        report.write([str(runs.root)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- in a browser ---

# Loads the page in two widths, does what a reader would, and leaves what it saw as its text.
HARNESS = """<!DOCTYPE html><meta charset="utf-8">
<iframe id="wide" src="report.html" width="1200" height="900"></iframe>
<iframe id="narrow" src="report.html" width="400" height="900"></iframe>
<pre id="seen"></pre>
<script>
addEventListener("load", () => {
  const pages = {};
  for (const name of ["wide", "narrow"]) {
    const doc = document.getElementById(name).contentDocument, root = doc.documentElement;
    const column = at => Array.from(doc.querySelectorAll(".results tbody tr"),
      row => row.cells[at].firstChild.textContent);
    const heads = Array.from(doc.querySelectorAll(".results thead th"));
    const sorted = [];
    for (const text of ["Frechet", "Frechet", "T'"]) {
      const at = heads.findIndex(head => head.textContent.startsWith(text));
      heads[at].querySelector("button").click();
      sorted.push([heads[at].getAttribute("aria-sort"), ...column(0)]);
    }
    const view = doc.querySelector(".view"), slider = view.querySelector("input[type=range]");
    const chosen = view.querySelector(".chosen img");
    const slid = [];
    for (let place = 0; place <= Number(slider.max); place++) {
      slider.value = place;
      slider.dispatchEvent(new Event("input"));
      const source = view.querySelectorAll("tbody tr")[place].querySelectorAll("img")[0].src;
      slid.push([slider.getAttribute("aria-valuetext"), chosen.src === source, chosen.alt]);
    }
    view.querySelectorAll("thead button")[3].click();
    const fourth = chosen.alt;
    view.querySelectorAll("tbody tr")[1].querySelectorAll("img")[2].click();
    pages[name] = {
      sorted, slid, fourth, third: chosen.alt, at: slider.value,
      sources: new Set(Array.from(view.querySelectorAll("tbody tr td:nth-child(2) img"),
        image => image.src)).size,
      crisp: getComputedStyle(chosen).imageRendering,
      shown: chosen.getBoundingClientRect().width,
      overflow: root.scrollWidth - root.clientWidth,
      paper: getComputedStyle(doc.body).backgroundColor,
      unnamed: Array.from(doc.querySelectorAll("img, svg")).filter(
        one => !(one.alt || one.getAttribute("aria-label"))).length,
    };
  }
  document.getElementById("seen").textContent = JSON.stringify(pages);
});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}): see docs/report.md")
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_it(runs, page, tmp_path, browser, theme):
    runs.add("t0", 0, 9.0)
    runs.add("t200", 200, 5.0, intervals={"frechet_distance": [4.0, 6.5]})
    runs.add("t1000", 1000, 6.0)
    runs.add("a_name_that_is_long_enough_to_need_a_line_of_its_own" * 4, 300, 8.0)
    page(runs.root)
    harness = tmp_path / "out" / "harness.html"
    harness.write_text(HARNESS)
    argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    # So that the page around may look into the frames, both of them files.
    argv += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    argv += ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    argv += ["--window-size=1700,1000", "--dump-dom", harness.as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BROWSER_SECONDS)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]))
    for width, told in {"wide": 1200, "narrow": 400}.items():
        found = seen[width]
        assert found["overflow"] <= 0, f"the page scrolls sideways at {told} pixels"
        assert found["sorted"] == [
            ["ascending", "200", "1000", "300", "0 (generator)"],
            ["descending", "0 (generator)", "300", "1000", "200"],
            ["ascending", "0 (generator)", "200", "300", "1000"],
        ]
        assert [label for label, _, _ in found["slid"]] == [
            f"generator; {METRIC} 9",
            f"T' 200; {METRIC} 5",
            f"T' 300; {METRIC} 8",
            f"T' 1000; {METRIC} 6",
        ]
        assert all(same for _, same, _ in found["slid"]) and found["sources"] > 1
        assert (found["fourth"], found["third"]) == ("Sample 3, T' 1000", "Sample 2, T' 200")
        assert found["at"] == "1" and found["crisp"] == "pixelated"
        assert found["shown"] % IMAGE_SIZE == 0 and found["shown"] >= 300
        assert found["unnamed"] == 0
        brightness = sum(map(int, re.findall(r"\d+", found["paper"])[:3])) / 3
        assert brightness > 200 if theme == "light" else brightness < 60
