"""The metrics over HTTP: what readers get, what bad readers get, and that these keep nobody waiting."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import queue
import socket
import ssl
import stat
import subprocess
import time

import pytest

from xdpmond.config import Metrics
from xdpmond.errors import ConfigError
from xdpmond.measures import Kind, Measured
from xdpmond.messages import Message
from xdpmond.model import Listen
from xdpmond.sinks import metrics as server_module
from xdpmond.sinks.exposition import Page, Source, text
from xdpmond.sinks.metrics import MOST_CONNECTIONS, MetricsServer, require_servable, require_within
from xdpmond.sinks.passwords import hashed

FAMILIES = [
    Measured("xdpmond_packets_total", Kind.COUNTER, "Packets.", ("interface",), True, ((("eth0",), 5), (('a"\\\n',), 1 << 60))),
    Measured("xdpmond_window_seconds", Kind.GAUGE, "Seconds.", (), False, (((), 60.5),)),
]
LIST = [{"ip": "192.0.2.1", "network": "IPv4", "transport": "TCP", "port": 22}]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve():
    """Servers that end with the test."""
    begun = []

    def begin(settings=None, *, families=FAMILIES, sources=lambda: iter([json.dumps(LIST).encode()]), ready=True, after=None, **more):
        settings = settings or {}
        listen = settings.pop("listen", None) or Listen("127.0.0.1", free_port())
        source = Source(sources)
        source.page = Page(families) if families is not None else None
        records = queue.Queue()
        server = MetricsServer(Metrics(enable=True, listen=listen, **settings), source, records.put, after=after, **more)
        server.records = records
        begun.append(server)
        if after:
            after._thread.join(10)  # which the new one brings about
        if ready:
            connect(server).close()
        return server

    yield begin
    for server in begun:
        server.close()
        assert not server._thread.is_alive()
        left = [server.records.get().text for _ in range(server.records.qsize())]
        assert not [text for text in left if "Traceback" in text or "exception" in text], left


def connect(server):
    """A connection, as soon as there is a server."""
    end = time.monotonic() + 10
    of = server.settings.listen
    while True:
        family = socket.AF_UNIX if of.path else socket.AF_INET6 if ":" in of.host else socket.AF_INET
        client = socket.socket(family)
        client.settimeout(10)
        try:
            client.connect(of.path or (of.host, of.port))
            return client
        except OSError:
            client.close()
            assert time.monotonic() < end, "nobody listens"


def exchange(server, request, context=None):
    """Send octets, and read to the end."""
    with connect(server) as client:
        if context:
            client = context.wrap_socket(client, server_hostname="metrics.test")
        client.sendall(request)
        received = b""
        while piece := client.recv(65536):
            received += piece
        return received


def ask(server, path="/metrics", method="GET", context=None, **headers):
    """Status, headers and body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]
    return parse(exchange(server, "\r\n".join(lines).encode(), context))


def parse(received):
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


def test_the_text_format(serve):
    status, headers, body = ask(serve())
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert int(headers["Content-Length"]) == len(body)
    assert body == text(FAMILIES)
    assert 'xdpmond_packets_total{interface="a\\"\\\\\\n"} 1.152921504606847e+18' in body.decode()
    assert "xdpmond_window_seconds 60.5" in body.decode()


def test_openmetrics_and_compression_as_a_reader_asks(serve):
    server = serve()
    _, headers, body = ask(server, accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5", accept_encoding="gzip")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body).endswith(b"# EOF\n")
    assert ask(server, "/metrics?name[]=xdpmond_window_seconds")[2].count(b"\nxdpmond_") == 1


def test_only_get_and_head_and_only_what_there_is(serve):
    server = serve()
    status, headers, body = ask(server, method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(text(FAMILIES))
    assert ask(server, "/")[0] == ask(server, "/list")[0] == ask(server, "/metrics/")[0] == 404
    status, headers, _ = ask(server, method="POST", content_length="3")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert ask(server, "/list", method="POST")[0] == 404


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"GET http://x/metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nx: " + b"y" * 70000, 431),
        (b"GET /" + b"y" * 70000, 431),
        (b"GET /metrics HTTP/1.1\r\nauthorization: \xff\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\ncontent-length: 9999999\r\n\r\n" + b"x" * 500000, 405),
    ],
)
def test_what_is_no_request_is_told_so_and_never_read_whole(serve, request_, status):
    server = serve()
    assert parse(exchange(server, request_))[0] == status
    assert ask(server)[0] == 200
    assert server.records.empty()


def test_before_the_first_measurement_a_reader_is_told_to_come_back(serve):
    assert ask(serve(families=None))[0] == 503


