"""``python -m diloco.kernels.report``: what the compiler makes of every kernel, configuration and target.

Registers, spills, shared memory, matrix instructions and load widths, for GPUs that need not be there. It says nothing
about time. Exit status 1 if anything spills, does not fit, or lacks the matrix instruction it should have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

try:
    from diloco.kernels.cases_triton import Case, cases
    from diloco.kernels.offline_triton import SHARED_LIMIT, TARGETS, Compiled, compile_host
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    raise ModuleNotFoundError(
        "the kernels need Triton: pip install 'diloco[gpu]'", name="triton"
    ) from missing

MMA = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
# Small enough to be made in no time, whole spans so that loads are specialised as in a large run.
VALUES = 1 << 16
SIDE = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """A compiled kernel and the case that launched it first."""

    case: Case
    made: Compiled

    def as_json(self) -> dict[str, object]:
        made = self.made
        return {
            "kernel": made.kernel,
            "op": self.case.op,
            "config": self.case.config,
            "target": made.target,
            "signature": made.signature,
            "constants": made.constants,
            "num_warps": made.num_warps,
            "num_stages": made.num_stages,
            "options": made.options,
            "registers": made.registers,
            "spill_bytes": made.spill_bytes,
            "shared_bytes": made.shared_bytes,
            "mma": made.mma,
            "mma_flops": made.mma_flops,
            "loads": {str(width): count for width, count in made.loads.items()},
        }


def rows(targets: Sequence[str], op: str | None = None, config: str | None = None) -> Iterator[Row]:
    """Compile every case (of `op`, with `config`, if given) for every target; kernels that cases share come once."""
    for target in targets:
        for case in cases("cpu", VALUES, SIDE):
            if (op is None or case.op == op) and (config is None or case.config == config):
                for made in compile_host(case.run, target):
                    yield Row(case, made)


def complaints(row: Row) -> list[str]:
    """What must not be: spills, too much shared memory, no or the wrong matrix instruction, redundant ones."""
    made, found = row.made, []
    if made.spill_bytes:
        found.append(f"spills {made.spill_bytes} bytes")
    if made.shared_bytes > SHARED_LIMIT[made.target]:
        found.append(
            f"needs {made.shared_bytes} bytes of shared memory, {SHARED_LIMIT[made.target]} are there"
        )
    if "product_kernel" in made.kernel and row.case.mma:
        if set(made.mma) != {MMA[made.target]}:
            found.append(f"has matrix instructions {made.mma}, want {MMA[made.target]}")
        step = 2 * made.constants["SIZE"] ** 2 * made.constants["K"]
        # The AMD pipeliner peels iterations of the loop, each as long as the loop itself.
        if made.mma_flops is not None and made.mma_flops not in (step, 3 * step):
            found.append(f"issues {made.mma_flops} flops for a step of {step}")
    return found


def table(found: Sequence[Row]) -> str:
    """A Markdown table: one line a kernel and configuration, a column a target, ``registers / spill / shared``.

    `floor` is that of the whole case: bytes and flops for each of its values.
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found:
        made = row.made
        kernel = made.kernel.split(":")[1].removesuffix("_kernel")
        warps = f"{made.num_warps}x{made.num_stages}" if "product" in kernel else str(made.num_warps)
        mma = "".join(f" {count} {kind}" for kind, count in made.mma.items())
        cell = f"{made.registers} / {made.spill_bytes} / {made.shared_bytes}{mma}"
        # A case may launch a kernel in several specialisations, in the same order on each target.
        key = (row.case.op, row.case.config, _floor(row.case), kernel, warps)
        again = 0
        while made.target in lines.setdefault((*key, str(again)), {}):
            again += 1
        lines[*key, str(again)][made.target] = cell
    targets = [t for t in TARGETS if any(t in cells for cells in lines.values())]
    head = ["op", "config", "floor", "kernel", "warps", *targets]
    body = [[*key[:-1], *(cells.get(t, "") for t in targets)] for key, cells in lines.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def _floor(case: Case) -> str:
    flops = f", {case.flops / case.values:.0f} flop" if case.flops else ""
    return f"{case.bytes / case.values:.4g} B{flops}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diloco.kernels.report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--op", help="this operator only")
    chosen = parser.parse_args(arguments)
    targets = chosen.targets.split(",")
    unknown = [t for t in targets if t not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; known: {', '.join(TARGETS)}")
    found = list(rows(targets, chosen.op))
    print(json.dumps([row.as_json() for row in found], indent=1) if chosen.json else table(found))
    bad = [
        f"{row.made.kernel} {row.case.config} {row.made.target}: {c}"
        for row in found
        for c in complaints(row)
    ]
    print(*bad, sep="\n", file=sys.stderr, end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
