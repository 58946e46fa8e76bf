"""A guest that makes too many events leaves a count."""

from guestd.broker.history.floods import Floods


def test_twenty_at_once_and_then_two_a_second_in_stretches() -> None:
    floods = Floods()
    assert sum(floods.take("a", 0.0) for _ in range(1000)) == 20
    assert floods.take("b", 0.0)
    assert floods.over(4.9) == []
    assert floods.over(5.0) == [("a", 980)]
    assert floods.over(5.0) == []
    assert sum(floods.take("a", 5.0) for _ in range(100)) == 10


def test_a_flood_that_goes_on_for_an_hour_is_kept_at_two_a_second() -> None:
    floods = Floods()
    kept = told = 0
    for tenth in range(36_000):
        kept += sum(floods.take("a", tenth / 10) for _ in range(3))
        told += sum(left_out for _, left_out in floods.over(tenth / 10))
    assert 7100 <= kept <= 7230
    assert kept + told >= 3 * 36_000 - 200


def test_a_clock_that_stands_gives_nothing_back_and_a_guest_that_is_gone_is_forgotten() -> None:
    floods = Floods()
    for _ in range(30):
        floods.take("a", 10.0)
    assert not floods.take("a", 9.0)
    floods.forget("a")
    assert floods.over(100.0) == []
    assert floods.take("a", 10.0)