def test_the_list_of_sources_is_there_on_request(serve):
    status, headers, body = ask(serve({"list": True}), "/list")
    assert (status, headers["Content-Type"], json.loads(body)) == (200, "application/json", LIST)


def test_a_long_list_reaches_its_reader_whole(serve):
    pieces = [b"x" * 100_000] * 100
    assert len(ask(serve({"list": True}, sources=lambda: iter(pieces)), "/list")[2]) == 10_000_000


def test_whoever_says_nothing_is_let_go_and_holds_up_nobody(serve):
    server = serve(patience=0.5)
    with connect(server) as silent, connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nx: ")
        assert ask(server)[0] == 200
        for client in (silent, slow):
            assert client.recv(1) == b""


def test_whoever_sends_a_letter_at_a_time_is_let_go_too(serve):
    server = serve(patience=0.5)
    with connect(server) as slow:
        slow.settimeout(0.05)
        end = time.monotonic() + 10
        while True:
            try:
                slow.sendall(b"G")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                assert time.monotonic() < end
            except OSError:
                break


def test_whoever_does_not_take_the_answer_is_let_go(serve):
    server = serve({"list": True}, sources=lambda: iter(lambda: b"x" * 100_000, None), patience=0.5)
    with pytest.MonkeyPatch.context() as patch, connect(server) as idle:
        patch.setattr(server_module, "LIST_PATIENCE", 0.5)
        idle.sendall(b"GET /list HTTP/1.1\r\n\r\n")
        idle.recv(1)
        end = time.monotonic() + 10
        while ask(server, "/list")[0] == 503:
            assert time.monotonic() < end


