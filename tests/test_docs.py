"""The documents say only what is so: links, names, commands, keys and defaults are checked against the code."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

import diloco
from diloco.arguments import parse
from diloco.config import _ONLY, RunConfig
from diloco.errors import ConfigError
from diloco.optim_section import _ALWAYS, _USES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
# A link to a file, then the names that are said to be in it: [`a/b.py`](a/b.py) `Name.method`, `other`
NAMED = re.compile(r"\[`([\w/]+\.py)`\]\(([^)]+)\)((?:,? `[A-Za-z_][\w.]*`)+)")

DOWNLINKS = {"async": "g_fp32"}  # what a value needs beside it
USED_BY_OPTIMIZERS = {*_ALWAYS, *(key for keys in _USES.values() for key in keys)}


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title!r}"
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in `text`, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-:")]
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def shell_lines(text: str) -> list[str]:
    return [line for body in blocks(text, "sh") for line in body.replace("\\\n", " ").splitlines() if line]


def commands(text: str) -> list[str]:
    """Every `diloco ...` command in shell blocks and in the running text."""
    plain = re.sub(FENCE, "", text)
    return [c for c in [*shell_lines(text), *CODE.findall(plain)] if c.startswith("diloco ")]


def named_things(text: str) -> list[tuple[str, str]]:
    return [(path, name) for path, _, names in NAMED.findall(text) for name in CODE.findall(names)]


def defined(path: Path) -> set[str]:
    """Qualified names of the classes and functions in a file."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def accepted(line: str) -> tuple[argparse.Namespace, list[str]] | None:
    """What the parser makes of a command; None when it prints help. Fails when the parser refuses it."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            return parse(shlex.split(line, comments=True)[1:])
    except SystemExit as stop:
        assert stop.code == 0, f"{line!r} is refused: {heard.getvalue()}"
        return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    """Files exist, and so do the headings behind a #."""
    text = document.read_text(encoding="utf-8")
    for target in LINK.findall(re.sub(FENCE, "", text)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name}: {target} does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), (
                f"{document.name}: no heading {target}"
            )


def test_every_name_beside_a_file_is_defined_in_it() -> None:
    """ARCHITECTURE.md names classes and functions only in the files where they are."""
    found = named_things(ARCHITECTURE)
    assert len(found) > 30
    for path, name in found:
        assert name in defined(ROOT / path), f"{path} does not define {name}"
    for path, target, _ in NAMED.findall(ARCHITECTURE):
        assert path == target


