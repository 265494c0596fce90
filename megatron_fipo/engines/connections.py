"""What all HTTP clients of the engines have in common."""

import functools
import ssl

import httpx


@functools.cache
def tls() -> ssl.SSLContext:
    """The certificates that httpx trusts, read once: a client of its own reads them for 20 ms, a step makes ten."""
    return httpx.create_ssl_context(trust_env=False)
