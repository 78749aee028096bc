"""Imports flow one way: kernels < diloco < comms < {coordinator, worker} < entry points («<»: is imported by).

Also here: the bare folder names are never imported, and nothing that unpickles is.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"kernels": 0, "comms": 2, "coordinator": 3, "worker": 3}
ENTRY_POINTS = {
    "diloco",
    "diloco.__main__",
    "diloco.arguments",
    "diloco.chaos",
    "diloco.cli",
    "diloco.demo",
    "diloco.doctor",
    "diloco.founding",
    "diloco.export",
    "diloco.keys",
    "diloco.live",
    "diloco.params",
    "diloco.peer",
    "diloco.plan_schedule",
    "diloco.planning",
    "diloco.training",
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def files(*folders: str) -> list[Path]:
    """Python files below these folders, relative to the root; links are not entered."""
    found = []
    for folder in folders:
        for directory, _, names in os.walk(ROOT / folder, followlinks=False):
            found += [Path(directory, name).relative_to(ROOT) for name in names if name.endswith(".py")]
    return sorted(found)


PACKAGE = files("diloco", *FLOORS)
EVERYTHING = [*PACKAGE, *files("tests", "examples", "benchmarks", "deploy")]


def module_name(path: Path) -> str:
    """The import name of a file: `comms/codec.py` is `diloco.comms.codec`."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts if parts[0] == "diloco" else ("diloco", *parts))


MODULES = {module_name(path) for path in PACKAGE} | {f"diloco.{name}" for name in FLOORS}


def floor(module: str) -> tuple[int, str]:
    """Height of a module of ours, and the name of its floor."""
    if module in ENTRY_POINTS or module.startswith("diloco.chaos."):
        return 4, "entry points"
    second = module.split(".")[1]
    return (FLOORS[second], second) if second in FLOORS else (1, "diloco")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of each import, wherever it stands; `from a import b` names a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield node.lineno, full if full in MODULES else origin
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module less its `if TYPE_CHECKING:` blocks, which never run."""
    kept = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(kept, tree.type_ignores)


def layer_violations(module: str, source: str) -> list[str]:
    """What in `source`, were it `module`, goes against the order of the floors."""
    tree = ast.parse(source)
    if module == "diloco":
        tree = without_type_checking(tree)
    height, name = floor(module)
    found = []
    for line, target in imports(tree):
        if target.startswith("."):
            found.append(f"{module}:{line} imports {target!r}: write the full name")
        elif target.split(".")[0] in FLOORS:
            found.append(f"{module}:{line} imports {target!r}: write 'diloco.{target}'")
        elif target.split(".")[0] == "diloco":
            below, other = floor(target)
            if below > height or (below == height and other != name):
                found.append(f"{module}:{line} ({name}) imports {target} ({other})")
    return found


def unpickling(module: str, source: str) -> list[str]:
    """Where `source` could run code that someone sent it."""
    tree = ast.parse(source)
    found = [
        f"{module}:{line} imports {target}"
        for line, target in imports(tree)
        if target.split(".")[0] in UNPICKLERS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            found.append(f"{module}:{node.lineno} calls torch.load")
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            found += [
                f"{module}:{node.lineno} imports torch.load" for alias in node.names if alias.name == "load"
            ]
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            found.append(f"{module}:{node.value.lineno} allows pickle")
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_no_module_imports_from_a_floor_above(path: Path) -> None:
    """Lazy imports within functions count too: they are the usual way around such a rule."""
    assert layer_violations(module_name(path), (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_nothing_unpickles(path: Path) -> None:
    """Bytes from the network or from disk never become code."""
    assert unpickling(str(path), (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [p for p in EVERYTHING if p not in PACKAGE], ids=str)
def test_the_bare_folder_names_are_never_imported(path: Path) -> None:
    """Tests, examples and benchmarks write `diloco.comms` too: one module, one name."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert [target for _, target in imports(tree) if target.split(".")[0] in FLOORS] == []


def test_every_floor_is_looked_at() -> None:
    """Files of all floors are among those judged, each with a height."""
    assert {floor(module_name(path))[1] for path in PACKAGE} == {"diloco", "entry points", *FLOORS}
    assert module_name(Path("comms/codec.py")) == "diloco.comms.codec"
    assert module_name(Path("diloco/optim/__init__.py")) == "diloco.optim"


@pytest.mark.parametrize(
    ("module", "snippet"),
    [
        ("diloco.kernels.ops", "from diloco.errors import ConfigError"),
        ("diloco.outer", "import diloco.comms.codec"),
        ("diloco.outer", "from diloco import comms"),
        ("diloco.outer", "def f():\n    from diloco.worker.replica import Replica"),
        ("diloco.outer", "from diloco import DiLoCo"),
        ("diloco.comms.sim", "from diloco.worker.replica import Replica"),
        ("diloco.worker.session", "from diloco.coordinator.state import Coordinator"),
        ("diloco.coordinator.state", "from diloco.worker import replica"),
        ("diloco.worker.session", "from diloco.cli import main"),
        ("diloco.worker.session", "if TYPE_CHECKING:\n    from diloco.coordinator.state import Coordinator"),
        ("diloco.worker.session", "import_module('diloco.coordinator.state')"),
        ("diloco.worker.session", "import comms.codec"),
        ("diloco.worker.session", "from worker import replica"),
        ("diloco.worker.session", "from . import replica"),
        ("diloco.cli", "from kernels import ops"),
    ],
)
def test_a_violation_is_seen(module: str, snippet: str) -> None:
    """The check itself: each of these is exactly one violation."""
    assert len(layer_violations(module, snippet)) == 1


@pytest.mark.parametrize(
    ("module", "snippet"),
    [
        ("diloco", "if TYPE_CHECKING:\n    from diloco.worker.session import DiLoCo"),
        ("diloco.cli", "from diloco.worker import session\nfrom diloco.coordinator import state"),
        ("diloco.worker.session", "from diloco.comms import codec\nfrom diloco.kernels.ops import encode"),
        ("diloco.worker.session", "from diloco.worker.replica import Replica\nfrom diloco import errors"),
        ("diloco.outer", "import torch.distributed\nfrom diloco.errors import ConfigError"),
    ],
)
def test_what_is_allowed_is_let_through(module: str, snippet: str) -> None:
    """Downward, sideways within a floor, and other people's packages."""
    assert layer_violations(module, snippet) == []


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "from marshal import loads",
        "import dill as d",
        "def f():\n    import cloudpickle",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "import_module('pickle')",
    ],
)
def test_unpickling_is_seen(snippet: str) -> None:
    """The check itself: each of these is exactly one finding."""
    assert len(unpickling("m", snippet)) == 1
    assert unpickling("m", "np.load(path, allow_pickle=False)\ntorch.save(x, path)\nimport json") == []
