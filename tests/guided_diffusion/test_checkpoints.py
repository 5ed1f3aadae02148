import argparse
import functools
import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import script_util
from guided_diffusion.checkpoints import (
    fingerprint,
    load_object,
    load_weights,
    read_checkpoint,
    read_sidecar,
    save_checkpoint,
    write_sidecar,
)
from guided_diffusion.settings.recognition import identify

GOLDEN = Path(__file__).parents[1] / "golden/published_checkpoints.json.gz"
PUBLISHED = json.loads(gzip.decompress(GOLDEN.read_bytes()))
SAME_SHAPES = ("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt", "256x256_diffusion_uncond.pt")
DEFAULTS = {
    "model": script_util.model_and_diffusion_defaults(),
    "clf": script_util.classifier_and_diffusion_defaults(),
    "sr": script_util.sr_model_and_diffusion_defaults(),
}
TINY = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
}


def published_flags(name):
    """All flags of a published checkpoint, typed like the defaults."""
    defaults = DEFAULTS[PUBLISHED[name]["kind"]]
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, defaults)
    return vars(parser.parse_args(PUBLISHED[name]["flags"].split()))


@functools.cache
def published_state_dict(name):
    return {
        key: torch.empty(shape, device="meta")
        for key, shape in dict(PUBLISHED[name]["state_dict"]).items()
    }


def tiny_model(**flags):
    torch.manual_seed(0)
    return script_util.create_model(**{**TINY, **flags})


@pytest.fixture
def tiny_path(tmp_path):
    path = str(tmp_path / "model000100.pt")
    save_checkpoint(tiny_model().state_dict(), path)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_recognises_every_published_checkpoint(name):
    found = identify(published_state_dict(name))
    assert found.kind == {"clf": "classifier"}.get(PUBLISHED[name]["kind"], PUBLISHED[name]["kind"])
    assert found.published == (SAME_SHAPES if name in SAME_SHAPES else (name,))
    assert found.open_flags == ()
    expected = published_flags(name)
    if name in SAME_SHAPES:  # they differ in a flag that sampling does not use
        expected["dropout"] = found.flags["dropout"]
    assert found.flags == expected
    assert identify(published_state_dict(name)).flags == expected


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learn_sigma": True, "class_cond": True, "use_scale_shift_norm": True},
        {"resblock_updown": True, "num_res_blocks": 2, "attention_resolutions": "32,16"},
        {"attention_resolutions": "", "channel_mult": "1,1,2,2", "num_res_blocks": 3},
        {"channel_mult": "1", "attention_resolutions": "32"},
        {"channel_mult": "0.5,1", "num_channels": 64},
    ],
)
def test_recognises_other_models(flags):
    with torch.device("meta"):
        state_dict = tiny_model(**flags).state_dict()
    found = identify(state_dict, image_size=32)
    assert (found.kind, found.published) == ("model", ())
    wanted = {**TINY, **flags}
    assert {name: found.flags[name] for name in wanted} == wanted
    assert "num_heads" in found.open_flags
    assert "noise_schedule" in found.open_flags


def test_default_multipliers_of_a_size_stay_unnamed():
    with torch.device("meta"):
        state_dict = tiny_model(channel_mult="", attention_resolutions="8").state_dict()
    found = identify(state_dict)  # 1,2,2 is the default of 32 alone
    assert found.flags["image_size"] == 32
    assert found.flags["channel_mult"] == ""


def test_what_shapes_do_not_tell_is_said():
    with torch.device("meta"):
        found = identify(tiny_model().state_dict())
    assert found.open_flags[:2] == ("image_size", "attention_resolutions")
    assert not {"image_size", "attention_resolutions"} & found.flags.keys()


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("updown", [False, True])
def test_recognises_other_classifiers(pool, updown):
    flags = {
        **script_util.classifier_defaults(),
        "image_size": 128,
        "classifier_width": 32,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "32,8",
        "classifier_use_scale_shift_norm": not updown,
        "classifier_resblock_updown": updown,
        "classifier_pool": pool,
    }
    with torch.device("meta"):
        found = identify(script_util.create_classifier(**flags).state_dict())
    assert found.kind == "classifier"
    del flags["classifier_use_fp16"]
    assert found.flags == flags


def test_other_networks_are_not_recognised():
    assert identify(torch.nn.Linear(3, 3).state_dict()) is None
    state_dict = dict(tiny_model().state_dict())
    state_dict.popitem()
    assert identify(state_dict) is None


