"""The errors of a profile request, each with its HTTP status; `app.py` makes responses of them."""

from __future__ import annotations


class PprofError(Exception):
    """
    A request that cannot be answered with a profile.

    The message is the whole response body, and `go tool pprof` prints it: it says
    what came and what would be accepted.
    """

    status = 500


class BadParameter(PprofError):
    """A query parameter has a value that the endpoint does not accept."""

    status = 400


class AccessDenied(PprofError):
    """The guard refuses the request."""

    status = 403


class UnknownProfile(PprofError):
    """No profile has this name. The text is Go's."""

    status = 404

    def __init__(self) -> None:
        super().__init__("Unknown profile")


class ProfileBusy(PprofError):
    """Another request uses what only one can use at a time. The status is Go's."""


class ProfileUnavailable(PprofError):
    """This process cannot record the profile; the message says what would help."""

    status = 501


class Cancelled(PprofError):
    """The client has left, or the server has cancelled the request. Text and status are Go's."""

    def __init__(self) -> None:
        super().__init__("context canceled")


class IncompatibleProfiles(PprofError):
    """Two profiles with different sample or period types cannot be combined."""
