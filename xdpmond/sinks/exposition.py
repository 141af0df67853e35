"""Measurements in the formats of Prometheus, by its client library: the text format, OpenMetrics, compressed or not, as a reader asks.

The library is a Debian package that may be absent (python3-prometheus-client). It is imported when something is to be shown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..errors import ConfigError
from ..measures import Kind, Measured

_MOST_KEPT = 8
"""Answers of a page that are kept."""


def require_library(key: str) -> None:
    """Raises ConfigError, naming the setting that needs it, if the library is not there."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(f"{key} needs Prometheus's client library, which is not installed", hint="apt install python3-prometheus-client")


class Page:
    """One set of measurements. What was asked for once is kept: readers ask the same again. For one thread."""

    def __init__(self, families: Sequence[Measured]):
        self._families = families
        self._application: Any = None
        self._kept: dict[tuple[str, str, str], tuple[list[tuple[str, str]], bytes]] = {}

    def answer(self, accept: str, accept_encoding: str, query: str) -> tuple[list[tuple[str, str]], bytes]:
        """Headers and body, by what the request's headers accept. `query` may narrow it: name[]=NAME."""
        asked = (accept, accept_encoding, query)
        found = self._kept.get(asked)
        if found is None:
            found = self._made(*asked)
            if len(self._kept) < _MOST_KEPT:
                self._kept[asked] = found
        return found

    def _made(self, accept: str, accept_encoding: str, query: str) -> tuple[list[tuple[str, str]], bytes]:
        from prometheus_client import make_wsgi_app

        if self._application is None:
            self._application = make_wsgi_app(_registry(self._families))
        headers: list[tuple[str, str]] = []
        environment = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": query}
        environment |= {"HTTP_ACCEPT": accept, "HTTP_ACCEPT_ENCODING": accept_encoding}
        body = b"".join(self._application(environment, lambda status, given: headers.extend(given)))
        return headers, body


class Source:
    """What there is to show. The daemon's loop sets it, the server's thread reads it."""

    def __init__(self, sources: Callable[[], Iterator[bytes]]):
        self.page: Page | None = None
        """None: nothing was measured yet."""
        self.sources = sources
        """The list of sources as JSON, in pieces."""


def text(families: Sequence[Measured]) -> bytes:
    """The text format."""
    from prometheus_client import generate_latest

    return generate_latest(_registry(families))


def _registry(families: Sequence[Measured]) -> Any:
    from prometheus_client import CollectorRegistry

    # It asks for everything once to learn the names, so that a query may choose among them.
    registry = CollectorRegistry(auto_describe=True)
    collector: Any = _Collector(families)
    registry.register(collector)
    return registry


class _Collector:
    def __init__(self, families: Sequence[Measured]):
        self._families = families

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family in self._families:
            made: Any
            if family.kind is Kind.COUNTER:
                made = CounterMetricFamily(family.name.removesuffix("_total"), family.help, labels=family.labels)
            else:
                made = GaugeMetricFamily(family.name, family.help, labels=family.labels)
            for labels, value in family.samples:
                made.add_metric(labels, value)
            yield made
