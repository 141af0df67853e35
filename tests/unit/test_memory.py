"""That memory goes back to the system, measured in a process of its own."""

import subprocess
import sys

MEASURED = """
import threading
import numpy as np
from xdpmond import memory

def private():
    with open("/proc/self/smaps_rollup") as rows:
        return sum(int(row.split()[1]) for row in rows if row.startswith("Private_"))

def work():
    # Arrays of a size that the heap of this thread keeps, with one left at the end that holds all the others up.
    kept = [np.ones(1 << 17) for _ in range(100)]
    last = np.ones(1000)
    del kept
    return last

memory.configure()
before = private()
last = []
thread = threading.Thread(target=lambda: last.append(work()))
thread.start()
thread.join()
grown = private()
memory.give_back()
print(before, grown, private())
"""


def test_what_is_free_is_given_back():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    before, grown, after = map(int, done.stdout.split())
    assert grown > before + 50_000, "the test shows nothing: there is nothing to give back"
    assert after < before + 10_000


HUGE = """
from xdpmond import memory

def huge():
    with open("/proc/self/status") as rows:
        return next(row.split()[1] for row in rows if row.startswith("THP_enabled:"))

before = huge()
memory.configure()
print(before, huge())
"""


def test_pages_have_the_usual_size():
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]
