"""Every kind of bad input, at every command that takes it, is one line that names flag or file.

Before any work: no sample is made, no step taken, and the output folder holds nothing of use.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError, run_main
from esddpm_io.images import save_png
from evaluations import evaluator
from guided_diffusion import logger
from guided_diffusion.checkpoints import write_sidecar
from guided_diffusion.commands import (
    classifier_sample,
    classifier_train,
    download,
    driver,
    gather,
    image_nll,
    image_sample,
    image_train,
    report,
    sample,
    super_res_sample,
    super_res_train,
    sweep,
    vae_sample,
    vae_train,
)
from guided_diffusion.script_util import sr_create_model, sr_model_and_diffusion_defaults
from tests.tiny_sampling import CLASSIFIER, FEATURE_GRAPH, MODEL, TinyFiles

SUPER_RES = {
    "large_size": 64,
    "small_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "8",
}


def words(**flags: object) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Good files, and bad ones of all kinds under names that say what is wrong."""
    root = tmp_path_factory.mktemp("bad")
    tiny = TinyFiles(root)
    tiny.preset()
    _bad_checkpoints(root, tiny)
    _bad_images(root, tiny)
    flags = {**sr_model_and_diffusion_defaults(), **SUPER_RES}
    known = sr_create_model.__code__.co_varnames
    network = sr_create_model(**{name: flags[name] for name in flags if name in known})
    torch.save(network.state_dict(), root / "upsampler.pt")
    (root / "cut.pb").write_bytes(FEATURE_GRAPH.read_bytes()[:5000])
    (root / "text.toml").write_text("checkpoint = ")
    (root / "unknown_key.toml").write_text('chekpoint = "a.pt"')
    (root / "unknown_flag.toml").write_text('checkpoint = "a.pt"\nmodel_flags = {imagesize = 3}')
    (root / "no_url.toml").write_text('checkpoint = "a.pt"\n[[download]]\npath = "x"')
    _bad_folders(root)
    return root


