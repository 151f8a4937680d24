"""What is trained of a quantized block: 4-bit codes, and the gains of norms.

Layers compute with codes, and the gains are those that a checkpoint can hold: what is judged is
what will be loaded. What codes are tuned by, and gains in float32, are kept beside them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.pipeline.tuned_codes import Trained, TunedCodes, differing
from ptq.runtime.precision import full_precision
from ptq.runtime.quant_linear import QuantLinear
from ptq.runtime.shared_inputs import Readers

# Largest learning rate of gains, in root mean squares of those of a norm.
GAIN_RATE = 4e-3


@dataclass(frozen=True)
class Gain:
    """The weight of a norm, of the dtype that it is stored in."""

    parameter: nn.Parameter
    trained: Trained
    scale: float  # root mean square at the start
    stored: torch.dtype

    def put(self, value: Tensor) -> None:
        """Compute with ``value`` as it is stored."""
        rounded = value.to(self.stored)
        self.parameter.data = rounded.to(self.parameter.device, self.parameter.dtype)

    @property
    def stored_value(self) -> Tensor:
        """As a checkpoint has it."""
        return self.parameter.detach().to("cpu", self.stored, copy=True)


class TunedBlock:
    """A block whose layers are quantized, and what is trained of it.

    It listens to its layers (:class:`ptq.runtime.gradients.Listener`) inside :meth:`learning`.

    Attributes:
        layers: those that are tuned, by their names within the block.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        codes: Mapping[str, TunedCodes],
        stored: Callable[[str], torch.dtype | None],
        trained: Callable[[Tensor], Trained],
    ) -> None:
        """Take what ``module`` computes with as the start.

        Args:
            codes: of the layers of ``module`` to tune, by their names within the block.
            stored: the dtype that a parameter has in a checkpoint, by its name within the block, or
                None: it is not stored under its name, and stays.
            trained: makes a tensor one that is trained.
        """
        self.name, self.module = name, module
        linears = {n: m for n, m in module.named_modules() if isinstance(m, QuantLinear)}
        self._codes = dict(codes)
        self.layers = {n: code.layer for n, code in codes.items()}
        self._names = {layer: n for n, layer in self.layers.items()}
        self._before = {n: layer.weight_packed for n, layer in self.layers.items()}
        self.gains: dict[str, Gain] = {}
        for n, parameter in module.named_parameters():
            norm = parameter.ndim == 1 and n.rpartition(".")[2] == "weight"
            if norm and (dtype := stored(n)) is not None:
                wide = parameter.detach().float()
                scale = float(wide.square().mean().sqrt())
                self.gains[n] = Gain(parameter, trained(wide), scale, dtype)
        self._gradients: dict[str, Tensor] = {}
        self._read: tuple[Tensor, int, object, Tensor] | None = None
        self._kinds = {layer: _kind(layer) for layer in linears.values()}
        self._together = [list(group) for group in _alike(linears.values()).values()]
        for layer in linears.values():
            layer.cache = False
        for group in self._together:
            Readers(group)
        self._settle()

    def _settle(self) -> None:
        """Layers that read the same share what is made of it while nothing is learnt."""
        for group in self._together:
            readers = group[0].readers
            assert readers is not None  # made above
            readers[0].freeze(group)

    # What layers tell.

    def inputs(self, layer: QuantLinear, x: Tensor) -> Tensor:
        """``layer.prepared(x)``, made once for layers that make the same of the same ``x``."""
        kind, read = self._kinds[layer], self._read
        if read is None or read[0] is not x or read[1:3] != (x._version, kind):
            made = layer.prepared(x)
            assert isinstance(made, Tensor)  # no kernels are prepared
            self._read = read = (x, x._version, kind, made)
        return read[3]

    def gradient(self, layer: QuantLinear, rows: Tensor, inputs: Tensor) -> None:
        """Add to the derivative by the layer's weight, rotated as its codes are."""
        name = self._names.get(layer)
        if name is None:
            return
        with full_precision(rows.device):
            if name in self._gradients:
                self._gradients[name].addmm_(rows.T, inputs)
            else:
                self._gradients[name] = rows.T @ inputs

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Derivatives of what runs in here are gathered, for :meth:`update`."""
        for layer in self.layers.values():
            layer.listener = self
        for gain in self.gains.values():
            gain.parameter.requires_grad_(True)
        try:
            yield
        finally:
            self._read = None
            for layer in self.layers.values():
                layer.listener = None
            for gain in self.gains.values():
                gain.parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Take a step of ``rate`` times the largest learning rates, and drop the derivatives. What
        no token reached, as experts may be, stays."""
        for name, code in self._codes.items():
            gradient = self._gradients.pop(name, None)
            if gradient is not None:
                code.step(gradient, rate)
        for gain in self.gains.values():
            gradient, gain.parameter.grad = gain.parameter.grad, None
            if gradient is not None:
                step = rate * GAIN_RATE * gain.scale
                gain.put(gain.trained.step(gradient.float(), step))
        self._settle()

    # What can be kept.

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """What a checkpoint holds of what is trained, on the CPU: ``weight_packed`` of layers and
        gains, by their names within the block."""
        packed = {f"{n}.weight_packed": layer.weight_packed for n, layer in self.layers.items()}
        gains = {name: gain.stored_value for name, gain in self.gains.items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in packed.items()} | gains

    def changed(self) -> int:
        """How many codes are not those of the start."""
        return sum(differing(layer, self._before[n]) for n, layer in self.layers.items())

    @property
    def weights(self) -> int:
        """How many codes are trained."""
        return sum(layer.in_features * layer.out_features for layer in self.layers.values())

    def state(self) -> dict[str, Tensor]:
        """All that training needs to go on."""
        everything = self._codes | {name: gain.trained for name, gain in self.gains.items()}
        return {
            f"{name}:{part}": tensor
            for name, trained in everything.items()
            for part, tensor in trained.state().items()
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""

        def parts(name: str, of: tuple[str, ...]) -> dict[str, Tensor]:
            return {part: state[f"{name}:{part}"] for part in of}

        for name, code in self._codes.items():
            code.restore(parts(name, code.PARTS))
        for name, gain in self.gains.items():
            gain.put(gain.trained.restore(parts(name, Trained.PARTS)))
        self._settle()


def _kind(layer: QuantLinear) -> tuple[object, ...]:
    """What decides what a layer makes of its inputs."""
    scale = layer.input_scale
    t = None if scale is None else float(scale)
    made_by = layer.in_features, layer.format.name, layer.rotation.size
    return *made_by, layer.quantize_inputs, layer.input_rule, t


def _alike(layers: Iterable[QuantLinear]) -> dict[object, list[QuantLinear]]:
    """Layers that would make the same of the same inputs."""
    groups: dict[object, list[QuantLinear]] = {}
    for layer in layers:
        groups.setdefault(_kind(layer), []).append(layer)
    return groups
