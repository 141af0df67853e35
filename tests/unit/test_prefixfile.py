"""Files of prefixes, as another program hands them in."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.errors import PrefixError, UsageError
from xdpmond.model import Prefix
from xdpmond.prefixfile import read_list, read_prefixes


def read(text, most=100):
    fd = os.memfd_create("prefixes")
    try:
        os.write(fd, text)
        return [str(prefix) for prefix in read_prefixes(fd, most)]  # by family, length and address
    finally:
        os.close(fd)


def test_comments_blanks_and_repetitions():
    assert read(b"# all\n\n 10.0.0.0/8 # one\r\n::1\t\n10.0.0.0/8") == ["10.0.0.0/8", "::1/128"]


def test_many_lines_over_several_reads():
    wanted = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32" for n in range(100_000)]
    assert read("\n".join(wanted).encode(), 100_000) == wanted


@given(st.lists(st.sampled_from(["10.0.0.0/8", "::1", "# x", "", "192.0.2.1 # y"])), st.sampled_from(["\n", "\r\n"]))
def test_the_lines_one_by_one(lines, end):
    wanted = {str(Prefix.parse(line.split("#")[0].strip())) for line in lines if line.split("#")[0].strip()}
    if wanted:
        found = read(end.join(lines).encode())
        assert set(found) == wanted
        assert len(found) == len(wanted)
    else:
        with pytest.raises(UsageError, match="no prefix"):
            read(end.join(lines).encode())


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (b"10.0.0.0/8\n10.0.0.1/8\n", PrefixError, "line 2: .*host bits"),
        (b"\x00\n", PrefixError, "line 1"),
        (b"::1\n" + b"x" * (3 << 20), UsageError, "line 2 is longer"),
        (b"", UsageError, "no prefix"),
        (b"::1\n::2\n::3\n", UsageError, "line 3: more than 2"),
    ],
)
def test_what_is_refused(text, error, says):
    with pytest.raises(error, match=says):
        read(text, 2)


def test_only_regular_files_are_read():
    reader, writer = os.pipe()
    try:
        with pytest.raises(UsageError, match="regular"):
            read_prefixes(reader, 1)  # its end never comes
    finally:
        os.close(reader)
        os.close(writer)


def test_a_file_that_cannot_be_read(tmp_path):
    fd = os.open(tmp_path / "list", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(UsageError, match="Bad file descriptor"):
            read_prefixes(fd, 1)
    finally:
        os.close(fd)


def test_a_list_that_the_configuration_names(tmp_path):
    path = str(tmp_path / "list")
    (tmp_path / "list").write_bytes(b"10.0.0.0/8\n\n10.0.0.0/8\n")
    found = read_list(path, 2)
    assert [(str(prefix), found.line_of(prefix)) for prefix in found] == [("10.0.0.0/8", 3)]
    (tmp_path / "list").write_bytes(b"")
    assert len(read_list(path, 2)) == 0
    (tmp_path / "list").write_bytes(b"::1\n10.1\n")
    with pytest.raises(PrefixError, match=f"^{path}:2: '10.1' is not an IP prefix"):
        read_list(path, 2)
    (tmp_path / "list").write_bytes(b"::1\n::2\n::3\n")
    with pytest.raises(UsageError, match=f"^{path}: more than 2 prefixes"):
        read_list(path, 2)


def test_a_list_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"/list: No such file or directory"):
        read_list(str(tmp_path / "list"), 2)
    with pytest.raises(UsageError, match="null byte"):
        read_list("/\0", 2)
    os.mkfifo(tmp_path / "list")
    with pytest.raises(UsageError, match="regular"):
        read_list(str(tmp_path / "list"), 2)
