"""T' from data: the command, and `--t_prime auto` in the driver."""

import json
import re

import pytest
from PIL import Image

from esddpm_io.errors import UserError
from guided_diffusion.commands import driver, propose
from guided_diffusion.sampling.chunks import ChunkFolder
from tests.tiny_sampling import NUM_IMAGES, read_job

STEPS = ("--steps", "2", "--sampler", "dpmpp_2m_sde")


def flags(tiny, *more: str) -> list[str]:
    return ["--dataset", str(tiny.root / "tiny.toml"), "--devices", "cpu", *STEPS, *more]


def test_last_line_json_and_the_command_to_run_next(tiny, tmp_path, capsys):
    file = tmp_path / "t_prime.json"
    plot = tmp_path / "curve.png"
    own = ["--json", str(file), "--plot", str(plot), "--num_images", "6", "--seed", "3"]
    propose.main(flags(tiny, *own))
    with Image.open(plot) as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(2**20)) > 3
    lines = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"T' = (\d+) \((\d+) … (\d+)\)", lines[-1])
    assert found, lines[-1]
    record = json.loads(file.read_text())
    assert [int(x) for x in found.groups()] == [
        record["proposal"][name] for name in ("t_prime", "low", "high")
    ]
    points = record["proposal"]["points"]
    assert {0, 200, 400, 600, 800} <= {point["t_prime"] for point in points}
    assert record["images"] == 6 and record["evaluations"] == 6 * 2 * (len(points) - 1)
    next_one = next(line for line in lines if "--execute" in line)
    assert f"--t_prime {found[1]}" in next_one and "--seed 3" in next_one
    parsed = driver.create_argparser().parse_args(next_one.split()[2:])
    assert (parsed.steps, parsed.sampler) == (2, "dpmpp_2m_sde")


def test_the_driver_measures_once_and_keeps_it(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [*flags(tiny, "--output_dir", str(out)), "--t_prime", "auto"]
    with pytest.raises(UserError, match="--t_prime auto: T' is not known yet"):
        driver.main(argv)
    with pytest.raises(UserError, match="measures it on machine 0 when it starts"):
        driver.main([*argv, "--execute", "--num_machines", "2", "--machine_idx", "1"])
    driver.main([*argv, "--execute"])
    proposed = json.loads((out / "t_prime.json").read_text())
    t_prime = proposed["proposal"]["t_prime"]
    assert proposed["images"] == NUM_IMAGES
    assert ChunkFolder.load(out).run.sampler.timesteps[0] == t_prime - 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["t_prime_proposal"] == proposed
    capsys.readouterr()
    driver.main([*argv, "--execute"])
    printed = capsys.readouterr().out
    assert f"T' = {t_prime}, as it was measured before" in printed
    assert "samples are there already" in printed
    with pytest.raises(UserError, match="was measured with other settings, images or networks"):
        driver.main([*argv, "--execute", "--seed", "1"])
    with pytest.raises(UserError, match="was measured with other settings, images or networks"):
        driver.main([*argv, "--execute", "--spacing", "karras"])
    (out / "t_prime.json").write_text("[]")
    with pytest.raises(UserError, match="t_prime.json is damaged: remove it"):
        driver.main([*argv, "--execute"])


def test_a_sampling_script_takes_what_was_measured_for_it(tiny, tmp_path):
    worker = tiny.worker_flags(tmp_path, t_prime="auto", steps=2, sampler="dpmpp_2m_sde")
    for flag in ("--timestep_respacing", "--denoise_steps"):
        del worker[worker.index(flag) : worker.index(flag) + 2]
    with pytest.raises(UserError, match=r"t_prime\.json is not there.*propose_t_prime.py --json"):
        read_job(worker, guided=False)
    file = tmp_path / "t_prime.json"
    own = ["--classifier_guidance_scale", "0", "--json", str(file), "--num_images", "5"]
    propose.main(flags(tiny, *own))
    t_prime = json.loads(file.read_text())["proposal"]["t_prime"]
    assert read_job(worker, guided=False).run.sampler.timesteps[0] == t_prime - 1
    with pytest.raises(UserError, match="was measured with other settings"):
        read_job([*worker, "--seed", "1"], guided=False)
