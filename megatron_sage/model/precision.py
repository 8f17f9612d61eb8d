"""FP8 GEMMs of the blocks: which layers run in it, what they are padded to, and when their weights are quantised.

The law is one quantisation: rollout, reference pass and training multiply the same quantised weights, or the ratio does
not begin at 1. A recipe without history casts the same weights to the same numbers whenever it is asked, so its weights
are cast at the first forward behind an update and kept. The delayed recipe takes its scales from a history: here they
move in `Quantisation.after_update` and nowhere else, so that they are frozen from a rollout to the optimizer step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.parallel.sequence import pad_tokens

DELAYED = "delayed"
FP8_MAX = {"e4m3": 448.0, "e5m2": 57344.0}


def runs_fp8(config: HunyuanVideoConfig, block: int) -> bool:
    """Whether the block, by its number in the whole model, runs in FP8: the first and last may stay bf16."""
    return config.fp8 is not None and config.fp8_first_bf16 <= block < config.num_layers - config.fp8_last_bf16


def gradient_format(config: HunyuanVideoConfig) -> str:
    """The number format of gradients; everything else is e4m3."""
    return "e5m2" if config.fp8 == "hybrid" else "e4m3"


def real_rows(x: torch.Tensor, valid: int) -> torch.Tensor:
    """`x` with all rows (tokens) from `valid` on set to zero.

    A padding token is worth nothing, but it is not zero: biases and norms make something of it. In the amax of a
    tensor it would decide over the scale of the real ones.
    """
    return x if valid == x.shape[0] else pad_tokens(x[:valid], x.shape[0])


def padded(size: int, multiple: int) -> int:
    """`size` rounded up."""
    return -(-size // multiple) * multiple


class QuantisedLinear:
    """What Megatron's column- and row-parallel linears get in addition where their GEMMs run in FP8. A mixin.

    Features are padded with zeros to what the kernels take: outputs behind `super().forward` are cut again, parameters
    (and with them checkpoints, optimizer and gradients) keep their shapes. Subclasses pad the weight they multiply.

    The context of the GEMM is entered here, for each one, and not around a block: activation recompute runs parts of a
    block again, outside of whatever surrounded it the first time.
    """

    config: HunyuanVideoConfig
    weight: torch.nn.Parameter
    runs_fp8 = False
    calibrating = False
    cast_due = True  # the next forward casts the weight, later ones use what is kept
    cast_of: int | None = None  # where the weight lay that is kept
    get_extra_state = torch.nn.Module.get_extra_state

    def set_extra_state(self, state: Any) -> None:
        """Scales are part of a run's state and saved there (`Quantisation.state_dict`); in the weights' state_dict they
        would be keys that the same model without FP8 does not have.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)  # or torch would miss it
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    @property
    def is_first_microbatch(self) -> bool:
        """Megatron's word for `cast_due`; its forward takes it back."""
        return self.cast_due

    @is_first_microbatch.setter
    def is_first_microbatch(self, first: bool) -> None:
        # Megatron's schedules say True at the beginning of every update. Here the rollout has cast these weights
        # already; `Quantisation` knows when they change.
        if not first:
            self.cast_due = False

    def gemm(self) -> AbstractContextManager[Any]:
        """Inside, the linear's forward runs in FP8."""
        raise NotImplementedError

    def scaling(self) -> dict[str, torch.Tensor]:
        """The delayed recipe's state, by name, the tensors themselves: `forward.scale` [3] (input, weight, output),
        `backward.scale` [2] (gradients of output and input), `*.amax_history` [length, 3 or 2].
        """
        raise NotImplementedError

    @property
    def cache(self) -> bool:
        """Whether a quantised weight is kept for the next forward."""
        raise NotImplementedError

    @cache.setter
    def cache(self, keep: bool) -> None:
        raise NotImplementedError

    @staticmethod
    def roll(layers: Sequence[Any]) -> None:
        """Delayed: the collected amaxes enter the histories, and scales follow. MAX over Megatron's amax group, all
        ranks that hold the same layers (TP x CP x DP): they must go on with the same scales. All of them call.
        """
        raise NotImplementedError

    def forward(self, x_SBI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's linears: (output [S', B, O], bias where it is not added)."""
        if not self.runs_fp8:
            return super().forward(x_SBI)  # type: ignore[misc]
        if self.calibrating:
            return self._observed(x_SBI)
        if self.cache and self.cast_of != self.weight.data_ptr():  # another tensor was put in the parameter's place
            self.cast_due, self.cast_of = True, self.weight.data_ptr()
        out_features, in_features = self.weight.shape
        x_SBI = F.pad(x_SBI, (0, padded(in_features, self.config.fp8_alignment) - in_features))
        with self.gemm():
            out, bias = super().forward(x_SBI)  # type: ignore[misc]
        return out[..., :out_features], None if bias is None else bias[:out_features]

    def _observed(self, x_SBI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In the weights' own precision; the largest input, weight and output gradient are remembered."""
        seen = self.seen
        seen[0] = torch.maximum(seen[0], amax(x_SBI.detach()))
        seen[1] = torch.maximum(seen[1], amax(self.weight.detach()))
        out, bias = super().forward(x_SBI)  # type: ignore[misc]

        def see_gradient(grad: torch.Tensor) -> None:
            seen[2] = torch.maximum(seen[2], amax(grad))

        if out.requires_grad:
            out.register_hook(see_gradient)
        return out, bias

    @contextmanager
    def observing(self) -> Iterator[torch.Tensor]:
        """Inside, forwards are calibrating ones; yields what they find: [3] of input, weight, output gradient."""
        self.seen = torch.zeros(3, device=self.weight.device)
        self.calibrating = True
        try:
            yield self.seen
        finally:
            self.calibrating = False


def amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in fp32; 0 of nothing."""
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


class Quantisation:
    """The FP8 layers of this rank's chunks. It keeps nothing itself but whether they are calibrated."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = chunks
        config: Any = chunks[0].config if chunks else None
        self.delayed = config is not None and config.fp8 is not None and config.fp8_recipe == DELAYED
        self.gradient_max = FP8_MAX[gradient_format(config)] if config is not None else 0.0
        self.calibrated = self.gradients_calibrated = not self.delayed

    @property
    def layers(self) -> dict[str, QuantisedLinear]:
        """Number of the chunk and name in it -> layer that runs in FP8."""
        return {
            f"{number}.{name}": module
            for number, chunk in enumerate(self.chunks)
            for name, module in chunk.named_modules()
            if isinstance(module, QuantisedLinear) and module.runs_fp8
        }

    def after_update(self) -> None:
        """The weights have changed: the next forward quantises them. Delayed: histories and scales move on.

        All ranks call; the delayed recipe reduces amaxes (MAX over TP x CP x DP) here.
        """
        layers = list(self.layers.values())
        if self.delayed and layers:
            type(layers[0]).roll(layers)
        self.weights_changed()

    def weights_changed(self) -> None:
        """The next forward quantises the weights again, by the scales that there are."""
        for layer in self.layers.values():
            layer.cast_due = True

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Inside, the parameters hold something else than the policy (a reference, an average of weights).

        Each forward quantises the weights that it finds, with the policy's scales where those come from a history: a
        reference that equals the policy is then quantised to the same numbers, and their KL is 0. Behind the block
        the policy's quantised weights and histories are what they were.
        """
        layers = list(self.layers.values())
        flags = [(layer.cast_due, layer.cache) for layer in layers]
        for layer in layers:
            layer.cache = False
        try:
            with self.histories_kept():
                yield
        finally:
            for layer, (due, cache) in zip(layers, flags, strict=True):
                layer.cast_due, layer.cache = due, cache

    @contextmanager
    def histories_kept(self) -> Iterator[None]:
        """Delayed: what is collected inside is forgotten."""
        layers = list(self.layers.values()) if self.delayed else []
        states = [{name: x.clone() for name, x in layer.scaling().items()} for layer in layers]
        try:
            yield
        finally:
            for layer, state in zip(layers, states, strict=True):
                for name, x in layer.scaling().items():
                    x.copy_(state[name])

    def calibrate(self, run: Callable[[], Any], group: dist.ProcessGroup) -> None:
        """Delayed: scales of inputs and weights from one run in the weights' own precision, once.

        Transformer Engine begins with 1 and learns from what it has quantised by that. `group`: MAX over the ranks
        that hold the same layers. All ranks call.
        """
        if not self.calibrated:
            self.calibrated = True
            for layer, (x, weight, _) in self._observed(run, group):
                scale = layer.scaling()["forward.scale"]
                _set_scale(scale, 0, FP8_MAX["e4m3"], x)
                _set_scale(scale, 1, FP8_MAX["e4m3"], weight)
            self.weights_changed()

    def calibrate_gradients(self, run: Callable[[], Any], group: dist.ProcessGroup) -> None:
        """The same of gradients, from forwards and backwards. By a scale of 1 those of this loss, 1e-6 and less, would
        all become 0, in every layer behind the last as well, and the histories would never see another number.
        """
        if not self.gradients_calibrated:
            self.gradients_calibrated = True
            for layer, (_, _, grad) in self._observed(run, group):
                _set_scale(layer.scaling()["backward.scale"], 0, self.gradient_max, grad)
            self.weights_changed()

    def _observed(self, run: Callable[[], Any], group: dist.ProcessGroup) -> list[tuple[QuantisedLinear, torch.Tensor]]:
        """Each layer with the largest input, weight and output gradient of `run`."""
        layers = list(self.layers.values())
        with ExitStack() as stack:
            seen = [stack.enter_context(layer.observing()) for layer in layers]
            run()
        if not layers:  # of this stage: then the ranks of its group have none either
            return []
        largest = torch.stack(seen)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return list(zip(layers, largest, strict=True))

    def state_dict(self, group: dist.ProcessGroup) -> dict[str, list[Any]]:
        """Delayed: all stages' histories and scales as plain numbers, on every rank. All ranks call.

        `group` = PP: the stages have different layers; ranks of one stage have the same numbers behind an update.
        """
        if not self.delayed:
            return {}
        mine = {
            f"{name.partition('.')[2]}.{part}": x.tolist()
            for name, layer in self.layers.items()
            for part, x in layer.scaling().items()
        }
        every: list[Any] = [None] * group.size()
        dist.all_gather_object(every, mine, group=group)
        return {name: value for stage in every for name, value in stage.items()}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Take over this rank's part. UserError where the run was another one's."""
        if not self.delayed:
            return
        for name, layer in self.layers.items():
            for part, x in layer.scaling().items():
                key = f"{name.partition('.')[2]}.{part}"
                if key not in state:
                    raise UserError(
                        f"precision.fp8_recipe=delayed: the checkpoint has no {key}: resume with the precision that "
                        "it was saved with, or start anew"
                    )
                x.copy_(torch.tensor(state[key]))
        self.calibrated = self.gradients_calibrated = True
        self.weights_changed()


def _set_scale(scale: torch.Tensor, place: int, largest: float, seen: torch.Tensor) -> None:
    """scale = largest / amax; a tensor that was never seen, or is all zero, keeps its own."""
    if float(seen) > 0:
        scale[place] = largest / seen