def test_there_are_so_many_connections_and_the_oldest_makes_room(serve):
    server = serve(patience=60)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(MOST_CONNECTIONS + 8)]
        assert ask(server)[0] == 200
        for client in silent[:8]:
            assert client.recv(1) == b""
        silent[-1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert silent[-1].recv(12) == b"HTTP/1.1 200"


def test_an_address_in_use_is_told_once_and_had_when_it_is_free(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = serve({"listen": Listen("127.0.0.1", port)}, ready=False, retry=0.01)
        told = server.records.get(timeout=10)
        assert told.message is Message.METRICS_PROBLEM
        assert told.text == f"metrics cannot be served on 127.0.0.1:{port}: Address already in use; it is tried again every 0.01 s"
    assert server.records.get(timeout=10).text == f"metrics are served on 127.0.0.1:{port} now"
    assert ask(server)[0] == 200
    assert server.records.empty()


def test_a_server_that_cannot_listen_ends_when_it_is_told_to(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = serve({"listen": Listen("127.0.0.1", other.getsockname()[1])}, ready=False, retry=3600)
        server.records.get(timeout=10)
        server.close()
        assert not server._thread.is_alive()


def test_the_next_server_takes_the_same_address(serve):
    first = serve()
    second = serve({"listen": first.settings.listen, "list": True}, after=first)
    assert ask(second, "/list")[0] == 200
    assert second.records.empty()


def test_ipv6(serve):
    assert ask(serve({"listen": Listen("::1", free_port())}))[0] == 200


def test_a_unix_socket_is_for_the_group_and_goes_with_the_server(serve, tmp_path):
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:  # by a process that was killed
        left.bind(str(path))
    server = serve({"listen": Listen(path=str(path))})
    assert ask(server)[0] == 200
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    server.close()
    assert not path.exists()


def test_a_socket_of_somebody_who_listens_and_a_file_are_let_be(serve, tmp_path):
    for name, make in (("live", lambda path: other.bind(path) or other.listen()), ("file", lambda path: open(path, "w").close())):
        with socket.socket(socket.AF_UNIX) as other:
            path = str(tmp_path / name)
            make(path)
            server = serve({"listen": Listen(path=path)}, ready=False, retry=3600)
            assert "Address already in use" in server.records.get(timeout=10).text
            assert os.path.exists(path)


USER = hashed("prometheus", "tomato")


def authorization(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_a_name_and_a_password_are_wanted_for_everything(serve):
    server = serve({"users": (USER,), "list": True})
    for path in ("/metrics", "/list", "/nothing"):
        status, headers, _ = ask(server, path)
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="xdpmond"')
    assert ask(server, authorization=authorization("prometheus:tomato"))[0] == 200


def test_whoever_guesses_is_told_to_wait_and_keeps_nobody_out(serve):
    server = serve({"users": (USER,)})
    right, wrong = authorization("prometheus:tomato"), authorization("prometheus:guess")
    assert ask(server, authorization=right)[0] == 200
    assert [ask(server, authorization=wrong)[0] for _ in range(11)] == [401] * 10 + [429]
    assert ask(server, authorization=right)[0] == 200


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Makes certificates for metrics.test, each with its key."""
    directory = tmp_path_factory.mktemp("tls")

    def make(name):
        certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
                        "/CN=metrics.test", "-addext", "subjectAltName=DNS:metrics.test", "-keyout", key, "-out", certificate],
                       check=True, capture_output=True)  # fmt: skip
        return str(certificate), str(key)

    return make


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_tls(serve, pair):
    certificate, key = pair("first")
    server = serve({"certificate": certificate, "key": key, "users": (USER,)})
    context = ssl.create_default_context(cafile=certificate)
    assert ask(server, context=context)[0] == 401
    status, _, body = ask(server, context=context, authorization=authorization("prometheus:tomato"))
    assert (status, body) == (200, text(FAMILIES))
    with pytest.raises((OSError, http.client.HTTPException, IndexError)):
        ask(server)
    old = ssl.create_default_context(cafile=certificate)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):
        ask(server, context=old)
    assert server.records.empty()


@pytest.mark.parametrize("pieces", range(5))
def test_over_tls_an_answer_without_a_length_ends(serve, pair, pieces):
    certificate, key = pair("list")
    # Should only the limit end it, the test would have lost its patience by then.
    server = serve({"certificate": certificate, "key": key, "list": True}, sources=lambda: iter([b"x" * 100_000] * pieces), patience=3600)
    assert len(ask(server, "/list", context=ssl.create_default_context(cafile=certificate))[2]) == 100_000 * pieces


def test_a_renewed_certificate_is_noticed(serve, pair):
    certificate, key = pair("renewed")
    server = serve({"certificate": certificate, "key": key})
    assert server.matches(server.settings)
    pair("renewed")
    assert not server.matches(server.settings)
    next_ = serve({"certificate": certificate, "key": key, "listen": server.settings.listen}, after=server)
    assert ask(next_, context=ssl.create_default_context(cafile=certificate))[0] == 200


def test_a_handshake_that_is_not_ended_holds_up_nobody(serve, pair):
    certificate, key = pair("slow")
    server = serve({"certificate": certificate, "key": key}, patience=0.5)
    with connect(server) as silent:
        assert ask(server, context=ssl.create_default_context(cafile=certificate))[0] == 200
        assert silent.recv(1) == b""


def test_what_cannot_be_served_is_refused_before(pair, tmp_path):
    certificate, key = pair("a")
    other = pair("b")[1]
    (tmp_path / "text").write_text("no key")
    require_servable(Metrics(enable=True, certificate=certificate, key=key))
    for pair_, message in (
        ((certificate, "/nowhere"), "metrics.key: /nowhere: No such file or directory"),
        ((certificate, other), "are no pair for TLS"),
        ((certificate, str(tmp_path / "text")), "are no pair for TLS"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_servable(Metrics(enable=True, certificate=pair_[0], key=pair_[1]))
    with pytest.raises(ConfigError, match="there is no directory /nowhere"):
        require_servable(Metrics(enable=True, listen=Listen(path="/nowhere/socket")))


def test_a_socket_where_the_service_may_not_write_is_refused_whoever_asks():
    require_within(Metrics(enable=True, listen=Listen(path="/run/xdpmond/metrics.sock")), ["/run/xdpmond"])
    require_within(Metrics(enable=True), [])
    with pytest.raises(ConfigError) as refused:
        require_within(Metrics(enable=True, listen=Listen(path="/run/metrics.sock")), ["/run/xdpmond"])
    assert "/run/metrics.sock cannot be made" in str(refused.value) and "ReadWritePaths=" in str(refused.value)


def test_a_certificate_that_has_gone_is_told_and_tried_again(serve, pair):
    certificate, key = pair("gone")
    os.rename(key, f"{key}.away")
    server = serve({"certificate": certificate, "key": key}, ready=False, retry=0.01)
    assert f"{key}: No such file or directory" in server.records.get(timeout=10).text
    os.rename(f"{key}.away", key)
    assert "are served" in server.records.get(timeout=10).text
    assert ask(server, context=ssl.create_default_context(cafile=certificate))[0] == 200


def test_without_the_library_it_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        require_servable(Metrics(enable=True))
    assert str(refused.value) == (
        "metrics.enable needs Prometheus's client library, which is not installed (apt install python3-prometheus-client)"
    )


def test_an_error_of_ours_is_told_once_and_ends_one_connection(serve):
    def sources():
        raise ValueError("odd")

    server = serve({"list": True}, sources=sources)
    for _ in range(3):
        assert exchange(server, b"GET /list HTTP/1.1\r\n\r\n") == b""
    assert ask(server)[0] == 200
    assert "ValueError: odd" in server.records.get(timeout=10).text
    assert server.records.empty()
