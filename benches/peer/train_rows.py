"""Rows of a train step: forward, backward, clipping and AdamW in float32."""

from collections.abc import Callable
from typing import Any

import jax
import torch

from benches.peer.case import Case
from benches.peer.measure import Options, alternate, summary, timed
from benches.peer.torch_layers import tensor
from benches.peer.torch_model import Model, Tensors, optimizer
from vadapter.distributed.compile import jit
from vadapter.recipe.optim import OptimConfig

LARGEST_DIFFERENCE = 1e-4  # of the losses in nats, beyond which the sides do different things


class OurSteps:
    """Train steps of a stage, compiled as for a run; a call returns the loss."""

    def __init__(self, case: Case):
        self.case, self.stage = case, case.open()
        self.batch = case.batch(self.stage)
        self._state, self._frozen = case.parameters(self.stage)
        self._arrays = jax.device_put(self.batch)
        lowered = self.stage.jit_train_step(jit=jit).lower(self._state, self._frozen, self._arrays)
        self._step, self.compile_seconds = timed(lowered.compile)

    def params(self) -> dict[str, Any]:
        """Return the parameters of every component, on the host."""
        return jax.tree.map(jax.device_get, self._state.params | self._frozen)

    def __call__(self) -> float:
        self._state, metrics = self._step(self._state, self._frozen, self._arrays)
        return float(jax.block_until_ready(metrics)["loss"])


class TorchSteps:
    """Train steps of a torch model; a call returns the loss."""

    def __init__(self, model: Model, optim: OptimConfig, batch: Tensors):
        self.model, self.clip, self.batch = model, optim.clip, batch
        self.encode: Callable[..., Any] = model.encode
        self.loss: Callable[..., Any] = model.forward
        self.optimizer = optimizer(model, optim)
        self.trained = [values for values in model.parameters() if values.requires_grad]

    def compiled(self) -> "TorchSteps":
        """Return the same steps, on the same parameters, by `torch.compile`."""
        other = object.__new__(TorchSteps)
        other.__dict__ = self.__dict__ | {
            "encode": torch.compile(self.model.encode), "loss": torch.compile(self.model.forward),
        }  # fmt: skip
        return other

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.batch, self.encode(self.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        return float(loss.detach())


def measure(
    options: Options, *, recipe: str, stage: str, features: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return the times of a train step of a stage beside torch, eager and compiled; the losses.

    Raises:
      ValueError: the losses of the two sides differ at the first or second step.
    """
    ours = OurSteps(Case(recipe, stage, features))
    model = Model(ours.stage.adapter_model, ours.params(), ours.stage.trained)
    tensors = {key: tensor(value) for key, value in ours.batch.items()}
    theirs = TorchSteps(model, ours.stage.config.optim, tensors)
    losses = [(ours(), theirs()) for _ in range(2)]
    difference = max(abs(a - b) for a, b in losses)
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"losses differ by {difference:.2g} (ours and torch's: {losses}): the sides do "
            "different things, whose times must not be compared"
        )
    compile_seconds = {"ours": ours.compile_seconds}
    sides: dict[str, Callable[[], Any]] = {"ours": ours, "torch": theirs}
    if options.compiled:
        sides["torch.compile"] = steps = theirs.compiled()
        compile_seconds["torch.compile"] = timed(lambda: (steps(), steps()))[1]
    return {
        "what": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{len(ours.batch['id'])} rows",
        "same": f"losses to {difference:.0e}",
        "sides": summary(alternate(sides, options.rounds)),
        "compile_seconds": compile_seconds,
    }
