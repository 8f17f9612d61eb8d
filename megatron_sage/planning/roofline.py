"""What bounds each phase of an iteration: operations and bytes by formula over the peaks of a data sheet.

Estimated, and never compared with a GPU: bytes of device memory take every kernel's operands to be read and written
once, unfused, and nothing to stay in a cache between two kernels. Peaks are peaks: no kernel reaches them.
"""

import copy
from dataclasses import dataclass
from typing import Any

from megatron_sage.config.schema import Config
from megatron_sage.planning.estimate import TILES, Estimate, step_bytes
from megatron_sage.planning.flops import Text
from megatron_sage.planning.machine import Gpu
from megatron_sage.planning.plan import Layout, Plan, evaluate, places_of
from megatron_sage.planning.sizes import Count, chunk_counts
from megatron_sage.planning.traffic import MASTER, Place
from megatron_sage.planning.workload import Workload

DECODE_BYTES = 9.2e4  # a pixel: inputs and outputs of every operator of the VAE's decoder in bf16, on the meta device
# VideoAlign, one video of 81 frames at 24 frames a second: 6 sampled frames of at most 200,704 pixels are 3,072 patches
# through 0.67e9 parameters of the image encoder, and 768 of their tokens with some 250 of text through 1.54e9.
REWARD_FLOPS = 2 * (0.67e9 * 3072 + 1.54e9 * 1018)
REWARD_BYTES = 2 * (0.67e9 + 1.54e9)  # its weights, once
ADAM_FLOPS = 15  # an element, about
# Tensors of a token that one block's kernels read and write, forward: of H channels and this rank's own tokens (two
# norms, two gated sums); of H channels and gathered tokens (into qkv and fc1, out of proj and fc2); of H / TP channels
# (out of qkv, head norms and rotation, attention, into proj); and likewise of the MLP's inner width / TP (out of fc1,
# through the activation, into fc2).
LOCAL, GATHERED, HEADS, INNER = 2 * 2 + 2 * 3, 4, 3 + 4 + 4 + 1, 4


@dataclass(frozen=True)
class Use:
    """Of one phase of an iteration, on one rank."""

    phase: str
    flops: float
    device_bytes: float
    nvlink_bytes: float
    network_bytes: float
    host_bytes: float
    disk_bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte of device memory."""
        return self.flops / self.device_bytes if self.device_bytes else 0.0

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """The least that each resource takes at its peak."""
        return {
            "compute": self.flops / gpu.bf16_flops,
            "memory": self.device_bytes / gpu.memory_bandwidth,
            "NVLink": self.nvlink_bytes / gpu.nvlink_bandwidth,
            "network": self.network_bytes / gpu.network_bandwidth,
            "host": self.host_bytes / gpu.host_bandwidth,
            "disk": self.disk_bytes / (gpu.assumptions.disk_bandwidth / gpu.gpus_per_node),
        }

    def bound(self, gpu: Gpu) -> str:
        """The resource that takes longest."""
        seconds = self.seconds(gpu)
        return max(seconds, key=lambda name: seconds[name])


def uses(config: Config, transformer: dict[str, Any], gpus: int, gpu: Gpu, texts: tuple[Text, Text]) -> list[Use]:
    """Of every phase at the configured layout on `gpus` GPUs. Raises UserError where it breaks a rule."""
    config, parallel = copy.deepcopy(config), config.parallel
    data = gpus // (parallel.tensor * parallel.context * parallel.pipeline)
    config.parallel.data = data
    layout = Layout(parallel.tensor, parallel.context, parallel.pipeline, data, parallel.sequence)
    found = evaluate(config, Plan(config, gpu, gpus, transformer, texts), layout)
    work = Workload.of(config, data, *texts)
    places = places_of(config, transformer)
    return [_use(name, found, config, places, work) for name in found.phases]


def _use(name: str, found: Estimate, config: Config, places: list[Place], work: Workload) -> Use:
    phase = found.phases[name]
    video, stages = config.video, [sum(chunk_counts(p.config, p.stage, p.lora), Count()) for p in places]
    pixels = video.frames * video.height * video.width
    videos = -(-work.flights * work.batch // _replica(places[0]))  # of the rank that decodes most
    flops = phase.flops
    if name in ("rollout", "reference"):
        texts = work.rollout_texts if name == "rollout" else work.training_texts
        number = work.flights * work.steps if name == "rollout" else work.pairs * len(work.references)
        device = number * max(sum(forward_bytes(place, text.total) for text in texts) for place in places)
    elif name == "train":
        device = max(_training_bytes(place, count, work) for place, count in zip(places, stages, strict=True))
    elif name == "decode":
        device = DECODE_BYTES * pixels * videos * (TILES if config.vae.tiling else 1.0)
    elif name == "reward":
        flops, device = REWARD_FLOPS * videos, REWARD_BYTES * videos
    elif name == "optimizer":
        steps = [step_bytes(config, place, count) for place, count in zip(places, stages, strict=True)]
        device = work.updates * max(steps)
        split = places[0].data * places[0].config.context_parallel_size if places[0].distributed else 1
        flops += work.updates * ADAM_FLOPS * max(count.trained for count in stages) / split
    else:  # the copy that is written, spread over the iterations between two of them
        saves = 1 / max(1, config.training.save_interval)
        return Use(name, 0.0, phase.host_bytes * saves, 0.0, 0.0, phase.host_bytes * saves, phase.disk_bytes * saves)
    return Use(name, flops, device, phase.nvlink_bytes, phase.network_bytes, phase.host_bytes, phase.disk_bytes)


def forward_bytes(place: Place, text: int, batch: int | None = None) -> float:
    """Device memory of one forward of one branch: activations of the blocks, and their weights once."""
    config, batch = place.config, place.batch if batch is None else batch
    tokens = place.context_tokens + place.text_tokens(text)
    row, tensor = batch * config.hidden_size * place.element, config.tensor_model_parallel_size
    widths = LOCAL / place.split + GATHERED + (HEADS + INNER * config.ffn_hidden_size / config.hidden_size) / tensor
    blocks = sum(len(chunk) for chunk in config.stage_blocks[place.stage])
    weights = sum(count.elements for count in chunk_counts(config, place.stage, place.lora)) * place.element
    return blocks * tokens * row * widths + weights


def _training_bytes(place: Place, count: Count, work: Workload) -> float:
    """Forward, what recomputation repeats, a backward of twice the forward; gradients added up in fp32."""
    again = {"full": 1.0, "selective": 0.5}.get(place.config.recompute_granularity or "", 0.0)
    batch = place.batch * work.replay
    branches = sum(forward_bytes(place, text.total, batch) for text in work.training_texts)
    number = work.forwards_of_update * work.updates
    return number * (branches * (3 + again) + len(work.training_texts) * 2 * MASTER * count.trained)


def _replica(place: Place) -> int:
    config = place.config
    return config.tensor_model_parallel_size * config.context_parallel_size * len(config.stage_blocks)
