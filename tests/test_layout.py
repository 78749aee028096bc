"""The house stands as drawn: the four links, no stray `__init__.py`, file sizes, and a wheel that holds it all."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("comms", "coordinator", "kernels", "worker")
FOLDERS = ("diloco", *LINKS)
GENERATED = ("_pb2.py", "_pb2_grpc.py")
DATA = (".proto", ".pyi", ".html", ".cpp", "py.typed")


def sources(*suffixes: str) -> list[Path]:
    """Files of the package with these endings, relative to the root, each once and under its real folder."""
    found = []
    for folder in FOLDERS:
        for directory, folders, files in os.walk(ROOT / folder, followlinks=False):
            folders[:] = [name for name in folders if name != "__pycache__"]
            found += [Path(directory, name).relative_to(ROOT) for name in files if name.endswith(suffixes)]
    return sorted(found)


WRITTEN = [path for path in sources(".py") if not path.name.endswith(GENERATED)]


def in_wheel(path: Path) -> str:
    """The name under which a source file is installed."""
    return path.as_posix() if path.parts[0] == "diloco" else f"diloco/{path.as_posix()}"


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("name", LINKS)
def test_each_folder_is_linked_into_the_package(name: str) -> None:
    """`diloco/comms` is a relative link to `../comms`; a copy would make two modules of one."""
    link = ROOT / "diloco" / name
    assert link.is_symlink(), f"diloco/{name} is no link: a checkout without symlink support cannot work"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_links_are_committed_as_links() -> None:
    """Git stores them with mode 120000, so that every clone has them."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-s", *(f"diloco/{name}" for name in LINKS), cwd=ROOT).stdout.splitlines()
    modes = {line.split("\t")[1]: line.split()[0] for line in listed}
    assert modes == {f"diloco/{name}": "120000" for name in LINKS}


@pytest.mark.parametrize("name", LINKS)
def test_top_folders_shadow_no_installed_package(name: str) -> None:
    """Without `__init__.py` an installed `kernels` of someone else wins over ours, even inside a checkout."""
    assert not (ROOT / name / "__init__.py").exists()


def test_the_walk_sees_every_floor() -> None:
    """The tests below judge what `sources` finds: it must find files in each folder, and below it."""
    assert {path.parts[0] for path in WRITTEN} == set(FOLDERS)
    assert Path("diloco/optim/__init__.py") in WRITTEN
    assert Path("diloco/comms/codec.py") not in WRITTEN


@pytest.mark.parametrize("path", WRITTEN, ids=str)
def test_each_file_says_what_lives_in_it_and_stays_short(path: Path) -> None:
    """A module docstring, and at most 400 lines; generated files are exempt."""
    text = (ROOT / path).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
    assert len(text.splitlines()) <= 400, f"{path} has {len(text.splitlines())} lines: split it"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, links kept, without network and without touching the checkout."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, tree / path.name)
    out = tree.parent / "dist"
    built = run(
        sys.executable,
        *(
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-build-isolation",
        ),
        *("--no-index", "--wheel-dir", str(out), "."),
        cwd=tree,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_installs_one_top_level_name(wheel: Path) -> None:
    """`diloco` and its metadata: a top-level `kernels` would overwrite other people's."""
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"diloco", info}


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    """All sources, the type marker, the protocol definition, stubs and the other data; links are followed."""
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {in_wheel(path) for path in sources(".py", *DATA)}
    assert {"diloco/py.typed", "diloco/comms/diloco_v1.proto", "diloco/comms/codec.py"} <= wanted
    assert wanted - held == set()


def test_the_wheel_carries_the_license_and_the_command(wheel: Path) -> None:
    """Apache-2.0 in full, and `diloco` as a console script."""
    archive = zipfile.ZipFile(wheel)
    (license_name,) = (name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
    assert archive.read(license_name) == (ROOT / "LICENSE").read_bytes()
    (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "diloco = diloco.cli:main" in archive.read(scripts).decode()
