"""Registration of the operators with torch: the definition for every device, and what is faster than it on some.

`ops` checks arguments and calls what is registered here.

An implementation module has one function for each operator, called as ``module.encode(settings, x, ...)`` with the
arguments of the functions in `reference_fused`; it returns False, having written nothing, for a case that it leaves to
the reference.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from diloco.kernels import cpu, orthogonal
from diloco.kernels import reference_fused as reference
from diloco.kernels.settings import Settings

GPU_MODULE = "diloco.kernels.gpu_triton"
_CODEC = "str codec, int block, int bits, int k, int[] groups"


def _gpu(name: str, *arguments: Any) -> bool:
    """Run the Triton implementation; False if there is none for this case, or no Triton."""
    try:
        module = importlib.import_module(GPU_MODULE)
    except ImportError:
        return False
    function = getattr(module, name, None)
    return function is not None and function(*arguments) is not False


def _register(name: str, arguments: str, mutated: tuple[str, ...], codec: bool = True) -> None:
    """One operator that returns nothing: reference everywhere, `cpu` and the GPU module on their devices."""
    schema = f"({_CODEC}, {arguments}) -> ()"

    def define(codec: str, block: int, bits: int, k: int, groups: list[int], *rest: Any) -> None:
        getattr(reference, name)(Settings(codec, block, bits, k, tuple(groups)), *rest)

    def on_cpu(codec: str, block: int, bits: int, k: int, groups: list[int], *rest: Any) -> None:
        chosen = Settings(codec, block, bits, k, tuple(groups))
        if getattr(cpu, name)(chosen, *rest) is False:
            getattr(reference, name)(chosen, *rest)

    def on_gpu(codec: str, block: int, bits: int, k: int, groups: list[int], *rest: Any) -> None:
        chosen = Settings(codec, block, bits, k, tuple(groups))
        if not _gpu(name, chosen, *rest):
            getattr(reference, name)(chosen, *rest)

    def shapes(*_: Any) -> None:
        return None

    op = torch.library.custom_op(f"diloco::{name}", define, mutates_args=mutated, schema=schema)
    op.register_kernel("cpu")(on_cpu)
    op.register_kernel("cuda")(on_gpu)
    op.register_fake(shapes)


_register(
    "encode",
    "Tensor x, Tensor? local, Tensor? error, Tensor(a!)? residual, Tensor(b!) payload, Tensor(c!) squared_norm, "
    "float beta, int? seed",
    ("residual", "payload", "squared_norm"),
)
_register("decode_accumulate", "Tensor[] payloads, float[] weights, Tensor(a!) out", ("out",))
_register("squared_norms", "Tensor[] payloads, int n, Tensor? center, Tensor(a!) out", ("out",))
_register("trimmed_mean", "Tensor[] payloads, int trim, Tensor(a!) out", ("out",))
_register(
    "outer_step",
    "str rule, Tensor(a!) params, Tensor mean, Tensor(b!)? first, Tensor(c!)? second, Tensor(d!)? residual, "
    "Tensor(e!)? payload, Tensor(f!)? squared_norm, float lr, float momentum, float mu_y, int? seed",
    ("params", "first", "second", "residual", "payload", "squared_norm"),
)
_register("merge", "Tensor(a!) params, Tensor payload, float alpha", ("params",))


_swap_lerp = torch.library.custom_op(
    "diloco::swap_lerp",
    reference.swap_lerp,
    mutates_args=("a", "b"),
    schema="(Tensor(a!) a, Tensor(b!) b, float weight) -> ()",
)


@_swap_lerp.register_kernel("cpu")
def _(a: Tensor, b: Tensor, weight: float) -> None:
    if not cpu.swap_lerp(a, b, weight):
        reference.swap_lerp(a, b, weight)


@_swap_lerp.register_fake
def _(a: Tensor, b: Tensor, weight: float) -> None:
    return None


_orthogonalize = torch.library.custom_op(
    "diloco::orthogonalize",
    orthogonal.orthogonalize,
    mutates_args=(),
    schema="(Tensor G, float[] coefficients, float div, ScalarType dtype, float eps, bool gram, bool aol) -> Tensor",
)


@_orthogonalize.register_kernel("cuda")
def _(
    G: Tensor, coefficients: list[float], div: float, dtype: torch.dtype, eps: float, gram: bool, aol: bool
) -> Tensor:
    try:
        module = importlib.import_module(GPU_MODULE)
    except ImportError:
        return orthogonal.orthogonalize(G, coefficients, div, dtype, eps, gram, aol)
    made: Tensor = module.orthogonalize(G, coefficients, div, dtype, eps, gram, aol)
    return made


@_orthogonalize.register_fake
def _(
    G: Tensor, coefficients: list[float], div: float, dtype: torch.dtype, eps: float, gram: bool, aol: bool
) -> Tensor:
    return torch.empty_like(G, dtype=dtype, memory_format=torch.contiguous_format)
