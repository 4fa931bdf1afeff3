"""
Decides which requests are answered.

By default only those of a peer on this machine, by the address of the socket and
never by a header. Refused are requests that a proxy forwarded, because behind a proxy
on this machine every client looks local, and requests that a web page may have made
a browser send: a Host that is a name can be rebound to 127.0.0.1, and pages of other
sites can send requests, although they cannot read the answers. A browser marks these
by Sec-Fetch-Site, but not to 0.0.0.0 or [::], which reach this machine as well; so
those are refused as Host.

Source: DNS rebinding: developer.chrome.com, Private Network Access; fetch
metadata: w3.org/TR/fetch-metadata; CVE-2019-11248 for what happens without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

from asgi_pprof.errors import AccessDenied

Guard = Callable[[Scope], None]
"""Returns to allow the request of a scope, or raises AccessDenied with the reason."""

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
    Allow direct and deliberate requests from this machine.

    Raises:
        AccessDenied: The message is the first reason found, and quotes no header's value.
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
    for name in ("Origin", "Referer"):
        page = headers.get(name)
        if name == "Referer" and page in ("", "about:blank"):  # sent where there is no page
            page = None
        if page is not None and not any(_authority(page) == host.lower() for host in hosts):
            raise AccessDenied(f"profiles are not served to pages of other sites ({name})")


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
    address = _address(str(host))
    return address is not None and address.is_loopback


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address, that of IPv4 if it is mapped into IPv6; None if it is none."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_local_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if match is None or int(match["port"] or 0) > 65535:
        return False
    name = match["name"]
    if name and name.lower() == "localhost":
        return True
    address = _address(match["address"] or name)
    return address is not None and not address.is_unspecified


def _authority(url: str) -> str:
    return re.split("[/?#]", url.lower().partition("://")[2], maxsplit=1)[0]
