"""Override Django's own: with the hours of a day, and with the time zone that they are of."""

DATE_FORMAT = "j M Y"
DATETIME_FORMAT = "j M Y, H:i T"
TIME_FORMAT = "H:i"
