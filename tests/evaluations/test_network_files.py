"""Networks of .pt and .pt2 files in place of a frozen graph, and resizing before the network."""

import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esddpm_io.errors import UserError
from evaluations import evaluate, evaluator, export_features, make_reference
from evaluations.backend_network import export_network
from evaluations.backend_torch import TorchEngine
from evaluations.evaluation import check_inputs, nearest_in_reference
from evaluations.features import choose_engine, load_graph, pool_features
from evaluations.metrics import frechet_distance, gaussian_of, kernel_distance
from evaluations.network_file import Description
from evaluations.resizing import resized
from guided_diffusion.commands import scoring
from tests.evaluations.graph_writer import GOLDEN, small_graph

ABOUT = Description(
    name="tiny_net",
    features=12,
    size=(20, 24),
    resize="bicubic",
    range=(0.0, 1.0),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
)
WITH_KERNEL = ("fid", "kid", "precision", "recall")


def tiny_network(seed: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    convolution = torch.nn.Conv2d(3, 12, 5, stride=3)
    return torch.nn.Sequential(
        convolution,
        torch.nn.BatchNorm2d(12),  # which must be in evaluation mode
        torch.nn.GELU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for suffix in ("pt", "pt2"):
        export_network(tiny_network(), folder / f"tiny.{suffix}", ABOUT)
    (folder / "small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        np.savez(folder / "ref.npz", arr_0=file["reference"][:60])
        np.savez(folder / "samples.npz", arr_0=file["samples"][:50])
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def images_of(path: str) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"]


def independent_features(images: np.ndarray) -> np.ndarray:
    """Of the module itself, prepared step by step as the TOML's words say."""
    pixels = np.stack(
        [
            [
                Image.fromarray(channel.astype(np.float32)).resize((24, 20), Image.BICUBIC)
                for channel in np.moveaxis(image, -1, 0)
            ]
            for image in images
        ]
    ).clip(0, 255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (ABOUT.mean, ABOUT.std))
    with torch.no_grad():
        return tiny_network().eval()((torch.from_numpy(pixels) / 255 - mean) / std).numpy()


@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_figures_are_those_of_the_module_under_its_own_name(suffix, capsys):
    evaluator.main(
        ["ref.npz", "samples.npz", "--inception_path", f"tiny.{suffix}", "--json", "out.json"]
    )
    out = capsys.readouterr().out
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        "FD (tiny_net)",
        "Precision (tiny_net)",
        "Recall (tiny_net)",
    ]
    features = [independent_features(images_of(f"{name}.npz")) for name in ("ref", "samples")]
    saved = json.loads(Path("out.json").read_text())
    assert (saved["features"], saved["graph"]) == ("tiny_net", "other")
    expected = frechet_distance(*map(gaussian_of, features))
    assert saved["results"][0]["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)

    result = evaluate(
        "ref.npz", images_of("samples.npz"), inception_path=f"tiny.{suffix}", metrics=WITH_KERNEL
    ).results[0]
    assert result["kid"] == pytest.approx(kernel_distance(*features).value, rel=1e-3)
    assert result["fid"] == pytest.approx(expected, rel=1e-4)


def test_a_name_that_is_given_beside_the_network_s_own_is_told_to_be_left_aside(capsys):
    argv = ["ref.npz", "samples.npz", "--metrics", "fid", "--inception_path", "tiny.pt2"]
    evaluator.main([*argv, "--metric_name", "FD (mine)"])
    out, err = capsys.readouterr()
    assert out.startswith("FD (tiny_net): ") and "warning: --metric_name is left aside" in err
    evaluator.main(argv)
    assert "--metric_name" not in capsys.readouterr().err


def test_what_the_network_does_not_have_is_refused_by_name(capsys):
    for metric, lacking in [("sfid", "spatial features"), ("inception_score", "classifier")]:
        with pytest.raises(UserError, match=rf"^--metrics {metric}: tiny.pt2 has no {lacking}: ch"):
            evaluator.main(
                ["ref.npz", "samples.npz", "--inception_path", "tiny.pt2", "--metrics", metric]
            )
    more = ("published", "rbf_mmd", "fid")
    result = evaluate("ref.npz", "samples.npz", inception_path="tiny.pt2", metrics=more).results[0]
    assert list(result.metrics) == ["fid", "precision", "recall", "rbf_mmd"]
    evaluator.main(
        ["ref.npz", "samples.npz", "--inception_path", "tiny.pt2", "--metrics", "all", "--table"]
    )
    out = capsys.readouterr().out
    assert (
        "KD (tiny_net)" in out and "FD infinity (tiny_net)" in out and "RBF MMD (tiny_net)" in out
    )
    assert "FID" not in out and "KID" not in out and "score" not in out and "Spatial" not in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tensorflow"}, "--backend tensorflow: tiny.pt2 is a network for PyTorch"),
        ({"precision": "bfloat16"}, "--precision bfloat16: tiny.pt2 .* float32"),
        ({"resize": "clean"}, "--resize clean: tiny.pt2 .* TOML says how"),
    ],
)
def test_settings_for_graphs_are_refused_before_there_are_samples(settings, message):
    with pytest.raises(UserError, match=message):
        check_inputs("ref.npz", 50, inception_path="tiny.pt2", **settings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny_net"\n', "", "it does not say name"),
        ("size = [20, 24]", "size = [20, 0]", r"size = \(20, 0\): \[height, width\] expected"),
        ("size = [20, 24]", "size = 20", r"size = 20: \[height, width\] expected"),
        ('"bicubic"', '"lanczos"', "resize = 'lanczos': bicubic or bilinear or none expected"),
        ("std = [0.2,", "std = [0,", "three positive numbers expected"),
        ("mean = [0.5,", "mean = [true,", "three numbers expected"),
        ("range = [0.0,", "range = [2.0,", "two rising numbers expected"),
        ("features = 12", "features = 12\ncolour = 1", "unknown colour: there are name, features"),
        ("features = 12", "features = ", "which describes the network: Invalid value"),
        ("features = 12", "features = 13", r"gives features \[2, 12\], its TOML says \[2, 13\]"),
        ('resize = "bicubic"', 'resize = "none"', "images of 32x32: tiny_net takes 24x20 and its"),
    ],
)
def test_a_description_that_cannot_be_is_refused(tmp_path, old, new, message):
    text = Path("tiny.toml").read_text()
    assert old in text
    (tmp_path / "net.toml").write_text(text.replace(old, new))
    (tmp_path / "net.pt2").write_bytes(Path("tiny.pt2").read_bytes())
    with pytest.raises(UserError, match=message):
        samples = images_of("samples.npz")
        evaluate(samples, samples, inception_path=str(tmp_path / "net.pt2"))


