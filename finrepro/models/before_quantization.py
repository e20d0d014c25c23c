"""The first stage of methods that start from a layer's weight in full precision (PiSSA, LoftQ),
before it is quantized.

An adapter may define `prepare(name, weight, quantized, config, seed) -> (weight, state)` for the
layers that its `target_modules` name. The streaming loader calls it for each of them while the
weight is in memory, puts the returned weight in its place, and quantizes that; `state`, named small
tensors, is passed to the adapter's `apply`. Both stages run in one process, so that neither can be
forgotten and at most one block of the model is in full precision at a time.
"""

from typing import Any

import torch
from torch import Tensor

from finrepro.catalogue.spec import RunSpec
from finrepro.contracts import Prepare
from finrepro.kinds import adapter_of, quantizer_of
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.sizes.shapes import targeted

State = dict[str, Tensor]


class FirstStage:
    """Prepares a cell's layers, one at a time, and collects their states: `prepared`, layer ->
    state, on the CPU.

    At ZeRO-3 a block is not sharded yet when it comes here, and all ranks compute the same.
    """

    def __init__(self, spec: RunSpec, model: Any, prepare: Prepare) -> None:
        self._prepare, self._quantizer, self._seed = (
            prepare,
            quantizer_of(spec.quantizer),
            spec.seed,
        )
        self._model = model
        self._names = set(targeted(linear_layers(model), spec.adapter.config.target_modules))
        self.prepared: dict[str, State] = {}

    @torch.no_grad()
    def __call__(self, name: str) -> None:
        """Replace, in place, the weight of the linear layer of this name, which is not quantized
        yet; a layer that the adapter does not target is left alone.

        The method sees (out, in) in float32, whatever the layer's orientation and dtype.
        """
        if name not in self._names:
            return
        layer = self._model.get_submodule(name)
        stored = layer.weight.detach()
        weight = (stored.T if is_conv1d(layer) else stored).float().contiguous()

        def quantized(matrix: Tensor) -> Tensor:
            """This weight rounded to the layer's dtype, encoded and decoded again, in float32."""
            encoded = self._quantizer.encode(matrix.to(stored.dtype).contiguous())
            return self._quantizer.decode(encoded).float()

        new, state = self._prepare(name, weight, quantized, self._seed)
        stored.copy_(new.T if is_conv1d(layer) else new)
        self.prepared[name] = {key: tensor.cpu() for key, tensor in state.items()}


def first_stage(spec: RunSpec, model: Any) -> FirstStage | None:
    """The first stage of a cell's adapter for its `model`, None where the method has none."""
    prepare = adapter_of(spec.adapter).prepare
    return None if prepare is None else FirstStage(spec, model, prepare)
