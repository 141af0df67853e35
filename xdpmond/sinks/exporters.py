"""Where measurements go: the server for Prometheus, the text file, InfluxDB; as the configuration says. For the event loop.

Each is imported when it is wanted: most hosts have one of them or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..config import Config, Metrics
from ..measures import Measured
from ..messages import Record
from .exposition import Page, Source, require_library

if TYPE_CHECKING:
    from .influxdb import InfluxWriter
    from .metrics import MetricsServer
    from .textfile import TextFile


def require_possible(config: Config) -> None:
    """Refuse what this process cannot serve or write, now. Raises ConfigError."""
    if config.metrics.enable:
        from .metrics import require_servable

        require_servable(config.metrics)
    if config.metrics.textfile:
        from .textfile import require_writable

        require_writable(config.metrics.textfile)
    if config.influxdb.url:
        from .influxdb import require_readable

        require_readable(config.influxdb)


def require_sensible(config: Config, writable: Sequence[str] | None) -> None:
    """Refuse what the service cannot serve or write, whoever asks. It may write below the paths in `writable`, if that is known. Raises
    ConfigError."""
    if config.metrics.enable:
        from . import metrics

        metrics.require_servable(config.metrics, by_us=False)
        if writable is not None:
            metrics.require_within(config.metrics, writable)
    if config.metrics.textfile:
        require_library("metrics.textfile")
        if writable is not None:
            from . import textfile

            textfile.require_within(config.metrics.textfile, writable)


class Exporters:
    def __init__(self, report: Callable[[Record], None], sources: Callable[[], Iterator[bytes]]):
        """`sources` is the list of sources as JSON, in pieces. It is called and read in another thread."""
        self._report = report
        self._source = Source(sources)
        self._server: MetricsServer | None = None
        self._server_before: MetricsServer | None = None
        """The next one waits for it to end: it may have the same address."""
        self._file: TextFile | None = None
        self._influx: InfluxWriter | None = None
        self._ending: list[InfluxWriter] = []
        self._lost = 0
        """Points lost by writers that have ended."""

    def configure(self, config: Config) -> None:
        """Go on with what is as it was; end and begin the rest."""
        self._configure_server(config.metrics)
        if self._file and self._file.path != config.metrics.textfile:
            self._file.finish(remove=True)
            self._file = None
        if config.metrics.textfile and not self._file:
            from .textfile import TextFile

            self._file = TextFile(config.metrics.textfile, self._report)
        if self._influx and self._influx.settings != config.influxdb:
            self._influx.finish()
            self._ending.append(self._influx)
            self._influx = None
        if config.influxdb.url and not self._influx:
            from .influxdb import InfluxWriter

            self._influx = InfluxWriter(config.influxdb, self._report)

    def _configure_server(self, settings: Metrics) -> None:
        if self._server and settings.enable and self._server.matches(settings):
            return
        if self._server:
            self._server.finish()
            self._server_before = self._server
        self._server = None
        if settings.enable:
            from .metrics import MetricsServer

            self._server = MetricsServer(settings, self._source, self._report, after=self._server_before)

    @property
    def refreshing(self) -> bool:
        """Does somebody want what is measured between the ends of windows?"""
        return bool(self._server or self._file)

    @property
    def wanted(self) -> bool:
        return bool(self.refreshing or self._influx)

    def publish(self, families: Sequence[Measured], ended: float | None) -> None:
        """`ended`: when the window ended of which these are the first measurements."""
        self._source.page = Page(families)
        if self._file:
            self._file.put(families)
        if self._influx and ended is not None:
            self._influx.put(families, ended)

    @property
    def lost(self) -> int:
        """Points that InfluxDB did not get."""
        for over in [one for one in self._ending if one.ended]:
            self._ending.remove(over)
            self._lost += over.lost
        return self._lost + sum(one.lost for one in (*self._ending, self._influx) if one)

    def close(self) -> None:
        """Write what waits. Takes up to some seconds: call it in a thread."""
        parts = [part for part in (self._server, self._file, self._influx, *self._ending) if part]
        for part in parts:
            part.finish()
        for part in parts:
            part.close()
