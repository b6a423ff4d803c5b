"""A function compiled such that no operation is fused with another: what it computes, whatever the compiler fuses."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call"}


def op_by_op(function: Callable) -> Callable:
    """`jax.jit(function)` with a barrier after every operation, also in the bodies of its scans."""

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        out = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return jax.jit(run)


def _evaluate(closed: Any, args: list) -> list:
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "jaxpr") else (closed, ())
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        outs = lax.optimization_barrier(_apply(eqn, [read(v) for v in eqn.invars]))
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: Any, inputs: list) -> list:
    params, name = eqn.params, eqn.primitive.name
    if name == "scan":
        if "ft_in" in params:
            consts, carried = (len(part) for part in params["ft_in"].unpack()[:2])
        else:  # before JAX 0.12
            consts, carried = params["num_consts"], params["num_carry"]

        def body(carry: list, x: list) -> tuple[list, list]:
            outs = _evaluate(params["jaxpr"], [*inputs[:consts], *carry, *x])
            return outs[:carried], outs[carried:]

        start, xs = inputs[consts : consts + carried], inputs[consts + carried :]
        carry, ys = lax.scan(body, start, xs, length=params["length"], reverse=params["reverse"])
        return [*carry, *ys]
    if name in _CALLS:
        return _evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], inputs)
    bound = eqn.primitive.get_bind_params(params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # before JAX 0.12
    out = eqn.primitive.bind(*functions, *inputs, **bound)
    return out if eqn.primitive.multiple_results else [out]