@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_files_that_are_missing_or_no_network_are_named(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    with pytest.raises(UserError, match=rf"^--inception_path: .*net\.{suffix}"):
        load_graph(str(path))
    path.write_bytes(b"not a network")
    with pytest.raises(UserError, match=r"^--inception_path: .*net\.toml"):
        load_graph(str(path))
    (tmp_path / "net.toml").write_text(ABOUT.as_toml())
    with pytest.raises(UserError, match=rf"net\.{suffix} cannot be loaded: .*[^\n]*$"):
        choose_engine(load_graph(str(path)))


def test_an_export_is_tried_before_it_is_there(tmp_path):
    with pytest.raises(UserError, match=r"gives features \[3, 12\], \[3, 5\] expected"):
        export_network(
            tiny_network(), tmp_path / "a.pt", Description(**{**vars(ABOUT), "features": 5})
        )

    class ByBatch(torch.nn.Module):
        """Tracing keeps what it was called with."""

        def forward(self, x):
            return x.mean(dim=(2, 3)).repeat(1, 4) * len(x)

    with pytest.raises(UserError, match="gives other features once it is exported"):
        export_network(ByBatch(), tmp_path / "b.pt", ABOUT)

    class Two(torch.nn.Module):
        """Of two images alone, as the export is made with."""

        def forward(self, x):
            return x.mean(dim=(2, 3)).repeat(1, 4) + torch.zeros(len(x), 12)

    for suffix in ("pt", "pt2"):
        with pytest.raises(UserError, match=rf"^tiny_net cannot be exported to \S+\.{suffix}: .+$"):
            export_network(Two(), tmp_path / f"c.{suffix}", ABOUT)
    assert not list(tmp_path.iterdir())
    assert Description.of(tomllib.loads(ABOUT.as_toml())) == ABOUT


def test_devices_and_cache_give_the_same_and_know_file_and_toml(tmp_path):
    options = {"inception_path": "tiny.pt2", "metrics": "fid", "batch_size": 16}
    one = evaluate("ref.npz", "samples.npz", **options)
    options["cache_dir"] = str(tmp_path / "cache")
    two = evaluate("ref.npz", "samples.npz", devices="cpu,cpu", **options)
    assert two.results[0]["fid"] == pytest.approx(one.results[0]["fid"], rel=1e-9)
    kept = set((tmp_path / "cache").iterdir())
    assert len(kept) == 2
    times = {path: path.stat().st_mtime_ns for path in kept}
    again = evaluate("ref.npz", "samples.npz", **options)
    assert again.results[0]["fid"] == two.results[0]["fid"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == times
    # The same network with other pixels is another one.
    (tmp_path / "net.pt2").write_bytes(Path("tiny.pt2").read_bytes())
    text = Path("tiny.toml").read_text().replace("range = [0.0, 1.0]", "range = [-1.0, 1.0]")
    (tmp_path / "net.toml").write_text(text)
    other = evaluate(
        "ref.npz", "samples.npz", **{**options, "inception_path": str(tmp_path / "net.pt2")}
    )
    assert other.results[0]["fid"] != pytest.approx(one.results[0]["fid"], rel=1e-3)
    assert len(set((tmp_path / "cache").iterdir())) == 4
    # So is another network under the same TOML.
    export_network(tiny_network(seed=4), tmp_path / "net.pt2", ABOUT)
    assert (tmp_path / "net.toml").read_text() == Path("tiny.toml").read_text()
    another = evaluate(
        "ref.npz", "samples.npz", **{**options, "inception_path": str(tmp_path / "net.pt2")}
    )
    assert another.results[0]["fid"] != pytest.approx(one.results[0]["fid"], rel=1e-3)
    assert len(set((tmp_path / "cache").iterdir())) == 6


def test_statistics_of_another_network_are_left_aside(capsys):
    """A published reference batch has images too; a reference made with the network has its own."""
    with np.load("ref.npz") as file:
        np.savez("published.npz", **file, mu=np.zeros(2048), sigma=np.eye(2048))
    options = {"inception_path": "tiny.pt2", "metrics": "fid"}
    expected = evaluate("ref.npz", "samples.npz", **options).results[0]
    got = evaluate("published.npz", "samples.npz", **options).results[0]
    assert got["fid"] == expected["fid"]
    assert got.warnings[0].startswith(
        "published.npz: its statistics (mu, sigma) were not made with"
    )
    rows, _ = nearest_in_reference("published.npz", "samples.npz", 2, inception_path="tiny.pt2")
    assert rows.shape == (50, 2)

    make_reference.main(["ref.npz", "own.npz", "--keep", "20", "--inception_path", "tiny.pt2"])
    own = evaluate("own.npz", "samples.npz", **options).results[0]
    assert own["fid"] == pytest.approx(expected["fid"], rel=1e-9)  # of all 60, not of the 20 kept
    assert not own.warnings
    capsys.readouterr()
    evaluator.main(["own.npz", "samples.npz", "--inception_path", "tiny.pt2", "--metrics", "fid"])
    assert "features of own.npz" not in capsys.readouterr().err  # its statistics do
    by_graph = {"inception_path": "small.pb", "metrics": "fid", "backend": "torch"}
    assert (
        "were not made with"
        in evaluate("own.npz", "samples.npz", **by_graph).results[0].warnings[0]
    )


def test_statistics_of_another_graph_are_left_aside_on_either_side(tmp_path):
    """Both graphs give 24 features: the width does not tell them apart."""
    small, other = str(tmp_path / "small.pb"), str(tmp_path / "other.pb")
    Path(small).write_bytes(small_graph())
    Path(other).write_bytes(small_graph(size=20))
    made = {}
    for name in ("ref", "samples"):
        made[name] = str(tmp_path / f"{name}.npz")
        options = {"inception_path": other, "backend": "torch"}
        make_reference.make_reference(f"{name}.npz", made[name], **options)
    options = {"inception_path": small, "backend": "torch", "metrics": ("fid", "sfid")}
    expected = evaluate("ref.npz", "samples.npz", **options).results[0]
    aside = [f"{path}: its statistics (mu, sigma) were not made with" for path in made.values()]
    for reference, samples, words in [
        (made["ref"], "samples.npz", aside[:1]),
        (made["ref"], made["samples"], aside),
    ]:
        result = evaluate(reference, samples, **options).results[0]
        assert result.metrics == expected.metrics
        told = [note for note in result.warnings if "its statistics" in note]
        assert len(told) == len(words) and all(map(str.startswith, told, words))
    with pytest.raises(UserError, match="are the two swapped"):
        evaluate("ref.npz", made["samples"], **options)
    # Statistics of the graph itself stand, under whatever name that lies.
    options["inception_path"] = str(Path(small).rename(tmp_path / "renamed.pb"))
    make_reference.make_reference("ref.npz", made["ref"], inception_path=options["inception_path"])
    own = evaluate(made["ref"], "samples.npz", **options).results[0]
    assert not [note for note in own.warnings if "its statistics" in note]


def test_statistics_that_do_not_say_their_network_stand_with_a_remark(monkeypatch):
    """As those of published reference batches, which are the published graph's: no remark then."""
    with np.load("ref.npz") as file:
        np.savez("silent.npz", **file, mu=np.zeros(24), sigma=np.eye(24))
    options = {"inception_path": "small.pb", "backend": "torch", "metrics": "fid"}
    other = evaluate("silent.npz", "samples.npz", **options).results[0]
    assert other["fid"] != pytest.approx(
        evaluate("ref.npz", "samples.npz", **options).results[0]["fid"]
    )
    (note,) = other.warnings
    assert note.startswith("silent.npz: its statistics (mu, sigma) do not say which network")
    assert check_inputs("silent.npz", inception_path="small.pb") == (note,)  # before there are any
    monkeypatch.setattr("evaluations.evaluation.graph_identity", lambda graph: "published")
    published = evaluate("silent.npz", "samples.npz", **options).results[0]
    assert published.warnings == () and published["fid"] == other["fid"]


def test_clean_resize_is_antialiased_bicubic_without_rounding():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    got = resized(images, (16, 20))
    expected = [
        np.stack(
            [
                np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((20, 16), 3))
                for c in range(3)
            ],
            axis=-1,
        )
        for image in images
    ]
    np.testing.assert_array_equal(got, np.clip(expected, 0, 255))
    # Antialiased: an image of single bright pixels keeps its mean, which four pixels cannot see.
    dots = np.zeros((1, 64, 64, 3), np.uint8)
    dots[:, 1::4, 1::4] = 160
    assert resized(dots, (16, 16)).mean() == pytest.approx(10, abs=0.5)
    np.testing.assert_array_equal(resized(images, (40, 50)), images)


def test_clean_resize_feeds_the_graph_at_its_own_size(capsys, tmp_path):
    graph = load_graph("small.pb")
    assert graph.input_size == (16, 16)
    samples = images_of("samples.npz")
    engine = choose_engine(graph, "torch", resize="clean")
    expected = pool_features(TorchEngine(graph), resized(samples, (16, 16)))
    np.testing.assert_array_equal(pool_features(engine, samples), expected)

    argv = ["ref.npz", "samples.npz", "--inception_path", "small.pb", "--backend", "torch"]
    argv += ["--cache_dir", str(tmp_path), "--metrics", "fid"]
    values = {}
    for resize in ("clean", "published"):
        evaluator.main([*argv, "--resize", resize])
        (values[resize],) = capsys.readouterr().out.splitlines()
    assert values["clean"].startswith("Frechet distance (small, clean resize): ")
    assert values["published"].startswith("Frechet distance (small): ")
    reference = pool_features(engine, images_of("ref.npz"))
    distance = frechet_distance(gaussian_of(reference), gaussian_of(expected))
    assert float(values["clean"].split(": ")[1]) == pytest.approx(distance, rel=1e-5)
    assert values["published"].split(": ")[1] != values["clean"].split(": ")[1]
    assert len(list(tmp_path.iterdir())) == 4  # two sets, each resized in two ways


def test_engines_agree_on_clean_images():
    pytest.importorskip("tensorflow")
    graph, samples = load_graph("small.pb"), images_of("samples.npz")[:8]
    ours, theirs = (
        pool_features(choose_engine(graph, backend, resize="clean"), samples)
        for backend in ("torch", "tensorflow")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.ptp(theirs))


def test_statistics_made_with_another_resize_are_refused():
    graph = {"inception_path": "small.pb", "backend": "torch"}
    for resize in ("clean", "published"):
        make_reference.make_reference("ref.npz", f"{resize}.npz", resize=resize, **graph)
    options = {"metrics": "fid", **graph}
    clean = evaluate("clean.npz", "samples.npz", resize="clean", **options).results[0]
    direct = evaluate("ref.npz", "samples.npz", resize="clean", **options).results[0]
    assert clean["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    for made, asked in [("clean", "published"), ("published", "clean")]:
        with pytest.raises(
            UserError, match=rf"^resize {asked}: .*{made}\.npz .* {made} resize: ma"
        ):
            evaluate(f"{made}.npz", "samples.npz", resize=asked, **options)


HUBCONF = """
import torch

def dinov2_vits14(pretrained=True):
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 384, 14, stride=14), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
"""


def test_dinov2_is_exported_with_its_description(tmp_path, capsys):
    """From a folder that stands for the clone of its repository: same entry, width and size."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    out = str(tmp_path / "out" / "dino.pt2")
    export_features.main(["dinov2", out, "--variant", "vits14", "--repo", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == f"dinov2_vits14: {out}"
    about = load_graph(out).description
    assert (about.features, about.size, about.resize) == (384, (224, 224), "bicubic")
    settings = {"inception_path": out, "metrics": "precision", "batch_size": 4}
    samples = images_of("samples.npz")[:6]
    assert evaluate(samples, samples, **settings).results[0]["precision"] == 1.0
    with pytest.raises(UserError, match=r"^--repo .*: no dinov2_vitb14 in it: "):
        export_features.main(["dinov2", out, "--variant", "vitb14", "--repo", str(tmp_path)])
    with pytest.raises(UserError, match="^--repo: there is no folder nowhere"):
        export_features.main(["dinov2", out, "--repo", "nowhere"])
    with pytest.raises(UserError, match=r"^OUT: net\.onnx must end in \.pt or \.pt2"):
        export_features.main(["dinov2", "net.onnx"])


class StandIn(torch.nn.Module):
    """A vision model as transformers has them: patches and a class token before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.patches = torch.nn.Conv2d(3, 384, 14, stride=14)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 384))
        self.mix = torch.nn.Linear(384, 384)

    def forward(self, pixel_values):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return types.SimpleNamespace(
            last_hidden_state=self.mix(tokens) + tokens.mean(1, keepdim=True)
        )