def test_a_checkpoint_comes_back_as_it_was(tiny_path, tmp_path):
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_weights(other, tiny_path, flag="--model_path")
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    legacy = tmp_path / "legacy.pt"
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)
    assert read_checkpoint(str(legacy), flag="--f").keys() == model.state_dict().keys()


def test_saving_is_whole_or_not_at_all(tiny_path):
    before = Path(tiny_path).read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"a": torch.zeros(1000), "b": lambda: None}, tiny_path)
    assert Path(tiny_path).read_bytes() == before
    assert [path.name for path in Path(tiny_path).parent.iterdir()] == ["model000100.pt"]


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Harmful()}, "bad.pt")
    with pytest.raises(UserError, match=r"--model_path: bad\.pt holds more than plain data"):
        load_object("bad.pt", flag="--model_path")
    assert not Path("harm").exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, new_format, share):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save(tiny_model().state_dict(), whole, _use_new_zipfile_serialization=new_format)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"--model_path: .*cut\.pt is (truncated|damaged|empty)"):
        read_checkpoint(str(cut), flag="--model_path")


def test_files_that_are_no_checkpoints(tmp_path):
    def problem(path):
        with pytest.raises(UserError) as error:
            read_checkpoint(str(path), flag="--model_path")
        assert "\n" not in str(error.value)
        return str(error.value)

    page = tmp_path / "page.pt"
    page.write_text("<html>not found</html>")
    assert "damaged or not a checkpoint" in problem(page)
    assert "there is no file" in problem(tmp_path / "none.pt")
    assert "directory" in problem(tmp_path)
    optimiser = torch.optim.AdamW(tiny_model().parameters())
    save_checkpoint(optimiser.state_dict(), str(tmp_path / "opt.pt"))
    assert "is the state of an optimiser" in problem(tmp_path / "opt.pt")
    save_checkpoint([torch.zeros(1)], str(tmp_path / "list.pt"))
    assert "is not a state dict" in problem(tmp_path / "list.pt")


def mismatch(model, path):
    with pytest.raises(UserError) as error:
        load_weights(model, path, flag="--model_path")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_in_the_wrappings_of_others_are_found(tmp_path):
    model = tiny_model()
    plain = model.state_dict()
    parallel = torch.nn.DataParallel(model).state_dict()
    for name, content in {
        "parallel": parallel,
        "framework": {"state_dict": plain, "epoch": 3},
        "both": {"state_dict": parallel, "optimizer": {"state": {}, "param_groups": []}},
    }.items():
        path = str(tmp_path / f"{name}.pt")
        torch.save(content, path)
        other = tiny_model()
        torch.nn.init.zeros_(other.time_embed[0].weight)
        load_weights(other, path, flag="--model_path")
        for key, value in other.state_dict().items():
            assert torch.equal(value, plain[key]), key


def test_weights_in_another_wrapping_are_pointed_at(tmp_path):
    state = tiny_model().state_dict()
    path = str(tmp_path / "all.pt")
    torch.save({"net": state, "ema": state, "step": 3}, path)
    with pytest.raises(UserError, match=r"all\.pt is not .*; it holds net, ema: save one of them"):
        read_checkpoint(path, flag="--model_path")


def test_a_mismatch_names_tensors_and_the_flags_that_fit(tiny_path):
    message = mismatch(tiny_model(class_cond=True, learn_sigma=True), tiny_path)
    assert "1 missing (label_emb.weight)" in message
    assert "2 of another shape (out.2.weight is 3x32x3x3 and not 6x32x3x3, " in message
    assert "It looks like a diffusion model: --num_channels 32 --num_res_blocks 1" in message
    assert "shapes do not tell image_size, attention_resolutions, num_heads" in message
    write_sidecar(tiny_path, {**DEFAULTS["model"], **TINY})
    message = mismatch(tiny_model(num_res_blocks=2), tiny_path)
    assert "Its sidecar says it is a diffusion model: --image_size 32 --num_channels 32" in message


def test_a_mismatch_names_the_published_checkpoint_it_looks_like(tmp_path):
    flags = published_flags("64x64_classifier.pt")
    with torch.device("meta"):
        shapes = script_util.create_classifier_and_diffusion(**flags)[0].state_dict()
    # One number, seen as every tensor: the real file would be 260 MB.
    path = str(tmp_path / "x.pt")
    save_checkpoint({n: torch.zeros(()).expand(t.shape) for n, t in shapes.items()}, path)
    message = mismatch(tiny_model(), path)
    assert "It looks like a classifier like 64x64_classifier.pt: --classifier_depth 4" in message
    assert "too many" in message


