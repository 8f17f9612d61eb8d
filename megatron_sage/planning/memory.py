"""Bytes that a rank needs, on its device and in its host memory: what stays, and what each phase adds.

Sizes are those that the allocator is asked for; what it keeps besides, and CUDA's and NCCL's own memory, is the GPU
file's `usable_memory`.
"""

from dataclasses import dataclass, field

from megatron_sage.config.schema import Config
from megatron_sage.planning.machine import Assumptions
from megatron_sage.planning.saved import in_flight, latent_dtype_bytes, saved_by_chunks
from megatron_sage.planning.sizes import Count, chunk_counts, chunk_parts, part_counts
from megatron_sage.planning.traffic import Place, buffer_elements
from megatron_sage.planning.workload import LATENT, Workload
from megatron_sage.planning.workspace import backward_workspace, forward_workspace, gathered_bytes

MASTER = 4
KEPT_PROMPTS = 64  # of engine.Prompts
PHASES = ("rollout", "decode", "reward", "reference", "train", "optimizer", "save")
VAE_PARAMETERS = 1_260_634_115  # AutoencoderKLHunyuanVideo15 of the released model


@dataclass
class Memory:
    """Of one rank. `device` and `host` stay for the whole run; `phases[name]` is on the device in that phase."""

    device: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def static(self) -> float:
        """Bytes that are always on the device."""
        return sum(self.device.values())

    def of_phase(self, phase: str) -> float:
        """All on the device in a phase, at its peak."""
        return self.static + sum(self.phases.get(phase, {}).values())

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that needs most, and its bytes."""
        return max(((phase, self.of_phase(phase)) for phase in PHASES), key=lambda found: found[1])


def rank_memory(config: Config, place: Place, work: Workload, assumed: Assumptions) -> Memory:
    """Of a rank of `place`'s stage (CP rank 0, which has most real tokens)."""
    memory = Memory()
    counts = sum(chunk_counts(place.config, place.stage, place.lora), Count())
    _weights(config, place, counts, memory)
    _optimizer(config, place, counts, memory)
    _references(config, place, work, counts, memory)
    memory.device["text_embeddings"] = min(work.prompts, KEPT_PROMPTS) * _embedding_bytes(place, work)
    memory.device["vae"] = VAE_PARAMETERS * {"auto": place.element, "fp32": 4}.get(config.vae.dtype, 2)
    memory.device["reward_model"] = assumed.reward_model_bytes
    trajectories = _trajectories(config, place, work)
    if config.sampler.offload_trajectories:
        memory.host["trajectories"] = sum(trajectories.values())
        trajectories = {}
    for phase in ("rollout", "decode", "reward", "reference", "train"):
        memory.phases[phase] = {k: v for k, v in trajectories.items() if k != "references" or phase == "train"}
    _forwards(config, place, work, memory, trajectories)
    memory.phases["decode"]["vae_activations"] = assumed.decode_bytes_per_pixel * _pixels(config)
    memory.phases["optimizer"] = {"temporaries": _step_temporaries(config, place, counts, assumed)}
    memory.phases["save"] = {}
    if config.training.async_save:
        memory.host["save_copy"] = save_bytes(config, place, counts)
    return memory


def _embedding_bytes(place: Place, work: Workload) -> float:
    """Of one prompt on every rank; the empty prompt's is one for all."""
    text, config = work.training_texts[0], place.config
    elements = text.qwen * config.text_embed_dim + text.glyph * config.text_embed_2_dim
    return float((elements + text.image * config.image_embed_dim) * place.element)


def save_bytes(config: Config, place: Place, counts: Count) -> float:
    """Of a checkpoint, this rank's part: weights of one replica, optimizer and average over all of them."""
    replicas = place.data * place.config.context_parallel_size
    state = optimizer_bytes_per_replica(config, place, counts) + counts.trained * (
        MASTER if config.optimizer.ema_decay is not None else 0
    )
    return (counts.elements * place.element + state) / replicas


def optimizer_bytes_per_replica(config: Config, place: Place, counts: Count) -> float:
    """Masters and moments of all parameters that the rank trains, before they are split."""
    master = MASTER if place.element < MASTER else 0
    if config.optimizer.name == "muon":
        return counts.matrices * (master + MASTER) + (counts.trained - counts.matrices) * (master + 2 * MASTER)
    if config.optimizer.offload != "none":
        master = MASTER  # the hybrid optimizer has masters for fp32 weights too
    return counts.trained * (master + 2 * MASTER)


