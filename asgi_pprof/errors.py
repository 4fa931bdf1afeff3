"""
What can go wrong with a profile request, each with its HTTP status.

One place, `app.py`, turns these into responses; nothing else knows of HTTP.
"""

from __future__ import annotations


class PprofError(Exception):
    """
    A request that cannot be answered with a profile.

    The message is the whole response body and ends up in front of whoever
    runs `go tool pprof`, so it says what came and what would be accepted.
    """

    status = 500


class BadParameter(PprofError):
    """A query parameter that the endpoint cannot take."""

    status = 400


class AccessDenied(PprofError):
    """The guard did not let this request in."""

    status = 403


class UnknownProfile(PprofError):
    """No profile has this name. The text is Go's."""

    status = 404

    def __init__(self) -> None:
        super().__init__("Unknown profile")


class ProfileBusy(PprofError):
    """Something that only one at a time can use is in use. 500, as Go has it."""


class ProfileUnavailable(PprofError):
    """This process cannot take this profile; the message says what would help."""

    status = 501


class ClientGone(PprofError):
    """The client left before its profile was done. Text and status are Go's."""

    def __init__(self) -> None:
        super().__init__("context canceled")


class IncompatibleProfiles(PprofError):
    """Two profiles that count different things were to be combined."""


class InvalidProfile(PprofError):
    """A profile that breaks the format's rules; always a bug of ours."""
