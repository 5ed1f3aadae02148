import io

from guided_diffusion.sampling.status import Overview, Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def overview(done: int, workers: int = 2) -> Overview:
    one = {"host": "h", "device": "cpu", "state": "waiting", "alive": True, "rate": 1.0}
    return Overview(10, done, 2.0, [{**one, "rank": rank} for rank in range(workers)])


def test_a_terminal_gets_one_table_in_place():
    stream = Terminal()
    screen = Screen(stream)
    assert screen.is_due()
    screen.show(overview(2))
    first = stream.getvalue()
    assert "done 2/10 images (20%), 2 images/s, 0:04 left" in first
    assert first.count("\n") == 4 and "waiting" in first
    screen.show(overview(3, workers=1))
    # Back up over the four lines, and what the shorter table leaves is cleared.
    assert stream.getvalue()[len(first) :].startswith("\x1b[4Adone 3/10")
    assert stream.getvalue().endswith("\x1b[J")


def test_notes_stay_above_the_table():
    stream = Terminal()
    screen = Screen(stream)
    screen.show(overview(2))
    before = len(stream.getvalue())
    screen.note("a worker died")
    screen.show(overview(2))
    assert stream.getvalue()[before:].startswith("\x1b[4A\x1b[Ja worker died\ndone 2/10")


def test_a_log_gets_a_line_now_and_then():
    stream = io.StringIO()
    screen = Screen(stream)
    assert not screen.is_due()
    screen.show(overview(2))
    assert stream.getvalue() == "2/10 images (20%), 2 images/s, 0:04 left; 2 workers\n"
    assert not screen.is_due()


def test_a_finished_folder_shows_no_rate():
    assert overview(10).table()[0] == "done 10 images, all of them"
    assert overview(10).line() == "10 images, all of them"
    assert overview(9, workers=1).line().endswith("; 1 worker")
