"""Of two processes with one kit, the first one counts for as long as it is heard, and no longer."""

from __future__ import annotations

from lichen.federation.presence import FRESH, QUIET, Presence


def there(presence: Presence, now: float) -> dict[str, str]:
    """Which process counts for each site that is there."""
    return {site: one["instance"] for site, one in presence.seen(now).items()}


def test_a_site_is_there_while_it_is_heard() -> None:
    presence = Presence()
    assert presence.instance("a") is None
    assert presence.confirm("a", "first", {"lichen": "1"}, 10.0)
    assert presence.confirm("a", "first", {}, 12.0)
    assert presence.seen(12.0) == {"a": {"since": 10.0, "last": 12.0, "instance": "first", "versions": {"lichen": "1"}}}
    assert there(presence, 12.0 + FRESH) == {}
    presence.answered("a", "first", 13.0)
    presence.answered("a", "second", 14.0)
    presence.answered("b", "third", 14.0)
    assert there(presence, 12.0 + FRESH) == {"a": "first"}
    assert there(presence, 13.0 + FRESH) == {}
    assert presence.instance("a") == "first"  # silent, but not gone
    assert presence.lost("a", 13.0)
    assert presence.instance("a") is None


def test_a_second_process_is_refused_while_the_first_one_is_heard() -> None:
    presence = Presence()
    presence.confirm("a", "first", {}, 0.0)
    assert presence.lets_in("a", "first", 1.0)
    assert presence.lets_in("b", "second", 1.0)
    assert not presence.lets_in("a", "second", 1.0)
    assert not presence.confirm("a", "second", {}, 1.0)
    assert there(presence, 1.0) == {"a": "first"}


def test_the_first_one_has_time_to_connect_again_once() -> None:
    presence = Presence()
    presence.confirm("a", "first", {}, 0.0)
    assert not presence.lets_in("a", "second", 5.0)
    assert not presence.lost("a", 6.0)
    assert not presence.lets_in("a", "second", 5.0 + QUIET - 1.0)  # trying again and again wins no time
    assert there(presence, 5.0 + QUIET - 0.1) == {"a": "first"}
    assert presence.confirm("a", "first", {}, 5.0 + QUIET - 0.1)
    presence = Presence()
    presence.confirm("a", "first", {}, 0.0)
    presence.lets_in("a", "second", 5.0)
    presence.lets_in("a", "second", 5.0 + QUIET - 1.0)
    assert presence.lets_in("a", "second", 5.0 + QUIET)
    assert presence.lost("a", 5.0 + QUIET)


def test_one_that_was_replaced_while_it_was_silent_never_comes_back() -> None:
    presence = Presence()
    presence.confirm("a", "first", {}, 0.0)
    assert presence.lets_in("a", "second", FRESH)
    assert presence.confirm("a", "second", {}, FRESH)
    assert not presence.confirm("a", "first", {}, FRESH + 1.0)
    assert not presence.confirm("a", "first", {}, 100.0 * FRESH)
    assert there(presence, FRESH + 1.0) == {"a": "second"}


def test_a_site_that_was_killed_comes_back_at_once() -> None:
    presence = Presence()
    presence.confirm("a", "first", {}, 0.0)
    assert presence.lost("a", 1.0)
    assert presence.lets_in("a", "second", 1.0)
    assert presence.confirm("a", "second", {}, 1.0)
    assert there(presence, 1.0) == {"a": "second"}