def test_the_way_of_one_fragment_is_the_way_it_goes(tmp_path: Path) -> None:
    """A real run over gRPC calls every function of the list."""
    way = named_things(section(ARCHITECTURE, "The way of one fragment"))
    assert len(way) > 20
    outcome = subprocess.run(
        [sys.executable, "-c", TRACED, str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    called = {(path, name) for path, name in json.loads(outcome.stdout.splitlines()[-1])}
    assert [thing for thing in way if thing not in called] == []


# One worker and its coordinator in one process, with every call in every thread written down.
TRACED = """
import json, sys, threading
from pathlib import Path

root, seen = Path(sys.argv[1]), set()

def profile(frame, event, argument):
    if event == "call":
        seen.add(frame.f_code)

threading.setprofile(profile)
sys.setprofile(profile)

from diloco.comms.connect import connect
from diloco.config import _ONLY, RunConfig
from diloco.coordinator.service import CoordinatorService
from diloco.worker.loop import Trainer

Path("corpus.txt").write_text("the way of one fragment " * 400)
config = RunConfig.from_dict({
    "run": {"inner_steps_total": 4}, "model": {"preset": "nano", "sequence_length": 16},
    "data": {"source": "corpus.txt"}, "train": {"batch_size": 2, "eval_batches": 1, "threads": 1},
    "stream": {"H": 2}, "codec": {"ef": "on"}, "topology": {"workers": 1},
})
service = CoordinatorService(config, Path("."), listen="127.0.0.1:0")
connection = connect(f"127.0.0.1:{service.start()}")
trainer = Trainer(config, connection, name="w", run_dir=Path("."), stop=threading.Event(), say=lambda text: None)
assert trainer.run() is not None and service.wait(60)
sys.setprofile(None)
threading.setprofile(None)
service.close()
called = []
for code in list(seen):
    path = Path(code.co_filename).resolve()
    if path.is_relative_to(root):
        called.append((str(path.relative_to(root)), code.co_qualname))
print(json.dumps(called))
"""


@pytest.mark.parametrize("line", commands(README))
def test_the_command_line_accepts_what_the_readme_shows(line: str) -> None:
    """Commands, flags and overridden keys are real."""
    parsed = accepted(line)
    if parsed is not None:
        RunConfig.from_toml("", parsed[1])


def test_the_readme_shows_every_command_and_no_other() -> None:
    """The table of commands is complete, and what is said to be missing is missing."""
    shown = {line.split()[1] for line in commands(README) if not line.split()[1].startswith("-")}
    status = {row[0]: row for row in rows(section(README, "What works, and what does not yet"))}
    with contextlib.redirect_stdout(io.StringIO()) as heard, pytest.raises(SystemExit):
        parse(["--help"])
    offered = set(re.findall(r"^    (\w+)", heard.getvalue(), re.MULTILINE))
    assert "coordinator" in offered and shown == offered
    assert not offered & set(status["Commands"][2].split(", "))


@pytest.mark.parametrize(
    ("row", "part", "key"), [("Overlap", "stream", "overlap"), ("Late contributions", "fault", "late")]
)
def test_the_status_table_agrees_with_the_configuration(row: str, part: str, key: str) -> None:
    """A value is refused if and only if the README lists it as not there yet."""
    status = {cells[0]: cells for cells in rows(section(README, "What works, and what does not yet"))}
    missing = [value for value in status[row][2].split(", ") if value]
    field: Any = RunConfig.model_fields[part].annotation
    refused = []
    for value in get_args(field.model_fields[key].annotation):
        try:
            RunConfig.from_dict({part: {key: value}, "codec": {"down": DOWNLINKS.get(value, "relay")}})
        except ConfigError:
            refused.append(value)
    assert sorted(missing) == sorted(refused)


def test_the_table_of_keys_states_the_real_defaults() -> None:
    """Every key of the README's table exists and has the default beside it."""
    table = rows(section(README, "Configuration"))
    assert len(table) > 25
    config = RunConfig()
    for key, default, meaning in table:
        part, name = key.strip("`").split(".")
        stated = None if default == "unset" else tomllib.loads(f"x = {default.strip('`')}")["x"]
        value = getattr(getattr(config, part), name)
        assert value == stated and type(value) is type(stated), f"{key}: the default is {value!r}"
        assert meaning


def test_keys_without_an_effect_are_named() -> None:
    """A key that no code reads is either refused when set or listed in the README as having no effect."""
    read: set[str] = set()
    for folder in ("diloco", "diloco/optim", "comms", "coordinator", "worker"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "config.py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unread = set()
    for part, field in RunConfig.model_fields.items():
        keys: Any = field.annotation
        # [optim] is read as a whole; which kind uses which key is a table of its own.
        used = USED_BY_OPTIMIZERS if part == "optim" else read
        unread |= {f"{part}.{key}" for key in keys.model_fields if key not in used}
    text = section(README, "What works, and what does not yet").partition("**have no effect yet**")[2]
    assert set(CODE.findall(text)) == unread - set(_ONLY)


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_python_in_the_documents_compiles_and_uses_public_names(text: str) -> None:
    """Every `diloco.X` that is shown exists."""
    for body in blocks(text, "python"):
        for node in ast.walk(ast.parse(body)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "diloco"
            ):
                assert hasattr(diloco, node.attr), f"diloco.{node.attr} does not exist"


def test_the_own_loop_of_the_readme_runs(tmp_path: Path) -> None:
    """Word for word, with a coordinator inside the process instead of the address."""
    body = blocks(section(README, "Your own training loop"), "python")[0]
    remote = 'diloco.connect("grpc://127.0.0.1:7700")'
    assert remote in body
    local = 'diloco.local({"run": {"inner_steps_total": 5}, "stream": {"H": 2}})'
    script = tmp_path / "own_loop.py"
    script.write_text(body.replace(remote, local), encoding="utf-8")
    scope = runpy.run_path(str(script))
    assert scope["optimizer"].inner_step == 5


def test_the_readmes_run_is_the_example_and_is_valid() -> None:
    """The TOML that readers copy is the file that is tested."""
    (body,) = blocks(README, "toml")
    assert body == (ROOT / "examples" / "two_workers.toml").read_text(encoding="utf-8")
    assert RunConfig.from_toml(body).topology.workers == 2


def test_the_make_targets_that_are_shown_exist() -> None:
    """`make x` in the README is a target of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {
        line.split()[1] for line in [*shell_lines(README), *CODE.findall(README)] if line.startswith("make ")
    }
    assert {"demo", "test"} <= shown <= targets


def test_the_place_for_measured_results_is_marked() -> None:
    """Results are written between two comments, once."""
    assert README.count("<!-- demo-parity -->") == README.count("<!-- /demo-parity -->") == 1
