import json
import shutil

import numpy as np
import pytest

from esddpm_io import images
from esddpm_io.errors import UserError
from guided_diffusion.checkpoints import write_sidecar
from guided_diffusion.commands.sample import build_parser
from guided_diffusion.sampling.job import Job, rank_from_environment
from guided_diffusion.script_util import classifier_defaults, model_and_diffusion_defaults
from guided_diffusion.settings.record import PRECISIONS, SAMPLERS, Run
from tests.tiny_sampling import CLASSIFIER, IMAGE_SIZE, MODEL, read_job


def test_switches_work_with_and_without_a_truth_value():
    parse = build_parser(guided=False).parse_args
    assert parse(["--save_png_files"]).save_png_files is True
    assert parse(["--save_png_files", "no"]).save_png_files is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"denoise_steps": 0},
            r"--denoise_steps must be in 1 … 5, the length of the chain \(--timestep_respacing 5\)",
        ),
        ({"denoise_steps": 6}, r"--denoise_steps must be in 1 … 5"),
        ({"timestep_respacing": "ddim600"}, r"^--timestep_respacing ddim600: .*ddim"),
        ({"timestep_respacing": "2000"}, r"--timestep_respacing"),
        ({"noise_schedule": "square"}, r"--noise_schedule"),
        ({"diffusion_steps": 10}, r"^--diffusion_steps is 10, it must be at least 21"),
        ({"batch_size": 0}, r"--batch_size is 0, it must be at least 1"),
        ({"limit": -1}, r"--limit must be at least 1, or 0"),
        ({"seed": -1}, r"--seed must be in 0 …"),
        ({"eta": 1.5}, r"--eta must be in 0 … 1, not 1\.5"),
        ({"save_dir": ""}, r"--save_dir: name the folder"),
        ({"model_path": "none.pt"}, r"--model_path: there is no file none\.pt"),
        ({"classifier_path": "none.pt"}, r"--classifier_path: there is no file none\.pt"),
        ({"dataset_path": "none.npz"}, r"--dataset_path: there is no file.* none\.npz"),
        ({"global_rank": 2, "world_size": 2}, r"--global_rank must be in 0 … 1, not 2"),
    ],
)
def test_bad_values_name_the_flag_and_the_valid_ones(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_job(tiny.guided_flags(**{"save_dir": tmp_path, **changes}), guided=True)


def test_guidance_scale_0_needs_no_classifier_and_gives_the_settings_of_the_plain_script(
    tiny, tmp_path
):
    flags = tiny.guided_flags(tmp_path, classifier_scale=0, classifier_path="")
    job = read_job(flags, guided=True)
    assert job.run.guidance is None
    assert job.run == read_job(tiny.worker_flags(tmp_path), guided=False).run


def test_precision_is_part_of_the_run_and_untyped_changes_nothing(tiny, tmp_path):
    """float16 and float32 are what the published flags say; the others have a name of their own."""

    def run(**typed: object) -> Run:
        return read_job(tiny.guided_flags(tmp_path, **typed), guided=True).run

    both = {"use_fp16": True, "classifier_use_fp16": True}
    assert "precision" not in run().dependences()
    assert run(precision="float32").identity == run().identity
    assert run(precision="float16").identity == run(**both).identity
    runs = [run(precision=precision) for precision in PRECISIONS]
    assert len({made.identity for made in runs}) == len(PRECISIONS)
    for precision, made in zip(PRECISIONS, runs, strict=True):
        assert made.network.precision == made.guidance.classifier.precision == precision
        assert made.origins["precision"] == "typed"
        assert Run.from_json(json.loads(json.dumps(made.to_json())), where="") == made
    # Not half by one flag and something else by the other, whichever network it is of.
    for name, value in (("use_fp16", False), ("classifier_use_fp16", False)):
        message = f"^--precision float16 contradicts --{name} False: give one$"
        with pytest.raises(UserError, match=message):
            run(precision="float16", **{name: value})
    with pytest.raises(UserError, match="^--precision bfloat16 contradicts --use_fp16 True"):
        run(precision="bfloat16", use_fp16=True)


def test_settings_follow_contents_and_not_places(tiny, tmp_path):
    first = read_job(tiny.worker_flags(tmp_path / "a"), guided=False)
    with np.load(tiny.images) as npz:
        np.savez(tmp_path / "copy.npz", npz["arr_0"], npz["arr_1"])
        np.savez(tmp_path / "other.npz", npz["arr_0"][::-1], npz["arr_1"])
    model = tmp_path / "elsewhere.pt"
    model.write_bytes(tiny.model.read_bytes())
    moved = {"dataset_path": tmp_path / "copy.npz", "model_path": model, "batch_size": 7}
    same = read_job(tiny.worker_flags(tmp_path / "b", **moved), guided=False)
    assert same.run.identity == first.run.identity
    assert same.run.differences(first.run) == []
    for change in (
        {"dataset_path": tmp_path / "other.npz"},
        {"noise_schedule": "cosine"},
        {"denoise_steps": 1},
        {"timestep_respacing": "ddim5"},
        {"seed": 1},
        {"use_ddim": True},
        {"clip_denoised": False},
    ):
        other = read_job(tiny.worker_flags(tmp_path, **change), guided=False)
        assert other.run.identity != first.run.identity, change
        assert len(other.run.differences(first.run)) >= 1


def test_contents_of_a_folder_are_read_once_for_all_processes(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.folder, tmp_path / "images")
    flags = tiny.worker_flags(tmp_path / "out", dataset_path=tmp_path / "images")
    first = read_job(flags, guided=False)
    monkeypatch.setattr(images, "fingerprint_file", None)  # nobody calls it
    assert read_job(flags, guided=False).run == first.run
    monkeypatch.undo()
    one, other = sorted((tmp_path / "images").iterdir())[:2]
    one.write_bytes(other.read_bytes())
    assert read_job(flags, guided=False).run != first.run


def test_blocks_are_contiguous_and_cover_everything(tiny, tmp_path):
    for world, blocks in {3: [(0, 4), (4, 8), (8, 10)], 7: [(0, 2), (2, 4)]}.items():
        for rank, block in enumerate(blocks):
            place = {"global_rank": rank, "world_size": world}
            job = read_job(tiny.worker_flags(tmp_path, **place), guided=False)
            assert job.block == block and not job.any_chunk


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, False)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, True)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, (1, 2, True)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "12",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "0",
            },
            (5, 8, True),
        ),
        # Tasks of an array that run the script itself, without srun.
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 4, True)),
    ],
)
def test_rank_and_size_come_from_the_launcher(environment, place):
    assert rank_from_environment(environment) == place


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"denoise_steps": 2}, "--denoise_steps"),
        ({"start_from_scratch": True}, "--start_from_scratch"),
    ],
)
def test_sampling_beyond_what_an_early_stopped_network_learned_is_refused(
    tiny, tmp_path, changes, flag
):
    """Ten steps of 1000 start at 0, 111, …: a network of t < 100 can be asked for one of them."""
    model = tmp_path / "model.pt"
    shutil.copy(tiny.model, model)
    flags = {**model_and_diffusion_defaults(), **MODEL}
    write_sidecar(str(model), flags, early_stop_steps=100)
    base = {"save_dir": tmp_path / "out", "model_path": model, "timestep_respacing": "10"}
    assert read_job(tiny.worker_flags(**base, denoise_steps=1), guided=False).run
    with pytest.raises(UserError, match=rf"{flag}: .*below 100 only; .* can be 1 … 1 here"):
        read_job(tiny.worker_flags(**base, **changes), guided=False)


