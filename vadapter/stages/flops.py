"""FLOPs of matrix products and convolutions: of any program, and of a stage's training step.

A multiply-add is two FLOPs. As is usual, everything else (norms, softmax, optimizer) is left out.
Causal attention counts in full, since the program computes the whole square of scores.

The FLOPs of a step follow from its forward pass. The backward pass has one more product of the same
size for each operand that needs a gradient, and an operand does if it depends on parameters that
are trained. So the trace of the forward pass is read together with the components whose parameters
each value depends on. It holds for every component, and what the backward pass recomputes is not
part of a forward pass. It would count too much for products with trained parameters whose gradient
is stopped later: no component has such products.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from vadapter.data.open import prompt_len
from vadapter.models.adapter_model import Training
from vadapter.recipe import schema
from vadapter.stages.abstract_state import row_shapes
from vadapter.stages.stage import Stage

Origin = frozenset[str]  # components whose parameters a value depends on, with a gradient
Products = Counter[tuple[Origin, Origin]]  # FLOPs by the origins of both operands
NOTHING: Origin = frozenset()

# Operations that run one program on their operands.
CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip


def step_flops(stage: Stage, *, encoder: bool | None = None) -> float:
    """Return the FLOPs of a training step on a batch, without recomputation, mean over its data.

    A data set that does not say whether it has images or clips is opened.

    Args:
      encoder: whether a frozen encoder counts; None: unless the tokens of a data set are cached.
    """
    weights, frozen = stage.config.data, stage.model.encoder not in stage.trained
    traced: dict[Any, dict[str, int]] = {}
    total = 0.0
    for name, weight in weights.items():
        rows = stage.recipe.data[name]
        kind = rows.media or (stage.source(name).kind if stage.view else "")
        sizes = stage.sizes(name, kind=kind)
        if stage.exact and rows.task != "document":
            sizes["P"] = prompt_len(rows.task, stage.tokenizer)
        shape = tuple(sizes.items())
        if shape not in traced:
            traced[shape] = formula(stage, sizes)
        runs = not rows.cache if encoder is None else encoder
        skipped = stage.model.encoder if frozen and not runs else ""
        total += weight * sum(n for part, n in traced[shape].items() if part != skipped)
    return total / sum(weights.values())


def formula(
    stage: Stage, sizes: dict[str, int] | None = None, trained: Collection[str] | None = None
) -> dict[str, int]:
    """Return component -> FLOPs of a training step on a batch, without recomputation.

    The FLOPs of a product are those of the component with its weights.

    Args:
      sizes: F, S, P, T and M of the rows, see `data.batch`; None: of the first data set.
      trained: components with gradients; None: the stage's. Without any: a forward pass.
    """
    trained = stage.trained if trained is None else trained
    flops = dict.fromkeys(schema.components(stage.config), 0)
    order = list(flops)

    def owner(operands: tuple[Origin, Origin]) -> str:
        # Weights depend on one component; a product of activations is that of the last in it.
        weights = [origin for origin in operands if len(origin) == 1]
        names = frozenset().union(*(weights or operands))
        return max(names, key=order.index, default=order[0])

    for operands, forward in _forward_products(stage, sizes or stage.sizes()).items():
        gradients = sum(not origin.isdisjoint(trained) for origin in operands)
        flops[owner(operands)] += forward * (1 + gradients)
    return flops


def _forward_products(stage: Stage, sizes: dict[str, int]) -> Products:
    """Return the products of the loss of a batch in training; nothing is computed."""
    trainable, frozen = stage.abstract_params()
    params, batch = trainable | frozen, row_shapes(sizes, stage.config.batch)
    objective, dropout = stage.objective, stage.config.use_dropout

    def loss(params: Any, batch: Any, step: jax.Array) -> jax.Array:
        training = Training(jax.random.fold_in(jax.random.key(0), step), step, dropout)
        visual = objective.prepare(params, batch)
        return objective.loss(params, visual, batch, jnp.ones(()), training)[0]

    step = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.make_jaxpr(loss)(params, batch, step).jaxpr
    origins = [frozenset({n}) for n in sorted(params) for _ in jax.tree.leaves(params[n])]
    return products(program, origins + [NOTHING] * (len(program.invars) - len(origins)))[0]


def count(fn: Callable, *args: Any, loops: int = 1) -> int:
    """Return the FLOPs of a function of arrays, read from its trace; nothing is computed.

    A trace does not say how often a `while` loop runs: `loops` times.
    """
    return count_traced(jax.make_jaxpr(fn)(*args).jaxpr, loops)


def count_traced(jaxpr: Any, loops: int = 1) -> int:
    """Return the FLOPs of a traced program, see `count`."""
    return products(jaxpr, [NOTHING] * len(jaxpr.invars), loops)[0].total()


def products(
    jaxpr: Any, origins: Sequence[Origin], loops: int = 1
) -> tuple[Products, list[Origin]]:
    """Return the products of a traced program, and the origins of its results.

    Args:
      origins: of its arguments.
      loops: how often a `while` loop runs.

    Raises:
      NotImplementedError: a product is inside an operation that is unknown here.
    """
    known = dict(zip(jaxpr.invars, origins, strict=True))
    found: Products = Counter()

    def of(value: Any) -> Origin:
        return NOTHING if isinstance(value, core.Literal) else known.get(value, NOTHING)

    for eqn in jaxpr.eqns:
        new, results = _operation(eqn, [of(value) for value in eqn.invars], loops)
        found.update(new)
        for value, origin in zip(eqn.outvars, results, strict=True):
            stops = eqn.primitive.name == "stop_gradient"
            stops = stops or not jnp.issubdtype(value.aval.dtype, jnp.inexact)
            known[value] = NOTHING if stops else origin
    return found, [of(value) for value in jaxpr.outvars]


def _operation(eqn: Any, inputs: list[Origin], loops: int) -> tuple[Products, list[Origin]]:
    """Return the products of an operation, and the origins of its results."""
    name, params = eqn.primitive.name, eqn.params
    joined = [NOTHING.union(*inputs)] * len(eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        flops = 2 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        return Counter({(inputs[0], inputs[1]): flops}), joined
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        flops = 2 * eqn.outvars[0].aval.size * kernel.size // outputs
        return Counter({(inputs[0], inputs[1]): flops}), joined
    if name == "scan":
        consts, body = params["num_consts"], params["jaxpr"].jaxpr
        return _loop(body, inputs, consts, params["num_carry"], params["length"], loops)
    if name == "while":
        tests, consts = params["cond_nconsts"], params["body_nconsts"]
        body, carry = params["body_jaxpr"].jaxpr, len(inputs) - tests - consts
        found, results = _loop(body, inputs[tests:], consts, carry, loops, loops)
        tested = [*inputs[:tests], *results]
        return found + _loop(params["cond_jaxpr"].jaxpr, tested, tests, 0, loops, loops)[0], results
    if name == "cond":
        ways = [products(branch.jaxpr, inputs[1:], loops) for branch in params["branches"]]
        results = [NOTHING.union(*each) for each in zip(*(out for _, out in ways), strict=True)]
        return max((found for found, _ in ways), key=Counter.total), results
    if name == "pallas_call":
        return Counter({(joined[0], joined[0]): params["cost_estimate"].flops}), joined
    inner = subprograms(params)
    if name == "shard_map":  # a program of every device
        found, results = products(inner[0], inputs, loops)
        return Counter({pair: params["mesh"].size * n for pair, n in found.items()}), results
    if name in CALLS:
        return products(inner[0], inputs, loops)
    if any(count_traced(program, loops) for program in inner):
        raise NotImplementedError(f"cannot count the products inside the operation {name!r}")
    return Counter(), joined


def _loop(
    body: Any, inputs: list[Origin], consts: int, carry: int, times: int, loops: int
) -> tuple[Products, list[Origin]]:
    """Return the products of a loop over (constants, carry, rows), and the origins of its results.

    What an iteration adds to the carry's origins, the next one reads.
    """
    while True:
        found, results = products(body, inputs, loops)
        state = slice(consts, consts + carry)
        after = [a | b for a, b in zip(inputs[state], results[:carry], strict=True)]
        if after == inputs[state]:
            return Counter({pair: times * n for pair, n in found.items()}), after + results[carry:]
        inputs = [*inputs[:consts], *after, *inputs[consts + carry :]]


def subprograms(params: Mapping[str, Any]) -> list[Any]:
    """Return the programs among an operation's parameters."""
    lists = [v if isinstance(v, list | tuple) else (v,) for v in params.values()]
    kinds = (core.ClosedJaxpr, core.Jaxpr)
    return [getattr(x, "jaxpr", x) for items in lists for x in items if isinstance(x, kinds)]