def test_sidecars(tiny_path):
    assert read_sidecar(tiny_path) is None
    write_sidecar(tiny_path, TINY, early_stop_steps=100)
    assert read_sidecar(tiny_path) == {"kind": "model", "flags": TINY, "early_stop_steps": 100}
    sidecar = Path(tiny_path).with_name("model000100.json")
    assert sidecar.is_file()
    ema = str(sidecar.with_name("ema_0.9999_000100.pt"))
    write_sidecar(ema, {"latent": 8}, kind="vae")
    assert sidecar.with_name("ema_0.9999_000100.json").is_file()
    assert read_sidecar(ema)["kind"] == "vae"
    with pytest.raises(ValueError, match="kind must be one of model, "):
        write_sidecar(ema, {}, kind="unet")
    for text in ("{", "[]", '{"kind": "unet", "flags": {}, "early_stop_steps": null}'):
        sidecar.write_text(text)
        with pytest.raises(UserError, match=r"model000100\.json is not"):
            read_sidecar(tiny_path)


def test_a_sidecar_that_a_user_writes(tiny_path):
    sidecar = Path(tiny_path).with_name("model000100.json")
    sidecar.write_text(json.dumps({"kind": "model", "flags": {"num_heads": 2, "dropout": 0}}))
    assert read_sidecar(tiny_path)["early_stop_steps"] is None
    sidecar.write_text(json.dumps({"kind": "model", "flags": {}, "early_stop_steps": "100"}))
    with pytest.raises(UserError, match=r"\.json: early_stop_steps '100': its type must be int"):
        read_sidecar(tiny_path)


def test_the_fingerprint_is_that_of_the_tensors(tiny_path, tmp_path):
    state_dict = read_checkpoint(tiny_path, flag="--f")
    legacy = tmp_path / "other_name.pt"
    reordered = dict(reversed(state_dict.items()))
    torch.save(reordered, legacy, _use_new_zipfile_serialization=False)
    first = fingerprint(state_dict)
    assert fingerprint(read_checkpoint(str(legacy), flag="--f")) == first
    name = next(iter(reordered))
    for change in (reordered[name] + 1e-3, reordered[name].double(), reordered[name][None]):
        assert fingerprint({**reordered, name: change}) != first
    assert fingerprint({f"{n}x": t for n, t in state_dict.items()}) != first


@pytest.mark.parametrize("header", ["[]", "5", '{"__metadata__": 5}', '{"__metadata__": []}'])
def test_safetensors_with_another_header_are_no_checkpoints(tmp_path, header):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert read_sidecar(str(path)) is None
    with pytest.raises(UserError, match=r"--f: .*a\.safetensors is damaged or not a checkpoint"):
        read_checkpoint(str(path), flag="--f")


def test_flags_in_safetensors_that_are_no_text_are_told(tmp_path):
    header = '{"__metadata__": {"es_ddpm": 5}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(UserError, match=r"the metadata of .*a\.safetensors is not valid JSON"):
        read_sidecar(str(path))


def test_safetensors_are_checkpoints(tiny_path, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    state_dict, path = read_checkpoint(tiny_path, flag="--f"), str(tmp_path / "ema.safetensors")
    sidecar = {"kind": "model", "flags": TINY, "early_stop_steps": 100}
    save_checkpoint(state_dict, path, sidecar)
    assert read_sidecar(path) == sidecar
    assert fingerprint(read_checkpoint(path, flag="--f")) == fingerprint(state_dict)
    assert load_object(path, flag="--f").keys() == state_dict.keys()
    load_weights(tiny_model(), path, flag="--f")
    save_checkpoint(state_dict, path)
    assert read_sidecar(path) is None
    with pytest.raises(ValueError, match="only a state dict"):
        save_checkpoint({"step": 3}, path)
    assert fingerprint(read_checkpoint(path, flag="--f")) == fingerprint(state_dict)
    for length in (0, 5, 300, 5000):
        Path(path).write_bytes(Path(path).read_bytes()[:length] or b"")
        assert read_sidecar(path) is None
        with pytest.raises(UserError, match=r"--f: .*ema\.safetensors is damaged or not a ch"):
            read_checkpoint(path, flag="--f")
        save_checkpoint(state_dict, path)
    with pytest.raises(UserError, match="--f: there is no file"):
        read_checkpoint(str(tmp_path / "none.safetensors"), flag="--f")
