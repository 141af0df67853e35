"""contrib/kibana: the index template, the dashboard and the README against the lines that are logged."""

import ipaddress
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from eventfakes import DictPolicy, batch

from xdpmond import lines
from xdpmond.model import Outcome, Verdict

HERE = Path(__file__).parents[2] / "contrib" / "kibana"
TEMPLATE = json.loads((HERE / "index-template.json").read_text())
OBJECTS = [json.loads(line) for line in (HERE / "dashboard.ndjson").read_text().splitlines()]
BY_ID = {of["id"]: of for of in OBJECTS}
MADE_BY_FILEBEAT = {"network.community_id"}


def flat(document, path=""):
    """Every field with its value, by its name with dots."""
    for key, value in document.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from flat(value, here)
        else:
            yield here, value


def mapped(properties, path=""):
    for key, of in properties.items():
        here = f"{path}.{key}".lstrip(".")
        if "properties" in of:
            yield from mapped(of["properties"], here)
        else:
            yield here, of["type"]


TYPES = dict(mapped(TEMPLATE["template"]["mappings"]["properties"]))


def logged():
    """Each field with all values that it has in some events of all kinds."""
    made = batch(
        {"vlan": 7, "outcome": Outcome.DENIED_DROPPED, "packet_size": 2**32 - 1, "suppressed": 2**32 - 1, "flow_hash": 2**32 - 1},
        {"src": "2001:db8::1", "dst": "fe80::1", "has_ports": 0, "protocol": 58},
        policy=DictPolicy({"203.0.113.0/24": Verdict.DENY}),
    )
    fields = {}
    for line in lines.ecs().lines(made).splitlines():
        for name, value in flat(json.loads(line)):
            fields.setdefault(name, []).append(value)
    return fields


def holds(type, value):
    match type:
        case "date":
            return datetime.fromisoformat(value).tzinfo is not None
        case "ip":
            return bool(ipaddress.ip_address(value))
        case "long":
            return isinstance(value, int) and -(2**63) <= value < 2**63
        case "keyword":
            return all(isinstance(one, str) and len(one) <= 1024 for one in (value if isinstance(value, list) else [value]))
    return False


def test_each_field_of_a_line_is_mapped_and_no_other():
    assert set(logged()) | MADE_BY_FILEBEAT == set(TYPES)


@pytest.mark.parametrize("name", sorted(logged()))
def test_the_mapping_holds_the_values(name):
    values = [value for value in logged()[name] if value is not None]
    assert values, "an example is missing here"
    assert all(holds(TYPES[name], value) for value in values), (TYPES[name], values)


def test_the_readme_names_each_field_with_its_type():
    rows = re.findall(r"^\| (`.+?) \| ([a-z, ]+) \|", (HERE / "README.md").read_text(), re.MULTILINE)
    named = {}
    for fields, types in rows:
        names, kinds = re.findall("`([^`]+)`", fields), types.split(", ")
        named |= dict(zip(names, kinds * len(names) if len(kinds) == 1 else kinds, strict=False))
    assert {**named, "ecs.version": "keyword"} == TYPES


def strings(value):
    """All texts in it, also in JSON within JSON, with their keys."""
    if isinstance(value, dict):
        for key, of in value.items():
            if key in ("visState", "panelsJSON", "optionsJSON", "searchSourceJSON", "uiStateJSON"):
                of = json.loads(of)
            if isinstance(of, str):
                yield key, of
            else:
                yield from ((key, found) if inner == "" else (inner, found) for inner, found in strings(of))
    elif isinstance(value, list):
        for of in value:
            if isinstance(of, str):
                yield "", of
            else:
                yield from strings(of)


@pytest.mark.parametrize("made", OBJECTS, ids=lambda of: of["id"])
def test_what_is_shown_is_mapped(made):
    found = list(strings(made["attributes"]))
    fields = [text for key, text in found if key in ("field", "timeFieldName", "columns")]
    fields += [text for key, text in found if key == "sort" and text != "desc"]
    queries = [text for key, text in found if key == "query" and text]
    fields += [field for query in queries for field in re.findall(r"([@\w.]+) :", query)]
    if made["type"] != "dashboard":
        assert fields
    for field in fields:
        assert field in TYPES, f"{made['id']} shows {field}"


@pytest.mark.parametrize("made", OBJECTS, ids=lambda of: of["id"])
def test_what_is_referred_to_is_there(made):
    for reference in made["references"]:
        assert BY_ID[reference["id"]]["type"] == reference["type"]
    names = {reference["name"].rpartition(":")[2] for reference in made["references"]}
    used = {text for key, text in strings(made["attributes"]) if key in ("indexRefName", "panelRefName")}
    assert used == names


def test_each_aggregation_is_ordered_by_one_that_is_there():
    for made in OBJECTS:
        if made["type"] == "visualization":
            aggregations = json.loads(made["attributes"]["visState"])["aggs"]
            ids = [of["id"] for of in aggregations]
            assert len(ids) == len(set(ids)), made["id"]
            assert {of["params"]["orderBy"] for of in aggregations if of["type"] == "terms"} <= set(ids), made["id"]


def test_the_dashboard_shows_all_and_nothing_overlaps():
    (dashboard,) = [of for of in OBJECTS if of["type"] == "dashboard"]
    assert {reference["id"] for reference in dashboard["references"]} == set(BY_ID) - {"xdpmond", "xdpmond-events"}
    taken = set()
    for panel in json.loads(dashboard["attributes"]["panelsJSON"]):
        at = panel["gridData"]
        places = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 48 and not places & taken
        taken |= places


def test_the_names_of_the_indices_agree():
    """What Filebeat writes to, what the template is for, and what the dashboard looks at."""
    index = re.search(r'index: "([^"]+)"', (HERE / "filebeat.yml").read_text())[1]
    (pattern,) = TEMPLATE["index_patterns"]
    assert pattern.endswith("*") and index.startswith(pattern[:-1])
    assert BY_ID["xdpmond-events"]["attributes"]["title"] == pattern