def with_sidecar(tiny, folder, **sidecar) -> dict:
    """A copy of the classifier, with a sidecar, as flags of a worker."""
    path = folder / "classifier.pt"
    shutil.copy(tiny.classifier, path)
    flags = {
        **classifier_defaults(),
        **CLASSIFIER,
        "image_size": IMAGE_SIZE,
        "diffusion_steps": 1000,
    }
    changes = {key: sidecar.pop(key) for key in ("noise_schedule",) if key in sidecar}
    write_sidecar(str(path), {**flags, **changes}, kind="classifier", **sidecar)
    return {"save_dir": folder / "out", "classifier_path": path}


def test_guidance_beyond_what_an_early_stopped_classifier_learned_is_refused(tiny, tmp_path):
    chain = {"timestep_respacing": "10", "denoise_steps": 2}
    flags = {**with_sidecar(tiny, tmp_path, early_stop_steps=100), **chain}
    message = r"--denoise_steps: .* at original timestep 111, but .*classifier\.pt was .* below 100"
    with pytest.raises(UserError, match=message):
        read_job(tiny.guided_flags(**flags), guided=True)
    assert read_job(tiny.guided_flags(**{**flags, "denoise_steps": 1}), guided=True)
    assert read_job(tiny.guided_flags(**flags, classifier_scale=0), guided=True)


