"""bpf/abi.h against its mirror: a dumper is made from the header, compiled, and every name, offset, size and number compared.

The header is read for names only; what they stand for, the compiler says. So a field, constant or enumerator that one side has and the
other lacks is a failure, and so is one that moved.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from xdpmond.kernel import abi, loader, maps
from xdpmond.model import Outcome, ProtocolClass

PRELUDE = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
#include "abi.h"
"""


def header() -> str:
    text = (loader.source_directory() / "abi.h").read_text()
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def struct_bodies() -> dict[str, str]:
    return dict(re.findall(r"struct (\w+) \{(.*?)\n\};", header(), re.DOTALL))


def fields(body: str) -> list[tuple[str, str]]:
    """(type, name) of each member."""
    found = re.findall(r"^\s*((?:struct )?\w+)\s+(\w+)(?:\[[^]]*\])?;", body, re.MULTILINE)
    assert len(found) == body.count(";"), f"not every member was understood: {body}"
    return found


def enumerators() -> dict[str, list[str]]:
    bodies = re.findall(r"enum (\w+) \{(.*?)\}", header(), re.DOTALL)
    return {name: re.findall(r"(XM_\w+)(?:\s*=\s*\w+)?\s*(?:,|$)", body.strip() + ",") for name, body in bodies}


def constants() -> list[str]:
    return [name for name, value in re.findall(r"^#define (XM_\w+)[ \t]*(.*)$", header(), re.MULTILINE)]


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says: "struct.field" offsets and sizes, enumerators and constants."""
    lines = [PRELUDE, "int main(void) {"]
    for struct, body in struct_bodies().items():
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        for _, field in fields(body):
            lines.append(f'printf("{struct}.{field} %zu\\n", offsetof(struct {struct}, {field}));')
            lines.append(f'printf("{struct}.{field}.size %zu\\n", sizeof(((struct {struct} *)0)->{field}));')
    for name in [*constants(), *(name for names in enumerators().values() for name in names)]:
        lines.append(f'printf("{name} %lld\\n", (long long){name});')
    lines.append("return 0; }")
    directory: Path = tmp_path_factory.mktemp("abi")
    (directory / "dump.c").write_text("\n".join(lines))
    command = ["gcc", "-Wall", "-Werror", f"-I{loader.source_directory()}", "-o", str(directory / "dump"), str(directory / "dump.c")]
    subprocess.run(command, check=True)
    output = subprocess.run([str(directory / "dump")], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_every_struct_is_mirrored() -> None:
    assert set(struct_bodies()) == set(abi.STRUCTS)


@pytest.mark.parametrize("struct", abi.STRUCTS)
def test_struct(struct: str, dumped: dict[str, int]) -> None:
    mirror = abi.STRUCTS[struct]
    assert mirror.names is not None and mirror.fields is not None
    members = fields(struct_bodies()[struct])
    assert [name for _, name in members] == list(mirror.names), "the fields' names or their order"
    assert mirror.itemsize == dumped[struct]
    for kind, name in members:
        dtype, offset = mirror.fields[name][:2]
        assert (offset, dtype.itemsize) == (dumped[f"{struct}.{name}"], dumped[f"{struct}.{name}.size"]), f"{struct}.{name}"
        if kind.startswith("struct "):
            assert dtype.base == abi.STRUCTS[kind.removeprefix("struct ")], f"{struct}.{name}"
        else:
            assert dtype.base.kind == "u", f"{struct}.{name} is unsigned in C"
            assert dtype.base.itemsize == {"u8": 1, "u16": 2, "u32": 4, "u64": 8}[kind], f"{struct}.{name}"


def test_no_struct_has_hidden_padding(dumped: dict[str, int]) -> None:
    """Written-out padding only: otherwise the kernel could hand over bytes that nobody set."""
    for struct, body in struct_bodies().items():
        end = 0
        for _, name in fields(body):
            assert dumped[f"{struct}.{name}"] == end, f"a hole before {struct}.{name}"
            end += dumped[f"{struct}.{name}.size"]
        assert end == dumped[struct], f"a hole at the end of {struct}"


def test_every_constant(dumped: dict[str, int]) -> None:
    """Constants of the header and enumerators that end an enum (their number is a size) have the same name without XM_ in the mirror."""
    names = [name for name in constants() if name != "XDPMOND_ABI_H"]
    names += ["XM_CLASSES", "XM_FAMILIES", "XM_OUTCOMES", "XM_ANOMALIES"]
    for name in names:
        assert getattr(abi, name.removeprefix("XM_")) == dumped[name], name
    mirrored = {name for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)}
    enumerated = {name.removeprefix("XM_") for group in enumerators().values() for name in group}
    assert mirrored <= {name.removeprefix("XM_") for name in names} | enumerated, "a constant that the header does not have"


def check_enum(group: str, prefix: str, size: str, mirror: dict[str, int], dumped: dict[str, int]) -> None:
    names = [name for name in enumerators()[group] if name != size]
    assert {name.removeprefix(prefix): dumped[name] for name in names} == mirror


def test_anomalies(dumped: dict[str, int]) -> None:
    check_enum("xm_anomaly", "XM_ANOMALY_", "XM_ANOMALIES", {anomaly.name: anomaly.value for anomaly in abi.Anomaly}, dumped)


def test_protocol_classes(dumped: dict[str, int]) -> None:
    check_enum("xm_class", "XM_CLASS_", "XM_CLASSES", {value.name: value.value for value in ProtocolClass}, dumped)
    assert dumped["XM_CLASSES"] == len(ProtocolClass)


def test_outcomes(dumped: dict[str, int]) -> None:
    check_enum("xm_outcome", "XM_", "XM_OUTCOMES", {value.name: value.value for value in Outcome}, dumped)
    assert dumped["XM_OUTCOMES"] >= len(Outcome)


def test_families(dumped: dict[str, int]) -> None:
    names = [name for name in enumerators()["xm_family"] if name != "XM_FAMILIES"]
    by_number = {dumped[name]: name.removeprefix("XM_FAMILY_") for name in names}
    assert by_number == {number: family.name for number, family in enumerate(maps.FAMILY_FROM_ABI)}
    assert {family.name: number for family, number in maps.FAMILY_TO_ABI.items()} == {
        name: number for number, name in by_number.items() if name != "OTHER"
    }


def test_codes(dumped: dict[str, int]) -> None:
    mirror = {name.removeprefix("CODE_"): number for name, number in vars(abi).items() if name.startswith("CODE_")}
    check_enum("xm_code", "XM_CODE_", "", mirror, dumped)


def test_verdicts(dumped: dict[str, int]) -> None:
    mirror = {verdict.name: number for verdict, number in maps.VERDICT_TO_ABI.items()}
    check_enum("xm_verdict", "XM_VERDICT_", "", mirror, dumped)
