"""The argparse bridge and the constructors (tests/scripts/test_flags.py freezes the defaults)."""

import argparse

import pytest
import torch

from guided_diffusion import script_util as su


def test_every_conditional_checkpoint_has_a_table_of_1000_labels():
    assert su.NUM_CLASSES == 1000


def test_bridge_from_defaults_to_flags_and_back():
    parser = argparse.ArgumentParser()
    defaults = {"steps": 3, "rate": 0.5, "name": "a", "switch": False, "path": None}
    su.add_dict_to_argparser(parser, defaults)
    args = parser.parse_args(["--steps", "4", "--switch", "yes", "--path", "x", "--rate", "1e-3"])
    want = {"steps": 4, "rate": 1e-3, "name": "a", "switch": True, "path": "x"}
    assert su.args_to_dict(args, defaults.keys()) == want


@pytest.mark.parametrize(
    ("words", "value"), [("true yes 1 True Y t", True), ("false no 0 False N f", False)]
)
def test_booleans_as_words(words, value):
    assert all(su.str2bool(word) is value for word in words.split())


def test_other_words_are_refused(capsys):
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, {"switch": False})
    with pytest.raises(SystemExit):
        parser.parse_args(["--switch", "maybe"])
    assert 'expected true or false (yes/no, 1/0), not "maybe"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "defaults", "create"),
    [
        ("image", su.model_and_diffusion_defaults, su.create_model_and_diffusion),
        ("classifier", su.classifier_and_diffusion_defaults, su.create_classifier_and_diffusion),
        ("superres", su.sr_model_and_diffusion_defaults, su.sr_create_model_and_diffusion),
    ],
)
def test_constructors_take_exactly_their_defaults(kind, defaults, create):
    with torch.device("meta"):
        model, diffusion = create(**defaults())
    assert diffusion.num_timesteps == 1000
    assert sum(p.numel() for p in model.parameters()) > 1e6
    flags = defaults()
    flags.pop("noise_schedule")
    with pytest.raises(TypeError, match="noise_schedule"):
        create(**flags)
    with pytest.raises(TypeError, match="colour"):
        create(**defaults(), colour=True)


def test_level_widths():
    assert su._channel_mult(512, su.CHANNEL_MULT) == (0.5, 1, 1, 2, 2, 4, 4)
    assert su._channel_mult(512, su.SUPER_RES_CHANNEL_MULT) == (1, 1, 2, 2, 4, 4)
    assert su._channel_mult(40, su.CHANNEL_MULT, "0.5,1,2") == (0.5, 1, 2)
    with pytest.raises(ValueError, match=r"choose one of 8, 16, 32, 64, 128, 256, 512"):
        su._channel_mult(40, su.CHANNEL_MULT)
    with pytest.raises(ValueError, match="comma list of numbers"):
        su._channel_mult(64, su.CHANNEL_MULT, "1;2")
    with pytest.raises(ValueError, match="comma list of image sizes"):
        su._attention_factors(64, "0")
