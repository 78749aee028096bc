"""What the compiler makes of the Triton kernels, for targets that are not there: spills, sizes, matrix instructions."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="compiling kernels needs the gpu extra")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this Triton interprets and does not compile", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from diloco.kernels import md_triton, products_triton, report
from diloco.kernels.cases_triton import cases
from diloco.kernels.offline_triton import TARGETS, compile_host, forget
from diloco.kernels.products_triton import LARGE, Tile, symmetric_product

ROOT = Path(__file__).resolve().parents[2]


@cache
def compiled(target: str, op: str, config: str) -> tuple[report.Row, ...]:
    return tuple(report.rows([target], op, config))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "config"), [("encode", "int4 ef"), ("decode_accumulate", "nf4")])
def test_codec_kernels_do_not_spill_and_load_16_bytes(target: str, op: str, config: str) -> None:
    """Through the real host function, for every target; fused multiply-adds are off."""
    found = compiled(target, op, config)
    assert found and [c for row in found for c in report.complaints(row)] == []
    for row in found:
        assert max(row.made.loads) == 16
        assert row.made.options["enable_fp_fusion"] is False
        # On AMD a division is itself made of fused steps, so that the text would not tell.
        assert target == "gfx942" or "fma.rn.f32" not in row.made.text


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_products_use_the_targets_matrix_instruction_and_waste_none(target: str) -> None:
    """Half the tiles, each with exactly the flops of its step; addresses of a batch are 64-bit."""
    found = compiled(target, "orthogonalize", "bfloat16 1024x2048")
    assert [c for row in found for c in report.complaints(row)] == []
    products = [row.made for row in found if "product_kernel" in row.made.kernel]
    kernels = {made.kernel.split(":")[1] for made in products}
    assert kernels == {"symmetric_product_kernel", "plain_product_kernel"}
    for made in products:
        assert made.mma_flops and max(made.loads) == 16
        assert re.search(r"arith\.muli [^:]*: i64", made.ir)


def test_a_spill_is_seen() -> None:
    """A large tile over rows that are not aligned is known to spill: the report must say so, and complain."""
    x, c = torch.empty(1, 1001, 1001, dtype=torch.bfloat16), torch.empty(1, 1001, 1001, dtype=torch.bfloat16)
    forget(products_triton.symmetric_product_kernel)
    tile = LARGE._replace(warps=4)
    (made,) = compile_host(lambda: symmetric_product(x, x, c, c.clone(), 0.5, 0.5, tile=tile), "sm_80")
    forget(products_triton.symmetric_product_kernel)
    (row,) = [r for r in compiled("sm_90", "encode", "int4 ef") if "block" in r.made.kernel]
    assert made.spill_bytes > 0
    assert any("spills" in c for c in report.complaints(dataclasses.replace(row, made=made)))


def test_a_block_that_does_not_fit_is_rejected_as_on_the_device() -> None:
    """Eight stages need more shared memory than any target has."""
    x = torch.empty(1, 1024, 1024, dtype=torch.bfloat16)
    with pytest.raises(OutOfResources):
        compile_host(lambda: symmetric_product(x, x, None, x.clone(), tile=Tile(128, 64, 8, 8)), "sm_90")
    forget(products_triton.symmetric_product_kernel)


def test_complaints_name_a_missing_or_redundant_matrix_instruction() -> None:
    """The check that the report's exit status rests on."""
    row = next(r for r in compiled("sm_90", "orthogonalize", "bfloat16 1024x2048") if r.made.mma)
    assert row.made.mma_flops is not None
    twice = dataclasses.replace(row.made, mma_flops=2 * row.made.mma_flops)
    without = dataclasses.replace(row.made, mma={}, mma_flops=None)
    large = dataclasses.replace(row.made, shared_bytes=1 << 20)
    for made, word in ((twice, "flops"), (without, "wgmma"), (large, "shared")):
        assert any(word in c for c in report.complaints(dataclasses.replace(row, made=made)))


def test_the_report_is_a_list_of_objects_with_the_promised_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """One for each kernel, configuration and target."""
    forget(md_triton.split_kernel)
    assert report.main(["--json", "--op", "md_split", "--targets", "sm_80"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["config"] for row in found] == ["", "momentum"]
    for row in found:
        assert row["kernel"] == "diloco.kernels.md_triton:split_kernel" and row["target"] == "sm_80"
        assert row["signature"].startswith("w=*fp32:16, g=*fp32:16, ") and row["constants"]["ROWS"] == 32
        assert row["registers"] > 0 and row["spill_bytes"] == 0 and row["shared_bytes"] > 0
        assert {"op", "num_warps", "num_stages", "options", "mma"} < set(row)


def test_an_unknown_target_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """With the names that are known."""
    with pytest.raises(SystemExit) as left:
        report.main(["--targets", "sm_75"])
    told = capsys.readouterr().err
    assert left.value.code == 2 and "sm_75" in told and "gfx942" in told


def test_the_gpu_benchmark_compiles_without_a_gpu() -> None:
    """``--dry`` goes through the same cases and says that nothing was timed."""
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--op", "md_split", "--targets", "sm_80"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "| md_split | momentum | 24 B | split |" in done.stdout and "nothing was run or timed" in done.stdout
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nothing_spills_on_any_target() -> None:
    """Every kernel, every configuration, every target: no spill, fits, right instructions."""
    found = list(report.rows(list(TARGETS)))
    assert len(found) > 400
    assert [
        f"{r.made.kernel} {r.case.config} {r.made.target}: {c}" for r in found for c in report.complaints(r)
    ] == []


def test_the_documentation_lists_every_configuration() -> None:
    """Each case of the report has a line in the table of docs/kernels.md, unless earlier ones launch all its kernels."""
    document = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    listed = {
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in document.splitlines() if "|" in line
    }
    wanted = {(c.op, c.config) for c in cases("cpu", 64, report.SIDE)}
    shared = {("decode_accumulate", f"stat{bits}") for bits in (2, 4, 8)} | {
        ("orthogonalize", "float32 1024x2048")
    }
    assert wanted - listed == shared
