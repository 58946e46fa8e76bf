"""One browser: told everything once, bounded however slow it is."""

import json

from guestd.broker.web.watcher import KEPT_EVENTS, Watcher

HOST, ROWS = b'{"epoch":1}', {"a": b'{"name":"a"}', "b": b'{"name":"b"}'}


def test_a_slow_one_hears_the_newest_state_once() -> None:
    watcher = Watcher()
    for _ in range(1000):
        watcher.tell({"a", "gone"})
    said = json.loads(watcher.take(HOST, ROWS))
    assert (said["guests"], said["gone"], said["host"]) == ([{"name": "a"}], ["gone"], {"epoch": 1})
    said = json.loads(watcher.take(HOST, ROWS))
    assert (said["guests"], said["gone"], said["host"], said["events"]) == ([], [], None, [])


def test_a_slow_one_hears_the_newest_events_and_how_many_it_missed() -> None:
    watcher = Watcher()
    watcher.tell_event(b"-1", 5)
    for number in range(KEPT_EVENTS + 7):
        watcher.tell_event(b"%d" % number, 0)
    said = json.loads(watcher.take(HOST, ROWS))
    assert said["events"] == list(range(7, KEPT_EVENTS + 7))
    assert said["missed"] == 5 + 8
    assert json.loads(watcher.take(HOST, ROWS))["missed"] == 0


async def test_it_waits_until_there_is_something_to_say() -> None:
    watcher = Watcher()
    watcher.tell({"a"})
    await watcher.wait()
    watcher.end()
    await watcher.wait()
    assert watcher.ended
