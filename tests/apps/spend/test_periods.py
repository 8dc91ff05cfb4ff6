"""Days and months begin where a time zone's calendar says: month ends, leap days, both changes of the clock."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.spend import periods

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Pacific/Auckland",
    "America/Sao_Paulo",
    "Africa/Cairo",
]


def ms(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


@pytest.mark.parametrize(
    ("period", "zone", "at", "start", "end"),
    [
        # the ends of months
        ("monthly", "UTC", "2026-01-31T23:59:59", "2026-01-01T00:00", "2026-02-01T00:00"),
        ("monthly", "UTC", "2026-02-01T00:00:00", "2026-02-01T00:00", "2026-03-01T00:00"),
        ("monthly", "UTC", "2026-12-31T12:00:00", "2026-12-01T00:00", "2027-01-01T00:00"),
        # a leap day
        ("monthly", "UTC", "2028-02-29T23:59:59", "2028-02-01T00:00", "2028-03-01T00:00"),
        ("daily", "UTC", "2028-02-29T00:00:00", "2028-02-29T00:00", "2028-03-01T00:00"),
        # elsewhere it is another month already, or still
        ("monthly", "Pacific/Auckland", "2026-06-30T12:00:00", "2026-06-30T12:00", "2026-07-31T12:00"),
        ("monthly", "America/New_York", "2026-07-01T03:59:59", "2026-06-01T04:00", "2026-07-01T04:00"),
        ("daily", "Asia/Kolkata", "2026-05-05T18:30:00", "2026-05-05T18:30", "2026-05-06T18:30"),
        # clocks go forward: a day of 23 hours, a month that begins and ends in different offsets
        ("daily", "Europe/Berlin", "2026-03-29T12:00:00", "2026-03-28T23:00", "2026-03-29T22:00"),
        ("monthly", "Europe/Berlin", "2026-03-29T12:00:00", "2026-02-28T23:00", "2026-03-31T22:00"),
        # clocks go back: a day of 25 hours
        ("daily", "Europe/Berlin", "2026-10-25T12:00:00", "2026-10-24T22:00", "2026-10-25T23:00"),
        ("daily", "America/New_York", "2026-11-01T12:00:00", "2026-11-01T04:00", "2026-11-02T05:00"),
        # a midnight that is skipped: the day begins with its first moment, 01:00
        ("daily", "America/Sao_Paulo", "2018-11-04T12:00:00", "2018-11-04T03:00", "2018-11-05T02:00"),
        ("daily", "Africa/Cairo", "2026-04-24T12:00:00", "2026-04-23T22:00", "2026-04-24T21:00"),
        # a day that never was: Samoa went over the date line
        ("daily", "Pacific/Apia", "2011-12-30T09:59:59", "2011-12-29T10:00", "2011-12-30T10:00"),
        ("daily", "Pacific/Apia", "2011-12-30T10:00:00", "2011-12-30T10:00", "2011-12-31T10:00"),
    ],
)
def test_periods_follow_the_calendar(period, zone, at, start, end):
    assert periods.span_of(period, zone, ms(at)) == (ms(start), ms(end))


@given(
    zone=st.sampled_from(
        [*ZONES, "Pacific/Apia", "Asia/Tehran", "Antarctica/Troll", "America/St_Johns", "Atlantic/Azores"]
    ),
    period=st.sampled_from(["daily", "monthly"]),
    at_ms=st.integers(min_value=ms("1975-01-01"), max_value=ms("2060-01-01")),
)
def test_every_moment_lies_in_one_period_and_periods_leave_no_gap(zone, period, at_ms):
    span = periods.span_of(period, zone, at_ms)
    assert span.start_ms <= at_ms < span.end_ms
    assert periods.span_of(period, zone, span.end_ms - 1) == span
    assert periods.span_of(period, zone, span.end_ms).start_ms == span.end_ms
    hours = (span.end_ms - span.start_ms) / 3_600_000
    assert 20 <= hours <= 48 if period == "daily" else 27 * 24 <= hours <= 32 * 24


@pytest.mark.parametrize("zone", ZONES)
def test_months_are_named_as_their_zone_names_them(zone):
    moment = datetime(2026, 3, 31, 12, tzinfo=UTC)
    for hour in range(48):
        at = moment + timedelta(hours=hour)
        month = periods.month_of(int(at.timestamp() * 1000), zone)
        assert month == f"{at.astimezone(ZoneInfo(zone)):%Y-%m}"
        first, after = periods.bounds(month, zone)
        assert first <= at < after


@pytest.mark.parametrize(
    ("name", "known"), [("Europe/Berlin", True), ("UTC", True), ("Mars/Base", False), ("../x", False), ("", False)]
)
def test_time_zones_are_known_or_not(name, known):
    assert periods.is_time_zone(name) is known
