"""Lines of values in TOML files."""

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from xdpmond.tomllines import locate

DOCUMENT = '''\
# comment with [brackets] and "quotes
mode = "monitor"   # 2
allow = [          # 3
    "10.0.0.0/8",  # 4, ] not the end
    { prefix = "192.0.2.0/24", reason = "a # b ] } 'c'" },
    # nothing here
    'literal \\', "two on a line",
]
numbers = [1.5, 0x1f, 1979-05-27 07:32:00, inf, true]
text = """
one ]
two \\""" still "quoted" """""
after.dotted."quoted.key" = 13
literal = \'\'\'
[not.a.table]
it's here\'\'\'
nested = [[1], [2, [
    3]]]

[journal]
events_per_minute = 5
[interfaces."eth0.100"]
mode = "enforce"
[[deny]]
prefix = "::1"
[[deny]]
prefix = "::2"
[deny.more]
x = 1
'''


def test_each_kind_of_value():
    tomllib.loads(DOCUMENT)
    lines = locate(DOCUMENT)
    assert {path: lines[path] for path in EXPECTED} == EXPECTED
    assert set(lines) == set(paths(tomllib.loads(DOCUMENT)))


EXPECTED = {
    ("mode",): 2,
    ("allow",): 3,
    ("allow", 0): 4,
    ("allow", 1): 5,
    ("allow", 1, "reason"): 5,
    ("allow", 2): 7,
    ("allow", 3): 7,
    ("numbers", 4): 9,
    ("text",): 10,
    ("after", "dotted", "quoted.key"): 13,
    ("literal",): 14,
    ("nested", 1, 1, 0): 18,
    ("journal",): 20,
    ("journal", "events_per_minute"): 21,
    ("interfaces",): 22,
    ("interfaces", "eth0.100"): 22,
    ("interfaces", "eth0.100", "mode"): 23,
    ("deny",): 24,
    ("deny", 0): 24,
    ("deny", 0, "prefix"): 25,
    ("deny", 1, "prefix"): 27,
    ("deny", 1, "more", "x"): 29,
}


def paths(value, path=()):
    """Every key and index of a parsed document."""
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


FRAGMENTS = [
    'a = 1\n', '"b c" = "x # ]"\n', "c = [\n1,\n[2, 3],\n]\n", "[t]\n", "[[u]]\n", "[t.v]\n", "[u.w]\n", 'd.e = """\n\\"""\n"""\n',
    "f = '''\n'\n'''\n", "g = {h = 1, i.j = [{}, {k = 2}]}\n", "# [x]\n", "\n", "l = 07:32:00.5 # ,\r\n", "  m\t=\t[ ] \n",
    "n = [ # c\n 'o' # d\n, ]\n", "'' = 1.5e3\n",
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_what_tomllib_finds_is_found(text):
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = locate(text)
    assert set(lines) == set(paths(document))
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())


@given(st.text())
def test_text_that_is_no_toml_does_no_harm(text):
    locate(text)
