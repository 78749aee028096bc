"""The public names: frozen, loaded on first use, and found where the interface says."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import diloco

TOP = ["DiLoCo", "DilocoError", "GPA", "RunConfig", "SNOO", "connect", "local", "__version__"]

# Module by module, what other people's code may rely on. More names may exist there.
PROMISED = {
    "diloco.comms.codec": ["get"],
    "diloco.optim": [
        "AdamP",
        "GPA",
        "Hyperball",
        "MARS",
        "MD",
        "Muon",
        "NorMuon",
        "SNOO",
        "Scion",
        "build_optimizer",
        "orthogonalize",
        "param_groups",
    ],
    "diloco.outer": ["Adam", "Gpa", "Nesterov", "Sgd", "SgdM"],
    "diloco.planner": ["published_table", "recommend", "utilization"],
    "diloco.schedules": ["multiplier", "scheduler", "settings_at"],
    "diloco.schedules_bound": ["bound"],
    "diloco.transfer": ["transfer"],
}


def in_a_fresh_process(code: str) -> str:
    """What `code` prints in an interpreter that has imported nothing yet; warnings are errors there too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_list_of_public_names_is_frozen() -> None:
    """Adding or removing a name is a decision, to be made here as well."""
    assert sorted(diloco.__all__) == sorted(TOP)
    assert dir(diloco) == sorted(TOP)


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import diloco` brings in neither torch nor a network library, so that `diloco --help` is instant."""
    heavy = in_a_fresh_process(
        "import sys, diloco\n"
        "print(sorted({'torch', 'grpc', 'numpy', 'pydantic', 'google.protobuf'} & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_the_heavy_libraries_would_be_noticed() -> None:
    """The same question after the first use of a name that needs torch: loading is lazy, not absent."""
    assert in_a_fresh_process("import sys, diloco\ndiloco.SNOO\nprint('torch' in sys.modules)") == "True"


def test_optimizers_need_no_network_library() -> None:
    """Someone who wraps an optimizer on one node never loads gRPC."""
    code = "import sys, diloco\ndiloco.SNOO, diloco.GPA, diloco.RunConfig\nprint('grpc' in sys.modules)"
    assert in_a_fresh_process(code) == "False"


@pytest.mark.parametrize("name", TOP)
def test_each_name_resolves(name: str) -> None:
    """Every promised name exists, is the same object each time, and says what it is."""
    value = getattr(diloco, name)
    assert getattr(diloco, name) is value
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_star_import_brings_exactly_the_public_names() -> None:
    """`from diloco import *` works with lazy names."""
    names = in_a_fresh_process(
        "before = set(globals()) | {'before'}\nfrom diloco import *\nprint(sorted(set(globals()) - before))"
    )
    assert names == repr(sorted(TOP))


@pytest.mark.parametrize("name", ["Diloco", "torch", "_HOMES_", "import_modul"])
def test_an_unknown_name_is_an_attribute_error_that_names_it(name: str) -> None:
    """As with any module: `hasattr` and `from diloco import X` depend on it."""
    assert not hasattr(diloco, name)
    with pytest.raises(AttributeError, match=f"'diloco' has no attribute '{name}'"):
        getattr(diloco, name)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in PROMISED.items() for n in names])
def test_promised_names_are_where_the_interface_says(module: str, name: str) -> None:
    """And each carries a docstring."""
    value = getattr(import_module(module), name)
    assert value.__doc__


def test_the_version_is_that_of_the_metadata() -> None:
    """One version, whether asked of the package or of the installer; skipped where nothing is installed."""
    from importlib import metadata

    try:
        installed = metadata.version("diloco")
    except metadata.PackageNotFoundError:
        pytest.skip("diloco runs from its sources, uninstalled")
    assert diloco.__version__ == installed
