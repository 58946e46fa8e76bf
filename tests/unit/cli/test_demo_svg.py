"""The picture is well-formed, stays inside its frame, and shows what happened."""

import re
from xml.etree import ElementTree

from demo_worlds import changed, good, without

from guestd.cli.demo.svg import HEIGHT, WIDTH, draw
from guestd.cli.demo.timeline import Guest, Load, Machine, Timeline
from guestd.cli.demo.verify import Expected, verify

SVG = "{http://www.w3.org/2000/svg}"


def picture(timeline: Timeline) -> ElementTree.Element:
    return ElementTree.fromstring(draw(timeline, verify(timeline, Expected())[0]))


def words(root: ElementTree.Element) -> str:
    return "\n".join(text.text or "" for text in root.iter(f"{SVG}text"))


def classes(root: ElementTree.Element) -> set[str]:
    return {element.get("class", "") for element in root.iter()}


def test_a_good_run() -> None:
    root = picture(good())
    text = words(root)
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    assert {"load", "given", "usable", "demand", "onset", "phase"} <= classes(root)
    assert len(list(root.iter(f"{SVG}path"))) == 3 + 2 * 4  # legend, and four curves in each panel
    for expected in (
        "CPUs",
        "Memory",
        "4 busy processes start",
        "a process starts to grow",
        "it exits",
        "first new CPU online 0.60 s after the onset, all 4 after 1.85 s",
        "no OOM kill",
        "2 GiB",
        "0 s",
        "time since the onset of the load",
        "software emulation",
        "virtio-vsock",
    ):
        assert expected in text
    assert "NOT VERIFIED" not in text


def test_nothing_is_drawn_outside() -> None:
    wild = changed(good(), Guest, lambda one: {"cpus_online": 64, "memory_total_bytes": 1 << 50})
    for timeline in (good(), wild):
        for path in picture(timeline).iter(f"{SVG}path"):
            for letter, numbers in re.findall(r"([MLHV])([-\d. ]+)", path.get("d", "")):
                values = [float(number) for number in numbers.split()]
                xs = values[:1] if letter in "ML" else values if letter == "H" else []
                ys = values[1:] if letter in "ML" else values if letter == "V" else []
                assert all(0 <= x <= WIDTH for x in xs)
                assert all(0 <= y <= HEIGHT for y in ys)


def test_a_run_that_was_not_verified_says_so() -> None:
    timeline = without(good(), lambda one: isinstance(one, Load) and one.event == "end")
    assert "NOT VERIFIED" in words(picture(timeline))


def test_an_empty_run_is_a_picture_too() -> None:
    text = words(picture(Timeline(())))
    assert "no machine was booted" in text
    assert "no CPU was added" in text


def test_a_run_that_ended_after_the_boot() -> None:
    timeline = Timeline(tuple(one for one in good().records if isinstance(one, Machine)))
    assert "Linux 6.1.0-56-cloud-amd64" in words(picture(timeline))


def test_what_a_guest_says_cannot_break_the_picture() -> None:
    timeline = changed(good(), Machine, lambda one: {"guest_kernel": '<script>&"'})
    assert 'Linux <script>&"' in words(picture(timeline))


def test_a_run_without_load_counts_from_its_beginning() -> None:
    timeline = without(good(), lambda one: isinstance(one, Load))
    text = words(picture(timeline))
    assert "onset of the load" not in text
    assert "busy processes start" not in text
