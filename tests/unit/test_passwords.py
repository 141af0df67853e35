"""Who may read the metrics."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest

from xdpmond.errors import UsageError
from xdpmond.kinds import USERS
from xdpmond.sinks.passwords import Users, hashed

ROOT = Path(__file__).parents[2]


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_a_line_is_one_that_the_configuration_takes_and_holds_no_password():
    line, again = hashed("prometheus", "tomato"), hashed("prometheus", "tomato")
    assert USERS.parse([line]) == (line,)
    assert "tomato" not in line
    assert line != again, "the salt makes equal passwords differ"


@pytest.mark.parametrize(("name", "password"), [("", "x"), ("a:b", "x"), ("a b", "x"), ("x" * 65, "x"), ("a", "")])
def test_what_cannot_be_a_user_is_refused(name, password):
    with pytest.raises(UsageError):
        hashed(name, password)


def test_only_the_right_password_of_the_right_user_gets_in():
    users = Users([hashed("prometheus", "to:mäto"), hashed("grafana", "other")])
    assert users.check(basic("prometheus:to:mäto"))
    assert users.check(basic("grafana:other").replace("Basic", "bAsIc"))
    refused = [basic(text) for text in ("prometheus:tomato", "prometheus:other", "nobody:other", "prometheus", "")]
    for wrong in (*refused, "", "Basic ä", "Basic !", "Bearer x", f"Basic {base64.b64encode(bytes([255])).decode()}"):
        assert not users.check(wrong)
        assert not users.knows(wrong)


def test_what_was_right_is_known_without_looking_again():
    users = Users([hashed("prometheus", "tomato")])
    assert not users.knows(basic("prometheus:tomato"))
    assert users.check(basic("prometheus:tomato"))
    assert users.knows(basic("prometheus:tomato"))
    assert not users.knows(basic("prometheus:other"))


def test_guesses_are_looked_at_only_so_often_and_keep_nobody_out_who_was_in():
    now = [0.0]
    users = Users([hashed("prometheus", "tomato")], clock=lambda: now[0])
    users.check(basic("prometheus:tomato"))
    for _ in range(10):
        assert not users.overwhelmed
        users.check(basic("prometheus:guess"))
    assert users.overwhelmed
    assert users.knows(basic("prometheus:tomato"))
    now[0] += 11
    assert not users.overwhelmed


def test_the_documented_command_makes_a_line(tmp_path):
    command = [sys.executable, "-m", "xdpmond", "--hash-password", "prometheus"]
    done = subprocess.run(command, input="tomato\n", capture_output=True, text=True, cwd=ROOT, check=True)
    line = done.stdout.removesuffix("\n")
    assert Users(USERS.parse([line])).check(basic("prometheus:tomato"))
    refused = subprocess.run(command, input="\n", capture_output=True, text=True, cwd=ROOT, check=False)
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", "xdpmond: the password is empty\n")
