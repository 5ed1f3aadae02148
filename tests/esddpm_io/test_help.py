import pytest

from esddpm_io.help import CommandLine


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


def test_help_shows_defaults_and_keeps_the_description(parser):
    text = parser.format_help()
    assert "One line.\n\n    and an example\n" in text
    assert "noise level (default: 100)\n" in text
    assert "which\n" in text and "do it\n" in text
