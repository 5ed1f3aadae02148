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
    assert image_model(image_size=512).widths == [64, 128, 128, 256, 256, 512, 512]
    assert super_res_model(large_size=512).widths == [128, 128, 256, 256, 512, 512]
    assert image_model(image_size=40, channel_mult="0.5,1,2").widths == [64, 128, 256]


def build(create, defaults, flags):
    with torch.device("meta"):
        return create(**{**defaults, **flags})[0]


def image_model(**flags):
    return build(su.create_model_and_diffusion, su.model_and_diffusion_defaults(), flags)


def super_res_model(**flags):
    return build(su.sr_create_model_and_diffusion, su.sr_model_and_diffusion_defaults(), flags)


def classifier(**flags):
    defaults = su.classifier_and_diffusion_defaults()
    return build(su.create_classifier_and_diffusion, defaults, flags)


ODD = {"image_size": 33, "channel_mult": "1,1"}


@pytest.mark.parametrize(
    ("create", "flags", "message"),
    [
        (image_model, {"num_channels": 0}, "num_channels 0 .* must be a multiple of 32"),
        (image_model, {"num_channels": -32}, "num_channels -32 .* must be a multiple of 32"),
        (image_model, {"num_channels": 33}, "num_channels 33 .* widths 33, 66, 99, 132: each"),
        (image_model, {"channel_mult": "0"}, "channel_mult must be .* numbers above 0 .*1,2,2"),
        (image_model, {"channel_mult": "nan"}, "channel_mult must be"),
        (image_model, {"channel_mult": "1;2"}, "channel_mult must be a comma list of numbers"),
        (image_model, {"num_res_blocks": -1}, "num_res_blocks is -1, it must be at least 1"),
        (image_model, {"num_heads": 0}, "num_heads 0 must be at least 1"),
        (image_model, {"num_heads": 5}, "num_heads 5 must .* divide .*, 384, 512"),
        (image_model, {"num_heads_upsample": 3}, "num_heads_upsample 3 must .*-1"),
        (image_model, {"num_head_channels": 0}, "num_head_channels 0 must .*-1"),
        (image_model, {"dropout": 1.5}, r"dropout is 1.5, it must be in \[0, 1\]"),
        (image_model, ODD, "image_size 33 must be a multiple of 2"),
        (image_model, {**ODD, "image_size": 0}, "image_size 0 must be a multiple of 2"),
        (image_model, {"image_size": 40}, "image_size 40 .* 16, 32, .* or give channel_mult"),
        (image_model, {"attention_resolutions": "0"}, "attention_resolutions must be a comma"),
        (image_model, {"diffusion_steps": 0}, "diffusion_steps is 0, it must be at least 21"),
        (image_model, {"diffusion_steps": 20}, "diffusion_steps is 20, .* noise_schedule linear"),
        (image_model, {"timestep_respacing": "ddim999"}, "timestep_respacing ddim999: no whole"),
        (image_model, {"noise_schedule": "flat"}, "noise_schedule must be"),
        (super_res_model, {"large_size": 100}, "large_size 100 has no .* 256, 512$"),
        (super_res_model, {"num_heads": -4}, "num_heads -4 must be at least 1"),
        (classifier, {"image_size": 100}, "image_size 100 has no default widths.* 256, 512$"),
        (classifier, {"classifier_width": 32}, "classifier_width 32 .* multiples of 64"),
        (classifier, {"classifier_width": 0}, "classifier_width 0 "),
        (classifier, {"classifier_depth": 0}, "classifier_depth is 0, it must be at least 1"),
        (classifier, {"classifier_pool": "max"}, "classifier_pool must be one of adaptive, att"),
        (
            classifier,
            {"classifier_attention_resolutions": "a"},
            "classifier_attention_resolutions must be a comma list",
        ),
    ],
)
def test_impossible_networks_name_the_flag_and_the_valid_values(create, flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        create(**flags)


def test_flags_that_are_not_read_are_not_checked():
    image_model(num_head_channels=64, num_heads=0, num_heads_upsample=0)
    image_model(num_channels=48, channel_mult="2,4", attention_resolutions="32")
    image_model(diffusion_steps=21)
    image_model(diffusion_steps=2, noise_schedule="cosine")


@pytest.mark.parametrize("sizes", ["16,8", "32", "5,16", ""])
def test_attention_at_a_level_or_none_wanted_is_nothing_to_say(sizes, recwarn):
    image_model(attention_resolutions=sizes)
    # Not of what another test left open, which may be collected now
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]


def test_attention_at_no_level_is_said():
    message = "attention_resolutions 5: the levels' sizes are 64, 32, 16, 8, so that only"
    with pytest.warns(UserWarning, match=message):
        image_model(attention_resolutions="5")
    with pytest.warns(UserWarning, match="^classifier_attention_resolutions 7: "):
        classifier(classifier_attention_resolutions="7")
