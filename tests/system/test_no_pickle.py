"""Nothing that comes from the network or from disk is ever unpickled: watched in the processes of a whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import Cluster

# Python runs it at the start of every process that has its folder on the path. `pickle.find_class` is what an
# unpickler raises before it touches a name; the doors themselves are watched too, as plain data needs no names.
WATCH = """\
import _pickle, os, pickle, sys, traceback

def say(what):
    with open("unpickled.txt", "a") as file:
        file.write(f"{sys.argv} {what}\\n{''.join(traceback.format_stack(limit=6))}\\n")

def hook(event, arguments):
    if event == "pickle.find_class":
        say(f"{event} {arguments}")

sys.addaudithook(hook)

def watched(name, door):
    def loud(*arguments, **options):
        say(name)
        return door(*arguments, **options)
    return loud

for module in (pickle, _pickle):
    for name in ("load", "loads"):
        setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))

with open(f"watched-{os.getpid()}.txt", "w") as file:
    file.write(" ".join(sys.argv))
"""


def test_a_whole_run_unpickles_nothing(tmp_path: Path) -> None:
    """Coordinator and worker from start to report, checkpoints included; the watch itself works."""
    sections: dict[str, dict[str, object]] = {
        "run": {"inner_steps_total": 20},
        "train": {"batch_size": 4, "threads": 1, "checkpoint_every": 10},
        "topology": {"workers": 1},
    }
    with Cluster(tmp_path, **sections) as cluster:
        (tmp_path / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
        processes = [cluster.coordinator(), cluster.worker("w0")]
        assert [p.wait() for p in processes] == [0, 0], processes[0].text
        assert cluster.report["commits"] > 0
        assert len(list(tmp_path.glob("watched-*.txt"))) >= 2
        found = tmp_path / "unpickled.txt"
        assert not found.exists(), found.read_text(encoding="utf-8")
    sinner = "import pickle, fractions; pickle.loads(pickle.dumps(fractions.Fraction(1, 2)))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", sinner], cwd=tmp_path, env=environment, check=True)
    text = found.read_text(encoding="utf-8")
    assert "pickle.loads" in text and "pickle.find_class" in text