def _bad_checkpoints(root: Path, tiny: TinyFiles) -> None:
    whole = tiny.model.read_bytes()
    for name, content in {"empty": b"", "text": b"<html>", "cut": whole[: len(whole) // 2]}.items():
        (root / f"{name}.pt").write_bytes(content)
    torch.save([1, 2], root / "list.pt")
    torch.save({"a": torch.zeros(2)}, root / "other.pt")
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    torch.save(optimiser.state_dict(), root / "optimiser.pt")
    (root / "code.pt").write_bytes(pickle.dumps(os.getcwd))
    (root / "folder.pt").mkdir()
    for name, sidecar in {"no_json": "{", "no_kind": '{"kind": "unet", "flags": {}}'}.items():
        shutil.copy(tiny.model, root / f"{name}.pt")
        (root / f"{name}.json").write_text(sidecar)
    shutil.copy(tiny.model, root / "of_a_vae.pt")
    write_sidecar(str(root / "of_a_vae.pt"), {}, kind="vae")


def _bad_images(root: Path, tiny: TinyFiles) -> None:
    with np.load(tiny.images) as npz:
        pixels, labels = npz["arr_0"], npz["arr_1"]
    whole = tiny.images.read_bytes()
    (root / "empty.npz").write_bytes(b"")
    (root / "text.npz").write_text("no archive")
    (root / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(root / "no_arr_0.npz", images=pixels)
    np.savez(root / "float.npz", pixels / 255, labels)
    np.savez(root / "flat.npz", pixels.reshape(len(pixels), -1), labels)
    np.savez(root / "grey.npz", pixels[..., :1], labels)
    np.savez(root / "none.npz", pixels[:0], labels[:0])
    np.savez(root / "large.npz", pixels.repeat(2, 1).repeat(2, 2), labels)
    np.savez(root / "bare.npz", pixels)
    np.savez(root / "high_label.npz", pixels, np.full(len(pixels), 1000))
    np.savez(root / "low_label.npz", pixels, np.full(len(pixels), -1))
    np.savez(root / "few_labels.npz", pixels, labels[:3])
    (root / "text.xyz").write_text("neither archive nor folder")
    (root / "no_images").mkdir()
    (root / "no_images" / "readme.txt").touch()
    (root / "unreadable").mkdir()
    save_png(root / "unreadable" / "0_label_1.png", pixels[0])
    (root / "unreadable" / "1_label_1.png").write_bytes(b"no picture")
    (root / "first_unreadable").mkdir()
    (root / "first_unreadable" / "0_label_1.png").write_bytes(b"no picture")
    np.savez(root / "nan_mu.npz", pixels, mu=np.full(128, np.nan), sigma=np.eye(128))
    np.savez(root / "wide_mu.npz", pixels, mu=np.zeros(2048), sigma=np.eye(2048))


def _bad_folders(root: Path) -> None:
    for name, settings in {
        "damaged": "{",
        "of_another_version": json.dumps({"settings": {"num_samples": 3}}),
    }.items():
        (root / name).mkdir()
        (root / name / "settings.json").write_text(settings)
    for name in ("two_of_rank_0", "another_size"):
        (root / name).mkdir()
    for count in (1, 2):
        shape = (count, 8, 8, 3)
        np.savez(
            root / "two_of_rank_0" / f"samples_{count}x8x8x3_rank_0.npz", np.zeros(shape, "u1")
        )
    for rank, size in enumerate((8, 16)):
        path = root / "another_size" / f"samples_1x{size}x{size}x3_rank_{rank}.npz"
        np.savez(path, np.zeros((1, size, size, 3), np.uint8))
    _bad_runs(root)


def _bad_runs(root: Path) -> None:
    """Folders that no page can be made of."""
    point = dict.fromkeys(("t_prime", "seed", "network_evaluations"), 0)
    result = {"metrics": {"fid": 1.0}, "labels": {"fid": "FID"}, "images": 1}
    good = {"point": point, "evaluation": {"results": [result], "reference": "r"}}
    for name, record in {
        "no_samples": good,
        "bad_samples": good,
        "no_scores": {**good, "evaluation": {}},
        "text_scores": {**good, "evaluation": {"results": [{**result, "metrics": {"fid": "x"}}]}},
        "no_settings": {**good, "point": {}},
        "listed": [good],
    }.items():
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / "metrics.json").write_text(json.dumps(record))
    (root / "runs" / "no_json").mkdir()
    (root / "runs" / "no_json" / "metrics.json").write_text("{")
    (root / "runs" / "bad_samples" / "samples_all.npz").write_text("no archive")


# --- the commands, with all that is good ---


def _driver(**changes: object) -> tuple[Callable, list[str]]:
    good = {"dataset": "tiny.toml", "chain_length": 5, "reverse_steps": 2, "devices": "cpu"}
    return driver.main, ["--execute", *words(**{**good, "output_dir": "out", **changes})]


def _worker(**changes: object) -> tuple[Callable, list[str]]:
    good = {**MODEL, "model_path": "model.pt", "dataset_path": "images.npz", "save_dir": "out"}
    chain = {"timestep_respacing": 5, "denoise_steps": 2, "device": "cpu"}
    return _unguided, words(**{**good, **chain, **changes})


def _unguided(argv: list[str]) -> None:
    sample.main(argv, guided=False)


def _guided(**changes: object) -> tuple[Callable, list[str]]:
    good = {**CLASSIFIER, "classifier_path": "classifier.pt"}
    return (lambda argv: sample.main(argv, guided=True)), _worker(**{**good, **changes})[1]


def _image_sample(**changes: object) -> tuple[Callable, list[str]]:
    good = {**MODEL, "model_path": "model.pt", "num_samples": 2, "timestep_respacing": 2}
    return image_sample.main, words(**{**good, **changes})


def _classifier_sample(**changes: object) -> tuple[Callable, list[str]]:
    good = {**CLASSIFIER, "classifier_path": "classifier.pt"}
    return classifier_sample.main, _image_sample(**{**good, **changes})[1]


def _super_res(**changes: object) -> tuple[Callable, list[str]]:
    good = {**SUPER_RES, "model_path": "upsampler.pt", "base_samples": "large.npz"}
    chain = {"num_samples": 2, "timestep_respacing": 2}
    return super_res_sample.main, words(**{**good, **chain, **changes})


def _nll(**changes: object) -> tuple[Callable, list[str]]:
    good = {**MODEL, "model_path": "model.pt", "data_dir": "images.npz", "num_samples": 2}
    return image_nll.main, words(**{**good, **changes})


def _evaluator(reference: str = "images.npz", samples: str = "images.npz", **changes: object):
    more = {"inception_path": FEATURE_GRAPH, "backend": "torch", **changes}
    return evaluator.main, [reference, samples, *words(**more)]


def _gather(**changes: object) -> tuple[Callable, list[str]]:
    good = {"dir": "another_size", "num_file": 2, "wait_time": 0, "dataset": "tiny.toml"}
    return gather.main, words(**{**good, **changes})


def _sweep(**changes: object) -> tuple[Callable, list[str]]:
    good = {"dataset": "tiny.toml", "t_prime": "0,200", "steps": 2, "devices": "cpu"}
    return sweep.main, words(**{**good, "output_dir": "out", **changes})


def _trainer(script, **flags: object) -> Callable:
    def command(**changes: object) -> tuple[Callable, list[str]]:
        good = {"data_dir": "images.npz", "num_workers": 0, "batch_size": 2, "save_interval": 1}
        return script.main, words(**{**good, **flags, **changes})

    return command


_image_train = _trainer(image_train, **MODEL, iterations=1)
_classifier_train = _trainer(classifier_train, **CLASSIFIER, image_size=8, iterations=1)
_super_res_train = _trainer(super_res_train, **SUPER_RES, iterations=1)
_vae_train = _trainer(vae_train, image_size=8, iterations=1)


def _vae_sample(**changes: object) -> tuple[Callable, list[str]]:
    return vae_sample.main, words(model_path="model.pt", **changes)


def _report(**changes: object) -> tuple[Callable, list[str]]:
    good = {"dirs": "runs/no_samples", "output_dir": "page", **changes}
    return report.main, [str(good.pop("dirs")), *words(**good)]


def _download(dataset: str, **changes: object) -> tuple[Callable, list[str]]:
    return download.main, [dataset, *words(**changes)]


# --- what can be wrong with them ---

CHECKPOINTS = ("missing", "empty", "text", "cut", "list", "other", "optimiser", "code", "folder")
SIDECARS = ("no_json", "no_kind", "of_a_vae")
IMAGES = (
    *("missing.npz", "empty.npz", "text.npz", "cut.npz", "no_arr_0.npz", "float.npz"),
    *("flat.npz", "grey.npz", "none.npz", "text.xyz", "no_images", "first_unreadable"),
)
LABELS = ("bare.npz", "high_label.npz", "low_label.npz", "few_labels.npz")


def _cases() -> Iterator[tuple[str, Callable, dict[str, object], str]]:
    """Command by name, the command, what is bad, and what the line must name."""
    networks = {
        "driver": _driver,
        "worker": _worker,
        "guided worker": _guided,
        "image_sample": _image_sample,
        "classifier_sample": _classifier_sample,
        "super_res_sample": _super_res,
        "image_nll": _nll,
    }
    for name, command in networks.items():
        for kind in CHECKPOINTS:
            yield name, command, {"model_path": f"{kind}.pt"}, f"{kind}.pt"
    for name in ("driver", "image_sample", "image_nll"):
        for kind in SIDECARS:
            yield name, networks[name], {"model_path": f"{kind}.pt"}, kind
    for name in ("driver", "guided worker"):
        for kind in ("missing", "empty", "cut", "other"):
            yield name, networks[name], {"classifier_path": f"{kind}.pt"}, f"{kind}.pt"
    for name in ("driver", "worker"):
        for kind in (*IMAGES, *LABELS, "large.npz"):
            yield name, networks[name], {"dataset_path": kind}, "--dataset_path"
    for kind in (*IMAGES, "images.npz"):
        yield "super_res_sample", _super_res, {"base_samples": kind}, "--base_samples"
    for kind in (*IMAGES, "unreadable", "nan_mu.npz", "wide_mu.npz"):
        yield "evaluator", _evaluator, {"reference": kind}, kind
    for kind in (*IMAGES, "unreadable"):
        yield "evaluator", _evaluator, {"samples": kind}, kind
        if kind not in ("unreadable",):
            yield "driver", _driver, {"ref_batch": kind}, "--ref_batch"
            yield "gather", _gather, {"ref_batch": kind}, "--ref_batch"
    trainers = {
        "image_train": _image_train,
        "classifier_train": _classifier_train,
        "super_res_train": _super_res_train,
        "vae_train": _vae_train,
    }
    for name, command in trainers.items():
        for kind in (
            "missing.npz",
            "empty.npz",
            "cut.npz",
            "no_arr_0.npz",
            "float.npz",
            "none.npz",
        ):
            yield name, command, {"data_dir": kind}, kind
        for changes in ({"batch_size": 0}, {"seed": -1}, {"lr": -1}, {"iterations": -1}):
            yield name, command, changes, f"--{next(iter(changes))}"
    yield from _other_cases()


def _other_cases() -> Iterator[tuple[str, Callable, dict[str, object], str]]:
    for changes in (
        {"reverse_steps": 0},
        {"reverse_steps": 6},
        {"chain_length": "ddim600"},
        {"chain_length": "some"},
        {"chain_length": 2000},
        {"dataset": "mnist"},
        {"devices": "99"},
        {"devices": ""},
        {"num_machines": 0},
        {"machine_idx": 1},
        {"batch_size": 0},
        {"seed": 2**64},
        {"limit": -1},
        {"output_dir": "text.npz"},
        {"output_dir": "/proc/none"},
        {"eval_device": "cuda:99"},
        {"model_path": "s3://b/x.pt"},
        {"classifier_guidance_scale": "nan"},
        *({flag: ""} for flag in ("model_path", "dataset_path", "generator", "output_dir")),
        *({flag: ""} for flag in ("again", "ref_batch", "inception_path", "eval_cache_dir")),
    ):
        name, value = next(iter(changes.items()))
        yield "driver", _driver, changes, f"--{name}" if "s3:" not in str(value) else "s3://b/x.pt"
    for kind in ("missing.pb", "cut.pb", "text.npz"):
        yield "driver", _driver, {"inception_path": kind}, "--inception_path"
        yield "evaluator", _evaluator, {"inception_path": kind}, "--inception_path"
    for kind in ("missing.toml", "text.toml", "unknown_key.toml", "unknown_flag.toml"):
        yield "driver", _driver, {"dataset": kind}, kind
        yield "gather", _gather, {"dataset": kind}, kind
    for changes in ({"timestep_respacing": 2000}, {"denoise_steps": 6}, {"denoise_steps": 0}):
        yield "worker", _worker, changes, f"--{next(iter(changes))}"
    for changes in ({"noise_schedule": "x"}, {"world_size": 0}, {"device": "tpu"}, {"eta": 2}):
        yield "worker", _worker, changes, f"--{next(iter(changes))}"
    for changes in ({"settings": "missing.json"}, {"global_rank": 3, "world_size": 2}):
        yield "worker", _worker, changes, f"--{next(iter(changes))}"
    for kind in ("missing", "text.npz", "damaged", "of_another_version", "two_of_rank_0"):
        yield "gather", _gather, {"dir": kind}, kind
    for name, command in {
        "driver": _driver,
        "worker": _worker,
        "image_sample": _image_sample,
    }.items():
        yield name, command, {"precision": "fp16"}, "--precision"
        contradiction = {"precision": "bfloat16", "use_fp16": True}
        yield name, command, contradiction, "--precision bfloat16 contradicts --use_fp16 True"
    yield "gather", _gather, {"dir": "another_size"}, "another_size"
    yield "gather", _gather, {"ref_batch": ""}, "--ref_batch"
    for kind in ("model_path", "classifier_path", "ref_batch"):
        yield "sweep", _sweep, {kind: ""}, f"--{kind}"
    for name, command in {"worker": _guided, "classifier_sample": _classifier_sample}.items():
        yield name, command, {"classifier_scale": "inf"}, "--classifier_scale"
    for changes in ({"num_file": 0}, {"num_file": 3}, {"wait_time": -1}):
        yield "gather", _gather, changes, f"--{next(iter(changes))}"
    changed = {"metrics": "fad"}, {"batch_size": 0}, {"device": "cuda:99"}, {"expect": 0}
    for changes in (*changed, {"expect": 9, "devices": "cpu,cpu"}):
        yield "evaluator", _evaluator, changes, f"--{next(iter(changes))}"
    yield from _sweep_cases()
    yield "vae_sample", _vae_sample, {}, "model.pt"
    yield "vae_sample", _vae_sample, {"num_samples": 0}, "--num_samples"
    yield "vae_sample", _vae_sample, {"out": "/proc/x.npz"}, "--out"
    yield "download", _download, {"dataset": "mnist"}, "DATASET"
    yield "download", _download, {"dataset": "no_url.toml"}, "no_url.toml"
    yield "download", _download, {"dataset": "lsun_cat", "base_url": "ftp://x"}, "--base_url"
    yield from _report_cases()


def _report_cases() -> Iterator[tuple[str, Callable, dict[str, object], str]]:
    for kind in ("missing", "no_images"):
        yield "report", _report, {"dirs": kind}, f"{kind} has no metrics.json"
    yield "report", _report, {"dirs": "text.npz"}, "text.npz"
    for kind in ("no_json", "no_scores", "text_scores", "no_settings", "listed"):
        yield "report", _report, {"dirs": f"runs/{kind}"}, f"{kind}/metrics.json is damaged"
    yield "report", _report, {}, "no_samples has no samples_all.npz"
    yield "report", _report, {"dirs": "runs/bad_samples"}, "bad_samples/samples_all.npz"
    yield "report", _report, {"output_dir": "text.npz"}, "--output_dir"
    yield "report", _report, {"nearest": -1}, "--nearest"


def _sweep_cases() -> Iterator[tuple[str, Callable, dict[str, object], str]]:
    for changes in (
        *({"t_prime": text} for text in ("2000", "0,many", "-1", "200,,300", "scratch,1.5", "1")),
        *({"steps": text} for text in ("0", "2,300", "two")),
        *({"sampler": text} for text in ("euler", "ddim,dpm")),
        *({"eta": text} for text in ("0,2", "nan", "all")),
        *({"classifier_guidance_scale": text} for text in ("0,x", "inf")),
        *({"seed": text} for text in ("0,-1", str(2**64))),
        {"spacing": "log"},
        {"eval_bootstrap": 1},
        {"eval_device": "cuda:99"},
        {"limit": -1},
        {"limit": -1, "t_prime": 0},
        {"batch_size": 0},
        {"devices": "99"},
        {"num_machines": 0},
        {"machine_idx": 1},
        {"dataset": "mnist"},
        {"dataset_path": "missing.npz"},
        {"dataset_path": "images.npz,cut.npz"},
        {"dataset_path": "unreadable", "t_prime": 0},
        {"dataset_path": "large.npz"},
        {"ref_batch": "cut.npz"},
        {"inception_path": "cut.pb"},
        {"classifier_path": "other.pt"},
        {"output_dir": "text.npz"},
    ):
        # Of T' = 1 there is one timestep, and two are asked for.
        name = "steps" if changes == {"t_prime": "1"} else next(iter(changes))
        yield "sweep", _sweep, changes, f"--{name}"
    for kind in ("missing", "cut", "no_json"):
        yield "sweep", _sweep, {"model_path": f"model.pt,{kind}.pt"}, kind


CASES = list(_cases())
IDS = [f"{name}: {' '.join(map(str, changes.values()))}" for name, _, changes, _ in CASES]


def test_there_are_enough_of_them():
    assert len(CASES) >= 150
    assert len({name for name, *_ in CASES}) == 17


@pytest.fixture
def command_line(root, tmp_path, monkeypatch):
    """Commands are typed in a folder with links to all files; the log is in it too."""
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    yield
    logger.reset()


@pytest.mark.parametrize(("name", "command", "changes", "names"), CASES, ids=IDS)
def test_bad_input_is_one_line(command_line, capsys, name, command, changes, names):
    run, argv = command(**changes)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run(argv))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    [line] = [line for line in error.splitlines() if "error: " in line]
    assert error.rstrip().endswith(line), "something was said after it"
    assert names in line
    for made in ("out/chunks", "out/samples_all.npz", "out/metrics.json", "another_size/grid.png"):
        assert not Path(made).exists()
    for made in ("out/*/chunks", "out/*/samples_all.npz", "out/*/metrics.json", "out/sweep.*"):
        assert not list(Path().glob(made))
    assert not list(Path().glob("log/model*.pt")) and not list(Path().glob("log/samples*"))


@pytest.mark.parametrize(
    ("command", "changes", "meant"),
    [
        (_driver, {"dataset": "emoji_32"}, "emoji32"),
        (_driver, {"devices": "cpu,cpuu"}, "cpu"),
        (_driver, {"sampler": "dpmp_2m"}, "dpmpp_2m"),
        (_sweep, {"sampler": "ddpm,dimm"}, "ddim"),
        (_sweep, {"t_prime": "scrach"}, "scratch"),
        (_worker, {"device": "CPU"}, "cpu"),
        (_gather, {"dataset": "LSUN_cat"}, "lsun_cat"),
        (_image_train, {"schedule_sampler": "loss_second_moment"}, "loss-second-moment"),
        (_evaluator, {"metrics": "recal"}, "recall"),
        (_evaluator, {"backend": "troch"}, "torch"),
        (_download, {"dataset": "imagenet_64"}, "imagenet64"),
    ],
)
def test_a_misspelt_name_is_told_what_is_meant(command_line, capsys, command, changes, meant):
    run, argv = command(**changes)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run(argv))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1].removesuffix(" (--help explains all flags)")
    assert line.endswith(f"; did you mean {meant}?")


def test_no_name_is_meant_by_what_is_like_none(command_line):
    run, argv = _driver(dataset="xyz")
    with pytest.raises(UserError) as error:
        run(argv)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "command", [_driver, _worker, _guided, _image_sample, _super_res, _image_train, _vae_train]
)
def test_compile_without_a_compiler_is_one_line(command_line, capsys, monkeypatch, command):
    monkeypatch.setenv("CXX", "none++")
    run, argv = command()
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run([*argv, "--compile"]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.rstrip().split("\n")[-1].startswith("error: --compile: there is no C++ compiler")
    assert not Path("out/chunks").exists() and not list(Path().glob("log/model*.pt"))
