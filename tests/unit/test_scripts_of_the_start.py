"""A process runs the Lua scripts that it started with, whatever an in-place deployment writes over them."""

import subprocess
import sys

READS_NOTHING = """
import pathlib, sys
import aiscale.wire.scripts as wire, apps.spend.scripts as spend

def refuse(event, args):
    if event == "open" and str(args[0]).endswith(".lua"):
        raise AssertionError(f"read after the start: {args[0]}")

sys.addaudithook(refuse)
names = [name for name in wire.TEXTS if name != "queue"]
assert {"claim", "enqueue", "finish"} <= set(names) and {"admit", "settle"} <= set(spend.TEXTS)
assert all(wire.read_script(name) and wire.digest_script(name) for name in names)
assert all(spend.get_script(name).digest for name in spend.TEXTS)
try:
    open(next(pathlib.Path(spend.__file__).parent.glob("lua/*.lua")))
except AssertionError:
    print("no file was read")
"""


def test_scripts_are_read_when_the_process_begins() -> None:
    ran = subprocess.run([sys.executable, "-c", READS_NOTHING], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "no file was read\n", ran.stderr