def _weights(config: Config, place: Place, counts: Count, memory: Memory) -> None:
    buffers = sum(buffer_elements(place))
    frozen = counts.elements - counts.trained
    memory.device["parameters"] = place.element * (frozen + (buffers if place.distributed else counts.trained))
    memory.device["gradients"] = MASTER * buffers
    if place.config.fp8 is not None:
        # Transformer Engine's quantised weights and their transposes
        memory.device["fp8_weights"] = 2.0 * part_counts(place.config)["block"].matrices * _num_blocks(place)
    if config.optimizer.ema_decay is not None:
        where = memory.host if config.optimizer.ema_device == "host" else memory.device
        where["ema"] = MASTER * counts.trained


def _num_blocks(place: Place) -> int:
    return sum(len(blocks) for blocks in place.config.stage_blocks[place.stage])


def _optimizer(config: Config, place: Place, counts: Count, memory: Memory) -> None:
    state = optimizer_bytes_per_replica(config, place, counts)
    if place.distributed:
        state /= place.data * place.config.context_parallel_size
    if config.optimizer.offload == "none":
        memory.device["optimizer"] = state
        return
    fraction = config.optimizer.offload_fraction
    memory.host["optimizer"] = fraction * state
    # gradients on their way to the host optimizer, pinned
    memory.host["gradients"] = fraction * state * MASTER / (3 * MASTER)
    memory.device["optimizer"] = (1 - fraction) * state


def _references(config: Config, place: Place, work: Workload, counts: Count, memory: Memory) -> None:
    kept = work.streamed_references * counts.trained * place.element
    if config.kl.anchor_placement == "device":
        memory.device["anchor"] = kept
    elif kept:
        split = place.data * place.config.context_parallel_size if config.kl.anchor_sharded else 1
        memory.host["anchor"] = kept / split


def _trajectories(config: Config, place: Place, work: Workload) -> dict[str, float]:
    """Latents on the first and the last stage, velocities on the last."""
    stages = len(place.config.stage_blocks)
    first, last = place.stage == 0, place.stage == stages - 1
    whole, found = float(work.flights * work.latent_bytes(place)), {}
    if first or last:
        found["latents"] = whole * work.kept * latent_dtype_bytes(config.sampler.latent_dtype) / LATENT
    if last and work.keeps_velocity:
        found["velocities"] = whole * work.trained
    if last and work.references:
        pairs = work.trained if not work.reference_in_training else work.pairs_of_update / max(1, work.flights)
        found["references"] = whole * pairs * len(work.references)
    return found


def _forwards(config: Config, place: Place, work: Workload, memory: Memory, trajectories: dict[str, float]) -> None:
    """Activations and the buffers of forwards, with and without a gradient."""
    longest = max(text.total for text in (*work.rollout_texts, *work.training_texts))
    forward = forward_workspace(place, longest)
    memory.phases["rollout"]["workspace"] = memory.phases["reference"]["workspace"] = forward
    if "references" in trajectories:
        memory.phases["reference"]["references"] = trajectories["references"]
    if work.streamed_references and config.kl.anchor_placement == "host":
        memory.phases["reference"]["anchor_slots"] = _slots(place)
    whole = work.replayed(place)
    saved = saved_by_chunks(whole, work.training_texts)
    held = in_flight(place.config, place.stage, work.forwards_of_update)
    train = memory.phases["train"]
    train["activations"] = sum(bytes_ * number for bytes_, number in zip(saved, held, strict=True))
    train["workspace"] = backward_workspace(whole, longest)
    memory.device["gather_buffer"] = gathered_bytes(whole, longest)  # Megatron keeps it from its first use on
    memory.device["rotation"] = work.video_tokens * float(place.config.kv_channels or 0) / 2 * 8  # complex64


def _slots(place: Place) -> float:
    """Two blocks, and what is in no block."""
    found = [chunk_parts(place.config, place.stage, n, place.lora) for n in range(len(place.config.stage_blocks[0]))]
    parts = part_counts(place.config, place.lora)
    block = max(parts["block"].trained if _num_blocks(place) > 1 else 0, parts["last"].trained)
    return place.element * (2 * block + sum(rest.trained for _, rest in found))


def _step_temporaries(config: Config, place: Place, counts: Count, assumed: Assumptions) -> float:
    if config.optimizer.name == "muon":
        # one matrix whole in fp32 and, three times, in the model's type
        return counts.largest * place.config.tensor_model_parallel_size * (2 * MASTER + 3 * place.element)
    if assumed.fused_adam or config.optimizer.offload != "none":
        return 0.0
    split = place.data * place.config.context_parallel_size if place.distributed else 1
    return MASTER * counts.trained / split  # torch's AdamW makes the root of the second moments


def _pixels(config: Config) -> int:
    return config.video.frames * config.video.height * config.video.width
