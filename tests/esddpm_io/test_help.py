import re

import pytest

from esddpm_io.help import GROUPS, CommandLine


@pytest.fixture
def parser() -> CommandLine:
    parser = CommandLine(description="One line.\n\n    and an example")
    parser.add_argument("--t_prime", type=int, default=100, help="noise level")
    parser.add_argument("--sampler", choices=["ddpm", "dpmpp_2m_sde"], help="which")
    parser.add_argument("--execute", action="store_true", help="do it")
    return parser


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--t_prme=3"], "unrecognized arguments: --t_prme=3; did you mean --t_prime?"),
        (["--qqq"], "unrecognized arguments: --qqq"),
        (["--sampler", "dpmpp2m_sde"], "; did you mean dpmpp_2m_sde?"),
        (["--t_prime", "many"], "argument --t_prime: invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_line(parser, capsys, argv, line):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(argv)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert line in said and said.endswith(" (--help explains all flags)\n")
    assert ("did you mean" in said) == ("did you mean" in line)


def test_a_long_help_has_groups_in_their_order():
    parser = CommandLine(description="One line.")
    parser.add_argument("folder", metavar="DIR", nargs="+", help="where")
    names = ["batch_size", "steps", "my_own", "lr", "model_path", "image_size", "use_kl"]
    names += ["classifier_width", "eval_backend", "num_workers", "json"]
    for name in names:
        parser.add_argument(f"--{name}", type=int, help=f"is {name}")
    parser.add_argument("--out", required=True, help="is out")
    text = parser.format_help()
    assert text.startswith(f"usage: {parser.prog} DIR [DIR ...] --out OUT [flags]\n\nOne line.\n")
    titles = re.findall(r"^(\S.*):$", text.partition("One line.")[2], re.MULTILINE)
    assert titles[:2] == ["positional arguments", "options"]
    assert titles[2:] == [title for title in GROUPS if title in titles] and len(titles) > 8
    sections = dict(zip(titles, re.split(r"^\S.*:$", text, flags=re.MULTILINE)[1:], strict=False))
    where = {name: [t for t, part in sections.items() if f"is {name}\n" in part] for name in names}
    assert where["my_own"] == ["options"] and where["steps"] == ["sampling"]
    assert where["json"] == where["model_path"] == ["files"]
    assert all(len(found) == 1 for found in where.values())


def test_a_short_help_is_one_list(parser):
    assert re.findall(r"^(\S.*):$", parser.format_help(), re.MULTILINE) == ["options"]


def test_no_flag_is_in_two_groups():
    names = " ".join(GROUPS.values()).split()
    assert len(names) == len(set(names))


def test_help_shows_defaults_and_keeps_the_description(parser):
    text = parser.format_help()
    assert "One line.\n\n    and an example\n" in text
    assert "noise level (default: 100)\n" in text
    assert "which\n" in text and "do it\n" in text
