"""The package, the wheel and the unit as files: what can be said of them without a machine."""

from __future__ import annotations

import re
import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from . import build
from .conftest import Packages, version

ROOT = build.ROOT


def test_lintian_has_nothing_to_say(packages: Packages) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", "--display-level", ">=warning", str(packages.changes)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_each_lintian_override_has_its_reason() -> None:
    for path in ROOT.glob("debian/**/*lintian-overrides"):
        lines = path.read_text().splitlines()
        bare = [line for line, before in zip(lines, ["", *lines], strict=False) if line and line[0] != "#" and not before.startswith("#")]
        assert not bare, f"{path}: {bare}"


def contents(deb: Path) -> dict[str, str]:
    """Path to mode."""
    listed = subprocess.run(["dpkg-deb", "--contents", str(deb)], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 5) for line in listed.splitlines()]
    return {row[5].removeprefix("."): row[0] for row in rows}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/xdpmond/xdpmond.toml",
        "/etc/xdpmond/xdpmond.toml.d/",
        "/lib/systemd/system/xdpmond.service",
        "/usr/bin/xdpmonctl",
        "/usr/bin/xdpmond",
        "/usr/lib/systemd/catalog/xdpmond.catalog",
        "/usr/lib/sysusers.d/xdpmond.conf",
        "/usr/lib/tmpfiles.d/xdpmond.conf",
        "/usr/lib/xdpmond/xdpmond.toml",
        "/usr/share/bash-completion/completions/xdpmonctl",
        "/usr/share/dbus-1/interfaces/org.xdpmond1.Manager.xml",
        "/usr/share/dbus-1/system.d/org.xdpmond1.conf",
        "/usr/share/doc/xdpmond/examples/grafana/xdpmond.json",
        "/usr/share/doc/xdpmond/examples/kibana/dashboard.ndjson",
        "/usr/share/doc/xdpmond/examples/logrotate/xdpmond",
        "/usr/share/doc/xdpmond/examples/prometheus/xdpmond.rules.yml",
        "/usr/share/doc/xdpmond/examples/strict.toml",
        "/usr/share/fish/vendor_completions.d/xdpmonctl.fish",
        "/usr/share/man/man1/xdpmonctl.1.gz",
        "/usr/share/man/man5/org.xdpmond1.5.gz",
        "/usr/share/man/man5/xdpmond.toml.5.gz",
        "/usr/share/man/man8/xdpmond.8.gz",
        "/usr/share/polkit-1/actions/org.xdpmond1.policy",
        "/usr/share/zsh/vendor-completions/_xdpmonctl",
    ],
)
def test_the_package_holds(packages: Packages, path: str) -> None:
    assert path in contents(packages.current)


def test_the_package_holds_every_kernel_source_and_module(packages: Packages) -> None:
    held = contents(packages.current)
    for source in [*ROOT.glob("bpf/**/*.[ch]")]:
        assert f"/usr/share/xdpmond/{source.relative_to(ROOT)}" in held
    for module in ROOT.glob("xdpmond/**/*.py"):
        assert f"/usr/lib/python3/dist-packages/{module.relative_to(ROOT)}" in held
    assert not [path for path in held if "__pycache__" in path or "/tests" in path]


def test_bus_activation_is_not_offered(packages: Packages) -> None:
    assert not [path for path in contents(packages.current) if "system-services" in path]


def test_module_and_changelog_have_one_version() -> None:
    newest = re.match(r"xdpmond \(([^)]+)\)", (ROOT / "debian/changelog").read_text())
    assert newest and newest[1] == version()


def test_unit_exposure_is_two_at_most() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", "systemd/xdpmond.service"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    base = tmp_path_factory.mktemp("wheel")
    build.sources(base / "xdpmond")
    code = "import sys, setuptools.build_meta; print(setuptools.build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(["/usr/bin/python3", "-c", code, str(base)], cwd=base / "xdpmond", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(base / done.stdout.splitlines()[-1])


def test_the_wheel_needs_only_what_pypi_has(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    needed = {re.split(r"[^A-Za-z0-9._-]", line)[0] for line in metadata.get_all("Requires-Dist", [])}
    assert needed == {"dbus-next", "numpy", "pyroute2", "rich"}
    assert metadata["Version"] == version()


def test_the_wheel_starts_the_client(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    command = ["/usr/bin/python3", "-m", "xdpmond.cli", "--version"]
    done = subprocess.run(command, cwd="/", env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout == f"xdpmonctl {version()}\n"
    points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "xdpmond = xdpmond.app:main" in wheel.read(points).decode()
    assert [name for name in wheel.namelist() if name.endswith("share/xdpmond/bpf/xdpmond.bpf.c")]
