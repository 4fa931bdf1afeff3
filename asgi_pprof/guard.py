"""
Who may come in.

By default: a peer on this machine, by the socket's address and never by a
header; not a request that a proxy has passed on (behind a proxy on this
machine everybody looks local); not a browser tricked into asking (a Host that
is a name can be rebound to 127.0.0.1; a page of another site may send
requests, though not read the answers).

Source: DNS rebinding: developer.chrome.com, Private Network Access; fetch
metadata: w3.org/TR/fetch-metadata; CVE-2019-11248 for what happens without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

from asgi_pprof.errors import AccessDenied

Guard = Callable[[Scope], None]
"""Lets a request's scope pass, or raises AccessDenied with the reason."""

_FORWARDING = frozenset(
    (
        "forwarded via x-real-ip x-client-ip x-cluster-client-ip x-original-forwarded-for"
        " x-envoy-external-address x-appengine-user-ip x-azure-clientip x-azure-socketip"
        " true-client-ip cf-connecting-ip cf-connecting-ipv6 fastly-client-ip fly-client-ip"
        " forwarded-for client-ip wl-proxy-client-ip proxy-client-ip"
    ).split()
)


# RFC 3986: a bracketed address or a name, then perhaps a port.
_HOST = re.compile(
    r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^\[\]:@/?#\s]+))(?::(?P<port>[0-9]{0,9}))?"
)


def allow_loopback(scope: Scope) -> None:
    """
    Let requests from this machine pass, made directly and on purpose.

    Raises:
        AccessDenied: With the first reason found, which names no secret.
    """
    headers = Headers(scope=scope)
    _check_peer(scope)
    for name in headers.keys():
        if name in _FORWARDING or name.startswith("x-forwarded"):
            raise AccessDenied(
                f"profiles are served to direct requests only, and this one was forwarded ({name})"
            )
    hosts = headers.getlist("host")
    for host in hosts:
        if not _is_local_host(host):
            raise AccessDenied(
                "profiles are served only under an IP address or localhost,"
                " and the Host of this request is another name"
            )
    # "same-site" is another port of this machine, or another host of one domain.
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise AccessDenied("profiles are not served to pages of other sites (Sec-Fetch-Site)")
    origin = headers.get("origin")
    if origin is not None and not any(_authority(origin) == host.lower() for host in hosts):
        raise AccessDenied("profiles are not served to pages of other sites (Origin)")


def _check_peer(scope: Scope) -> None:
    client = scope.get("client")
    if not client or client[0] is None:
        raise AccessDenied(
            "profiles are served to loopback peers only, and this connection has no peer address"
        )
    if not _is_loopback(client[0]):
        raise AccessDenied(
            f"profiles are served to loopback peers only, and {client[0]} is not one"
        )


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _is_local_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if match is None or int(match["port"] or 0) > 65535:
        return False
    address, name = match["address"], match["name"]
    if name and name.lower() == "localhost":
        return True
    try:
        ip_address((address or name).partition("%")[0])
    except ValueError:
        return False
    return True


def _authority(origin: str) -> str:
    return origin.lower().partition("://")[2]
