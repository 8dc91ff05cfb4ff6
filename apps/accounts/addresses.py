"""Tell from which address a request comes, without believing what strangers write."""

from ipaddress import IPv4Address, IPv6Address, ip_address

from django.conf import settings
from django.http import HttpRequest


def client_address(request: HttpRequest) -> str:
    """Return the client's IP address, '' when there is none (a Unix socket).

    X-Forwarded-For is read only when the connection itself comes from one of AISCALE_TRUSTED_PROXIES, and from its end: what stands left of
    the last address that is no trusted proxy was written by the client, and may be anything.
    """
    address = _parse(request.META.get("REMOTE_ADDR", ""))
    if address is None or not _is_trusted(address):
        return str(address or "")
    for text in reversed(request.META.get("HTTP_X_FORWARDED_FOR", "").split(",")):
        forwarded = _parse(text)
        if forwarded is None:
            break
        address = forwarded
        if not _is_trusted(address):
            break
    return str(address)


def _is_trusted(address: IPv4Address | IPv6Address) -> bool:
    return any(address in network for network in settings.ENV.trusted_proxies)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.strip().strip("[]").partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
