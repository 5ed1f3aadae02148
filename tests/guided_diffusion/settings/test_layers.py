import argparse

import pytest

from guided_diffusion.script_util import add_dict_to_argparser
from guided_diffusion.settings.layers import Layer, parse, resolve, without_effect


def parser():
    found = argparse.ArgumentParser()
    add_dict_to_argparser(found, {"size": 64, "learn": False, "name": ""})
    found.add_argument("--run", action="store_true")
    found.add_argument("--path")
    return found


def test_typed_flags_are_told_from_defaults():
    args, typed = parse(parser(), ["--size", "64", "--learn", "no", "--run"])
    assert vars(args) == {"size": 64, "learn": False, "name": "", "run": True, "path": None}
    assert typed == {"size", "learn", "run"}
    args, typed = parse(parser(), [])
    assert vars(args) == vars(parser().parse_args([])) and typed == set()


def test_bad_words_are_still_argparse_s_to_report():
    with pytest.raises(SystemExit):
        parse(parser(), ["--size", "many"])


def test_later_layers_win_and_origins_are_kept():
    layers = [Layer("default", {"a": 1, "b": 2}), Layer("preset x", {"b": 3}), Layer("typed", {})]
    assert resolve(layers) == ({"a": 1, "b": 3}, {"a": "default", "b": "preset x"})


def test_flags_without_effect_are_remarked_if_they_were_typed():
    conditions = {"eta": (True, "without DDIM"), "limit": (True, "here"), "seed": (False, "")}
    assert without_effect({"eta", "seed"}, conditions) == ["--eta has no effect without DDIM"]
