"""Who may import whom. The arrows go one way, app -> {kernel, bus, sinks} -> service -> model, and adapters never import each other.

Imports inside functions count as well: this is about what a room knows of, not about when it is loaded. What has to be lazy is said apart.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "xdpmond"

VALUES = {"model", "errors", "units"}
"""Free of the kernel, of D-Bus and of each other's rooms; for everybody."""

ROOMS = {
    "": set(),
    "errors": set(),
    "tomllines": set(),
    "memory": set(),
    "units": {"errors"},
    "model": {"errors"},
    "rows": {"model"},
    "ports": {"model", "rows"},
    "flowrows": {"model", "rows"},
    "sketches": {"model"},
    "flows": {"rows", "flowrows"},
    "ipfix": {"model", "flows"},
    "flowanswers": VALUES | {"rows", "flows", "answers"},
    "kinds": VALUES,
    "config": VALUES | {"kinds", "prefixes"},
    "configfiles": VALUES | {"config", "kinds", "tomllines", "prefixes", "prefixfile"},
    "configdoc": {"config", "kinds"},
    "metricsdoc": {"measures"},
    "policy": VALUES | {"prefixes", "layers"},
    "state": VALUES | {"prefixes", "layers", "policy"},
    "prefixes": VALUES,
    "prefixfile": VALUES | {"prefixes"},
    "layers": VALUES | {"prefixes"},
    "batch": {"model"},
    "attribution": {"model", "policy"},
    "kernel": VALUES | {"config", "rows", "flowrows", "sketches", "batch"},
    "windows": VALUES | {"config", "rows", "ports", "flowrows", "sketches"},
    "detect": VALUES | {"config", "rows"},
    "messages": {"model"},
    "interfaces": VALUES | {"config", "messages"},
    "modes": VALUES | {"config"},
    "lines": {"model", "batch", "messages"},
    "feeds": {"model", "batch", "messages", "lines"},
    "names": VALUES | {"config"},
    "documents": VALUES | {"config", "policy", "windows", "rows", "ports", "names", "interfaces"},
    "measures": VALUES | {"config", "interfaces", "messages", "ports", "rows", "windows"},
    "answers": VALUES | {"config", "policy", "windows", "detect", "rows", "ports", "names", "modes", "documents"},
    "service": VALUES
    | {"config", "policy", "windows", "detect", "rows", "state", "messages", "interfaces", "modes", "feeds", "documents", "answers"}
    | {"prefixes", "prefixfile", "memory", "ports", "names", "measures", "flows", "flowanswers", ""},
    "systemd": set(),
    "sinks": VALUES | {"config", "messages", "batch", "lines", "flows", "ipfix", "measures"},
    "bus": VALUES | {"service"},
    "cli": VALUES | {""},
}
"""Room -> the rooms that it may import beside itself; "" is the package itself, which holds the version."""

EVERYTHING_BUT_CLI = set(ROOMS) - {"cli"}
COMPOSITION = {"app": EVERYTHING_BUT_CLI, "__main__": {"app"}}
"""Where the parts are put together."""

LIBRARIES = {
    "bcc": {"kernel/compile.py"},
    "dbus_next": {"bus/", "cli/client.py"},
    "pyroute2": {"kernel/"},
    "numpy": {
        "prefixes.py",
        "layers.py",
        "policy.py",
        "state.py",
        "kernel/",
        "sinks/",
        "rows.py",
        "measures.py",
        "ports.py",
        "flowrows.py",
        "sketches.py",
        "flows.py",
        "ipfix.py",
        "flowanswers.py",
        "batch.py",
        "lines.py",
        "attribution.py",
        "feeds.py",
        "app.py",
        "windows.py",
        "detect/",
        "service.py",
        "documents.py",
        "answers.py",
    },
    "systemd": {"sinks/", "systemd.py"},
    "prometheus_client": {"sinks/"},
    "maxminddb": {"names.py"},
    "rich": {"cli/"},
}
"""Library -> where alone it may be imported. What is not named here is not a dependency of ours."""

LAZY = {"bcc", "rich", "prometheus_client", "maxminddb"}
"""Never imported by merely importing the module: the one maps LLVM, the other may be absent."""

SOURCES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
STANDARD = sys.stdlib_module_names


def room_of(source):
    """The module, or the package directly under ours, that a file belongs to."""
    return "" if source == "__init__.py" else source.split("/")[0].removesuffix(".py")


def imports(source):
    """Every import in a file as (absolute dotted name, whether at the top level)."""
    tree = ast.parse((PACKAGE / source).read_text(), source)
    deferred = {node for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(f)}
    package = ["xdpmond", *Path(source).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node not in deferred


def imported_rooms(source):
    known = {room_of(other) for other in SOURCES} | set(ROOMS)
    for name, _ in imports(source):
        top, *rest = name.split(".")
        if top == "xdpmond":
            yield rest[0] if rest and rest[0] in known else ""


@pytest.mark.parametrize("source", SOURCES)
def test_rooms(source):
    room = room_of(source)
    allowed = {**ROOMS, **COMPOSITION}
    assert room in allowed, f"{room} is a new room: put it into the table and into ARCHITECTURE.md"
    outside = set(imported_rooms(source)) - {room}
    assert outside <= allowed[room], f"{source} imports {sorted(outside - allowed[room])}"


@pytest.mark.parametrize("source", SOURCES)
def test_libraries(source):
    for name, at_top in imports(source):
        library = name.split(".")[0]
        if library in STANDARD or library == "xdpmond":
            continue
        assert library in LIBRARIES, f"{source} imports {library}, which is no dependency of ours"
        assert any(source == place or (place.endswith("/") and source.startswith(place)) for place in LIBRARIES[library]), (
            f"{source} imports {library}, which is for {sorted(LIBRARIES[library])}"
        )
        assert not (library in LAZY and at_top), f"{source} imports {library} at its top"


def test_the_reader_of_imports_sees_each_form(tmp_path, monkeypatch):
    """Else the tests above would pass on whatever they overlook."""
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus" / "x.py").write_text(
        "import bcc.table\nfrom dbus_next import a\nfrom . import y\nfrom .. import kernel\nfrom ..kernel import maps\nfrom .y import z\n"
        "import xdpmond.cli.main\nasync def f():\n    from ..policy import Policy\n    import rich\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert list(imports("bus/x.py")) == [
        ("bcc.table", True),
        ("dbus_next.a", True),
        ("xdpmond.bus.y", True),
        ("xdpmond.kernel", True),
        ("xdpmond.kernel.maps", True),
        ("xdpmond.bus.y.z", True),
        ("xdpmond.cli.main", True),
        ("xdpmond.policy.Policy", False),
        ("rich", False),
    ]
    monkeypatch.setitem(globals(), "SOURCES", ["kernel/maps.py", "bus/y.py", "policy.py", "cli/main.py"])
    assert set(imported_rooms("bus/x.py")) == {"kernel", "bus", "policy", "cli"}


def test_what_the_daemon_imports_when_it_starts():
    """Nothing that can be imported while the compiler works: pyroute2 takes longer than all the rest."""
    late = ("pyroute2", "dbus_next", *sorted(LAZY))
    code = f"import sys, xdpmond.app; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