def test_a_classifier_of_other_noise_is_refused(tiny, tmp_path):
    flags = with_sidecar(tiny, tmp_path, noise_schedule="cosine")
    message = "trained with noise_schedule cosine, the diffusion model has noise_schedule linear"
    with pytest.raises(UserError, match=message):
        read_job(tiny.guided_flags(**flags), guided=True)
    assert read_job(tiny.guided_flags(**with_sidecar(tiny, tmp_path)), guided=True)


def test_flags_typed_in_vain_are_remarked(tiny, tmp_path):
    def remarks(**changes: object) -> list[str]:
        return read_job(tiny.worker_flags(tmp_path, **changes), guided=False).remarks[1:]

    assert remarks(num_samples=7, eta=0.5) == (
        "--num_samples has no effect without --start_from_scratch or --generator",
        "--eta has no effect without --use_ddim True, --sampler ddim or dpmpp_2m_sde",
    )
    assert remarks(start_from_scratch=True, num_samples=7, limit=3) == tuple(
        f"--{name} has no effect with --start_from_scratch"
        for name in ("denoise_steps", "dataset_path", "limit")
    )
    assert remarks(use_ddim=True, eta=0.5) == ()


def named_flags(tiny, tmp_path, **flags: object) -> list[str]:
    """A worker's flags with T' and evaluations by name in place of a chain."""
    argv = tiny.worker_flags(tmp_path)
    for flag in ("--timestep_respacing", "--denoise_steps"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    return argv + [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_evaluations_and_sampler_by_name(tiny, tmp_path):
    def sampler(**flags: object):
        return read_job(named_flags(tiny, tmp_path, **flags), guided=False).run.sampler

    found = sampler(t_prime=500, steps=5, sampler="dpmpp_2m_sde")
    assert found.timesteps == (499, 399, 299, 199, 99)
    assert (found.respacing, found.steps, found.eta) == (None, 5, 1.0)
    assert sampler(t_prime=500, steps=5, sampler="dpmpp_2m_sde", eta=0.5).eta == 0.5
    assert sampler(t_prime=500, steps=5, sampler="dpmpp_2m", eta=0.5).eta == 0.0
    assert sampler(t_prime=500, steps=5, sampler="ddim").eta == 0.0
    assert sampler(t_prime=100, steps=100).timesteps == tuple(reversed(range(100)))
    assert sampler(t_prime=100, steps=100).name == "ddpm"
    spaced = sampler(t_prime=500, steps=3, spacing="logsnr").timesteps
    assert spaced[0] == 499 and spaced[-1] == 0
    scratch = sampler(start_from_scratch=True, num_samples=4, steps=4, sampler="dpmpp_2m")
    assert scratch.steps is None and scratch.timesteps == (999, 749, 499, 249)


def test_only_solvers_that_start_from_t_prime_leave_out_clipping(tiny, tmp_path):
    def clips(**flags: object) -> bool:
        argv = named_flags(tiny, tmp_path, steps=4, **flags)
        return read_job(argv, guided=False).run.sampler.clip_denoised

    assert [clips(t_prime=500, sampler=name) for name in SAMPLERS] == [True, True, False, False]
    assert clips(t_prime=500, sampler="dpmpp_2m", clip_denoised=True)
    assert not clips(t_prime=500, sampler="ddim", clip_denoised=False)
    assert clips(start_from_scratch=True, num_samples=4, sampler="dpmpp_2m_sde")


def test_the_variance_is_in_the_record_where_it_is_chosen(tiny, tmp_path):
    def job(**flags: object) -> Job:
        return read_job(tiny.worker_flags(tmp_path, **flags), guided=False)

    learned, posterior = job().run, job(variance="posterior").run
    assert learned.identity != posterior.identity
    assert "variance" not in learned.dependences()
    assert posterior.dependences()["variance"] == "posterior"
    assert Run.from_json(json.loads(json.dumps(posterior.to_json())), where="") == posterior
    # Records of before the flag are those with the learned variance.
    content = json.loads(json.dumps(learned.to_json()))
    del content["sampler"]["variance"]
    assert Run.from_json(content, where="") == learned
    ddim = job(use_ddim=True, variance="posterior")
    assert ddim.run.identity == job(use_ddim=True).run.identity
    assert "--variance has no effect without DDPM (--sampler ddpm)" in ddim.remarks
    with pytest.raises(UserError, match="--variance posterior: the network learned no variance"):
        job(variance="posterior", model_path=tiny.variant(learn_sigma=False), learn_sigma=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"t_prime": 0, "steps": 1}, r"^--t_prime must be in 1 ... 1000, not 0"),
        ({"t_prime": 1001, "steps": 1}, r"^--t_prime must be in 1 ... 1000, not 1001"),
        ({"t_prime": 5, "steps": 6}, r"^--steps must be in 1 ... 5 for t_prime 5, not 6"),
        ({"t_prime": 5, "steps": 0}, r"^--steps must be in 1 ... 5"),
        ({"t_prime": 5}, r"^--steps: say how many times the network is evaluated"),
        ({"sampler": "ddim"}, r"^--steps: say how many"),
        ({"steps": 5}, r"^--t_prime: say the noise level to start from"),
        ({"steps": 5, "t_prime": 9, "start_from_scratch": True}, r"^--t_prime: leave it out with"),
        ({"steps": 5, "t_prime": 9, "denoise_steps": 2}, r"cannot be mixed with --denoise_steps: "),
        (
            {"steps": 5, "t_prime": 9, "use_ddim": True},
            r"cannot be mixed with --use_ddim: give eit",
        ),
    ],
)
def test_evaluations_by_name_that_cannot_be(tiny, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        read_job(named_flags(tiny, tmp_path, **flags), guided=False)


def test_flags_may_be_abbreviated_as_argparse_lets_them(tiny, tmp_path):
    argv = [word.replace("--denoise_steps", "--denoise") for word in tiny.worker_flags(tmp_path)]
    assert read_job(argv, guided=False).run.sampler.steps == 2


def test_a_record_says_all_of_the_run(tiny, tmp_path):
    """A worker that is told the record does what one with the flags does, and takes no other."""
    job = read_job(tiny.guided_flags(tmp_path), guided=True)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(job.run.to_json()))
    argv = ["--settings", str(path), "--batch_size", "4", "--device", "cpu"]
    again = read_job(argv, guided=True)
    assert again.run == job.run and again.save_dir == str(tmp_path) and len(again.source) == 10
    with pytest.raises(UserError, match="--settings says all of the run: leave out --seed"):
        read_job([*argv, "--seed", "1"], guided=True)
    with pytest.raises(UserError, match=r"--settings: there is no file .*none\.json"):
        read_job(["--settings", str(tmp_path / "none.json")], guided=True)
    two = ["--settings", str(path), str(path), "--save_dir", str(tmp_path)]
    with pytest.raises(UserError, match="--save_dir: leave it out with more than one file of"):
        read_job(two, guided=True)
    images = tmp_path / "images.npz"
    record = json.loads(path.read_text())
    with np.load(tiny.images) as npz:
        np.savez(images, npz["arr_0"] // 2, npz["arr_1"])
    record["start"]["path"] = str(images)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"images\.npz has changed since the run's settings were"):
        read_job(argv, guided=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "0"), ("seed", True), ("network", {}), ("sampler", None), ("num_samples", 1.5)],
)
def test_a_record_with_something_else_in_it_is_damaged(tiny, tmp_path, key, value):
    run = read_job(tiny.worker_flags(tmp_path), guided=False).run
    assert Run.from_json(json.loads(json.dumps(run.to_json())), where="x") == run
    with pytest.raises(UserError, match=r"^x\.json is damaged or of another version: ") as error:
        Run.from_json({**run.to_json(), key: value}, where="x.json")
    assert "\n" not in str(error.value)


def test_what_no_flag_says_is_told(tiny, tmp_path):
    argv = tiny.worker_flags(tmp_path)
    assert (
        read_job(argv, guided=False)
        .remarks[0]
        .endswith(
            "assumed by default: num_heads 4, num_head_channels -1, use_new_attention_order False, "
            "noise_schedule linear, diffusion_steps 1000, rescale_timesteps False, "
            "predict_xstart False"
        )
    )