@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_the_class_token_of_a_model_of_transformers_is_exported(tmp_path, monkeypatch, suffix):
    """Where torch hub cannot be reached; the name says so."""

    def no_hub(*_):
        raise OSError("no network")

    transformers = types.ModuleType("transformers")
    loaded = []
    transformers.AutoModel = types.SimpleNamespace(
        from_pretrained=lambda name: loaded.append(name) or StandIn()
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(export_features, "_from_hub", no_hub)
    out = str(tmp_path / f"dino.{suffix}")
    export_features.main(["dinov2", out, "--variant", "vits14"])
    assert loaded == ["facebook/dinov2-small"]
    network = load_graph(out)
    assert network.description.name == "dinov2_vits14_hf"
    images = images_of("samples.npz")[:3]
    pixels = torch.from_numpy(network.description.prepared(images))
    with torch.no_grad():
        expected = StandIn().eval()(pixels).last_hidden_state[:, 0].numpy()
    got = pool_features(choose_engine(network), images)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_a_network_that_cannot_be_fetched_is_one_line(tmp_path):
    """Every way out leads to a port that nothing listens at."""
    closed = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "all")}
    closed |= {"TORCH_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).parents[2] / "scripts" / "export_features.py"
    result = subprocess.run(
        [sys.executable, str(script), "dinov2", str(tmp_path / "a.pt2")],
        env={**os.environ, **closed, "no_proxy": "", "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert "error: dinov2: torch hub cannot be used (" in last and "--repo takes a clone" in last
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("*.pt2"))


def test_the_driver_evaluates_with_such_a_file(capfd):
    evaluation = scoring.Evaluation("ref.npz", "tiny.pt2", None, {})
    evaluation.check(50)
    found = evaluation.score("samples.npz")
    assert found["features"] == "tiny_net"
    assert capfd.readouterr().out.startswith("FD (tiny_net): ")
    refused = scoring.Evaluation("ref.npz", "tiny.pt2", None, {"backend": "tensorflow"})
    with pytest.raises(UserError, match="^--eval_backend tensorflow: .*tiny.pt2 is a network"):
        refused.check(50)


def test_distances_of_other_networks_are_not_rounded(folder):
    """Features may be small: half precision would see no differences between them."""
    options = {"metrics": ("precision", "recall"), "inception_path": str(folder / "tiny.pt2")}
    sets = folder / "ref.npz", folder / "samples.npz"
    evaluation = evaluate(*sets, **options)
    assert evaluation.settings.neighbour_arithmetic == "float32"
    plain = evaluate(*sets, neighbour_arithmetic="float32", **options).results[0]
    assert evaluation.results[0].metrics == plain.metrics
    graph = {**options, "inception_path": str(folder / "small.pb"), "backend": "torch"}
    assert evaluate(*sets, **graph).settings.neighbour_arithmetic == "float16"
