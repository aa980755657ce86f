"""Floating point operations of a traced program: those of its matrix products, with what remat computes again."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Any) -> float:
    """Add up 2 x M x N x K over every matrix product, times the trips of the scans around it.

    A `shard_map` counts once for every device. A kernel counts its own products once for every point of its grid, which
    bounds what causal masks leave from above. A `while` counts as one trip, since its trips are not known.

    Args:
        jaxpr: a closed or open jaxpr, as of `jax.make_jaxpr` or `jitted.trace(...).jaxpr`.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
            continue
        inner = sum(count_flops(found) for value in params.values() for found in _jaxprs(value))
        if name == "scan":
            inner *= params["length"]
        elif name == "shard_map":
            inner *= params["mesh"].size
        elif name == "pallas_call":
            inner *= math.prod(int(size) for size in params["grid_mapping"].grid)
        elif name == "cond":
            inner = max((count_flops(found) for value in params.values() for found in _jaxprs(value)), default=0.0)
        total += inner
    return total


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (ClosedJaxpr, Jaxpr)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [found for entry in value for found in _jaxprs(entry)]
    return []
