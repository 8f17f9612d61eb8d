"""The settings of a run: one tree of dataclasses, one field per setting.

Where a default comes from is said beside it: "paper" is SAGE-GRPO (arXiv 2603.21872), "model" is HunyuanVideo-1.5,
"PyTorch" its AdamW, "ours" a choice of this project.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

ContextBackend = Literal["auto", "ulysses", "allgather", "te_p2p", "te_a2a", "te_a2a+p2p"]
SdeType = Literal["sage_grpo", "dance_grpo", "flow_grpo", "cps", "cps_unnormalized"]


@dataclass
class ModelConfig:
    """Where the policy comes from."""

    pretrained: str = ""  # directory in the diffusers layout: transformer/config.json, vae/, text_encoder/
    weights: str | None = None  # Megatron checkpoint directory (made by `convert hf-to-megatron`); required


@dataclass
class ParallelConfig:
    """How the model is spread; Megatron's own names (`tensor_model_parallel_size`, ...) are accepted too."""

    tensor: int = 1  # ranks that share each layer (TP)
    sequence: bool = True  # Megatron sequence parallelism; has no effect where tensor = 1
    context: int = 1  # ranks that share the video tokens (CP)
    context_backend: ContextBackend = "auto"  # attention over CP; auto: ulysses where heads / tensor divide by context
    hierarchical_context: list[int] | None = None  # for te_a2a+p2p: ranks of the inner all-to-all, of the outer ring
    pipeline: int = 1  # pipeline stages (PP), of any number of blocks each
    virtual_pipeline: int | None = None  # chunks of each stage: Megatron's interleaved schedule; None: one
    pipeline_layout: str | None = None  # blocks of each stage, e.g. "Et*13|t*14|t*14|t*13L"; None: balanced
    data: int | None = None  # model replicas (DP); None: as many as the world size gives


@dataclass
class PrecisionConfig:
    """Number formats, memory against recomputation, CPU threads."""

    dtype: Literal["fp32", "bf16"] = "bf16"  # weights and activations of a forward; the optimizer keeps fp32 (paper)
    fp8: Literal["none", "e4m3", "hybrid"] = "none"  # number format of the blocks' GEMMs by Transformer Engine; hybrid:
    # e4m3 forward, e5m2 for gradients. Needs dtype bf16 and a GPU (ours)
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"  # how scales are chosen; delayed
    # keeps a history and is frozen between a rollout and its first update; mxfp8 needs Blackwell (ours)
    fp8_first_bf16: int = 0  # blocks at the beginning of the model that stay bf16 (ours)
    fp8_last_bf16: int = 0  # blocks at its end that stay bf16 (ours)
    recompute: Literal["none", "selective", "full"] = "none"  # activation recomputation in the backward
    compile: bool = False  # torch.compile of norms, modulation, gates and RoPE: one kernel each, fp32 inside (ours)
    threads: int | None = None  # CPU threads of each process; None: PyTorch's or OMP_NUM_THREADS' choice


@dataclass
class VideoConfig:
    """What is generated. The VAE compresses 4x in time (first frame apart) and 16x in height and width."""

    frames: int = 81  # 4n + 1 (paper)
    height: int = 480  # pixels, a multiple of 16 (paper: 480p)
    width: int = 848  # pixels, a multiple of 16 (paper: 480p)
    fps: float = 24.0  # frames a second, of the written files and for the reward (model)


@dataclass
class VaeConfig:
    """The VAE, which turns latents into the videos that are scored."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: precision.dtype on a GPU, fp32 on a CPU (ours)
    tiling: bool = True  # videos of more than 256 pixels in blended tiles, as diffusers' and the official examples do;
    # untiled, the VAE's attention mask alone takes 2.2 GB at 480x848x81 and 11.4 GB at 720x1280x81 in bf16 (model)


@dataclass
class EncodersConfig:
    """The text and image encoders, which run before training and are released."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: precision.dtype, on any device, so that embeddings
    # made on one machine are found on another (ours)


@dataclass
class SdeWindowConfig:
    """Noise, log-probabilities and training in a window of the steps only; the others run as ode (MixGRPO)."""

    size: int | None = None  # steps of the window, counted among those with noise; null: all of them, no window
    strategy: Literal["fixed", "random", "progressive"] = "progressive"  # how it moves from iteration to iteration
    start: int = 0  # first step of its first position; `fixed` stays there (MixGRPO)
    stride: int = 1  # steps between two positions (MixGRPO)
    interval: int = 1  # iterations at one position, for `progressive` (ours; MixGRPO: 25)


@dataclass
class SamplerConfig:
    """The rollout's sampler."""

    sde_type: SdeType = "sage_grpo"  # transition rule of a stochastic step (paper)
    num_steps: int = 20  # denoising steps of a rollout (paper)
    shift: float = 5.0  # timestep shift of the schedule (model: 5 for 480p)
    eta: float = 0.5  # scale of the injected noise (paper)
    guidance_scale: float = 6.0  # classifier-free guidance; 1 runs the conditional branch alone (model)
    micro_batch: int = 1  # samples of one group in one forward, in the rollout and in training alike (ours)
    latent_dtype: Literal["fp32", "bf16"] = "fp32"  # of the kept latents; they are rounded before they are scored
    offload_trajectories: bool = False  # let latents and velocities wait in host memory until training needs them
    sde_window: SdeWindowConfig = field(default_factory=SdeWindowConfig)


@dataclass
class GrpoConfig:
    """Group-relative policy optimisation."""

    group_size: int = 4  # samples of one prompt (paper)
    prompts_per_iteration: int = 1  # prompts of an iteration over all model replicas (ours)
    updates_per_rollout: int = 1  # optimizer steps into which a rollout's (sample, step) pairs are split (paper)
    clip_range: float = 1e-4  # of the ratio; so small because log-probabilities are means over elements (paper)
    advantage_clip: float = 5.0  # advantages are clamped to +- this (paper's implementation)
    equalizer: bool = True  # temporal gradient equalizer (paper)
    timestep_permutation: bool = True  # visit the pairs in random order, the same on every rank (paper)
    cfg_in_training: Literal["on", "off", "distilled"] = "on"  # both branches trained; no guidance in rollout or
    # training; or rollout with guidance, conditional branch trained (paper: on). Has no effect at guidance_scale 1.
    replay_batch: int = 1  # (micro-batch, step) pairs of one prompt in one training forward: speed for memory (ours)
    allow_clip_below_floor: bool = False  # train even if clip_range is below the measured noise of the ratio (ours)


@dataclass
class KlConfig:
    """Trust region: weights of the dual KL and the controller of its common factor lambda."""

    strategy: Literal["none", "fixed", "step", "moving", "dual"] = "dual"  # reference: none, initial model, policy of
    # the rollout, moving anchor, or both a position reference and the policy of the rollout (paper: dual)
    position: Literal["moving", "fixed", "both"] = "moving"  # dual's position reference; both: moving, and the initial
    # model with a weight of its own (paper: dual moving)
    phase: Literal["rollout", "training"] = "rollout"  # when its velocities are computed: once, or before each update
    position_weight: float = 1.0  # dual: weight of the KL to the position reference (paper)
    initial_weight: float = 0.0  # position=both: weight of the KL to the initial model; 0 only measures it (ours)
    velocity_weight: float = 0.1  # dual: weight of the KL to the policy that made the rollout (paper)
    anchor_interval: int = 10  # optimizer steps between two refreshes of the anchor (paper)
    anchor_placement: Literal["host", "device"] = "host"  # where a reference's weights wait: in (pinned) host memory,
    # streamed through the device block by block, or whole on the device: faster, for a second copy of the shard (ours)
    anchor_sharded: bool = False  # host: split them over the CP·DP ranks that hold the same shard; gathered when used
    step_kl: Literal["logprob", "closed_form"] = "logprob"  # estimator of the velocity KL (paper: eq. 15)
    schedule: Literal["fixed", "two_stage", "milder"] = "two_stage"  # lambda_max throughout; warm-up, then feedback;
    # or warm-up alone (paper)
    lambda_min: float = 1e-7  # lower bound of lambda, start of the warm-up (paper)
    lambda_max: float | None = None  # upper bound of lambda, end of the warm-up; null: 1e-5 (paper), milder: 1e-6
    warmup_steps: int = 20  # optimizer steps from lambda_min to lambda_max (ours)
    window: int = 10  # number of last KL values whose mean is fed back (ours)
    target: float = 1e-4  # KL, per latent element, that the feedback aims at (ours: the order of the clip range)
    gain: float = 0.1  # proportional gain k_p of the feedback (ours)
    feedback: Literal["relax", "tighten"] = "relax"  # a KL above target lowers lambda (paper: A.6), or raises it (PPO)


@dataclass
class MoreReward:
    """One further reward of a run, an item of `reward.more`."""

    function: str = ""  # import path "module:name"; required
    settings: dict[str, Any] = field(default_factory=dict)  # keyword arguments of its class


@dataclass
class RewardConfig:
    """What is maximised."""

    function: str = "megatron_sage.rewards.shapes:ShapesReward"  # import path "module:name" (ours)
    settings: dict[str, Any] = field(default_factory=dict)  # keyword arguments of that class, e.g. {checkpoint: DIR}
    more: list[MoreReward] = field(default_factory=list)  # further rewards; their dimensions are weighed with the first
    weights: dict[str, float] = field(default_factory=lambda: {"VQ": 0.5, "MQ": 0.5, "TA": 1.0})  # paper: setting B
    watch: str | None = None  # "module:name" of a second reward that is logged and never trained on (ours)
    watch_settings: dict[str, Any] = field(default_factory=dict)  # keyword arguments of that class
    url: str | None = None  # http://HOST:PORT of a `serve-rewards`, which holds all these; null: on the run's own ranks
    token_env: str = "MEGATRON_SAGE_REWARD_TOKEN"  # environment variable with the bearer token of that server
    timeout_seconds: float = 240.0  # for one attempt to get an answer (ours)
    retries: int = 5  # further attempts before the videos count as lost (ours)
    in_flight: int = 2  # parts of a rank's videos that may wait for their answers (ours)
    overlap_groups: int | None = None  # groups of a part: one is scored while the next is denoised; null: all (ours)


@dataclass
class OptimizerConfig:
    """AdamW or Muon through Megatron's optimizer."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, with AdamW for all else (paper: either)
    distributed: bool = False  # fp32 weights and moments split over DP·CP: Megatron's distributed optimizer (ours)
    offload: Literal["none", "hybrid", "deepspeed"] = "none"  # fp32 weights and moments in host memory: Megatron's
    # hybrid optimizer, or DeepSpeed's CPU Adam (extra `deepspeed`) (ours)
    offload_fraction: float = 1.0  # hybrid: part of the parameters whose state is in host memory (ours)
    lr: float = 1e-5  # learning rate, constant after the warm-up (paper)
    warmup_steps: int = 0  # optimizer steps of linear warm-up: Adam's first steps are as large as lr allows (ours)
    weight_decay: float = 0.01  # decoupled (paper)
    beta1: float = 0.9  # decay of the first moment (PyTorch)
    beta2: float = 0.999  # decay of the second moment (PyTorch)
    eps: float = 1e-8  # added to the root of the second moment (PyTorch)
    grad_clip: float = 1.0  # global gradient norm; 0 switches clipping off (paper)
    muon_momentum: float = 0.95  # muon: decay of its momentum, Nesterov (Muon)
    muon_steps: int = 5  # muon: Newton-Schulz iterations (Muon)
    ema_decay: float | None = None  # decay of a moving average of the policy's weights, e.g. 0.999; null: none (ours)
    ema_device: Literal["host", "device"] = "host"  # where the average is kept, in fp32 (ours)
    max_nonfinite: int = 10  # updates skipped for a non-finite gradient, in a row, before the run stops (ours)


@dataclass
class LoraConfig:
    """Low-rank adapters on the blocks' linear layers; everything else is frozen."""

    rank: int | None = None  # null: no adapters, all weights are trained
    alpha: float | None = None  # the update is alpha / rank · B·A; null: rank (PEFT's convention)
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # linear layers of the
    # blocks by diffusers' names; also add_q_proj, add_k_proj, add_v_proj, to_add_out, ff.net.0.proj, ff.net.2,
    # ff_context.net.0.proj, ff_context.net.2, norm1.linear, norm1_context.linear
    export: Literal["separate", "merged"] = "separate"  # adapter file in PEFT's layout, or whole weights


@dataclass
class DataConfig:
    """Prompts and what is kept of their encoding."""

    prompts: str = ""  # .txt (one prompt a line), .csv, .tsv, .jsonl or .parquet (columns prompt, ref_image_path)
    prompt_column: str | None = None  # column of the texts; null: prompt (ours)
    image_column: str | None = None  # column of the first frames' files; null: ref_image_path or a like name (ours)
    skip_unreadable: bool = False  # leave out rows whose image is missing or damaged, counted; false: refuse (ours)
    backend: Literal["auto", "dali", "pillow"] = "auto"  # decoder of images and videos; auto: NVIDIA DALI where there
    # is a GPU and the extra `dali` is installed, else Pillow and PyAV (ours)
    embedding_cache: str | None = None  # directory of encoded prompts; None: inside the run's directory


@dataclass
class TrainingConfig:
    """Length of the run and its checkpoints."""

    iterations: int = 100  # rollouts followed by updates; 0 evaluates the given model and stops (ours)
    save_interval: int = 0  # iterations between two checkpoints; 0: only at the end
    async_save: bool = False  # write checkpoints beside the next iteration, from a copy in host memory (ours)
    keep_last: int | None = None  # newest checkpoints that stay; null: all (ours)
    keep_every: int | None = None  # keep_last: those of every n-th iteration stay as well (ours)
    resume: Literal["no", "auto", "yes"] = "no"  # go on from the newest checkpoint in output_dir; auto: if there is
    # one, else begin (for jobs that are requeued); true and false are yes and no
    stall_seconds: float | None = 1800.0  # silence of a rank in one phase after which all ranks' phases are printed
    # and the run ends; null: never (ours)


@dataclass
class EvaluationConfig:
    """Held-out samples before and after, made from the same noise."""

    prompts: str | None = None  # file of held-out prompts, as for data.prompts; None: no evaluation
    samples_per_prompt: int = 1  # videos of each prompt
    num_steps: int = 40  # denoising steps (paper: 40 in validation)
    videos: int = 8  # how many of them are kept and shown in the report


@dataclass
class LoggingConfig:
    """Where a run's numbers go besides its own files."""

    tensorboard: bool = False  # event files in output_dir/tensorboard (ours)
    wandb: dict[str, Any] | None = None  # Weights & Biases, e.g. {project: sage}; also entity, name, group, job_type,
    # notes, tags; null: not used. Extra `wandb` (ours)
    wandb_mode: Literal["offline", "online"] = "offline"  # offline: files in output_dir/wandb, for `wandb sync` (ours)
    peak_tflops: float | None = None  # dense bf16 peak of one device, for MFU; null: the data sheet's of a known GPU


@dataclass
class Config:
    """A whole run."""

    name: str = "run"  # names the run; stands for {name} in output_dir
    output_dir: str = "runs/{name}"  # everything that the run writes goes here
    seed: int = 0  # of noise, prompt order and permutations
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


LAMBDA_MAX = {"fixed": 1e-5, "two_stage": 1e-5, "milder": 1e-6}  # of each schedule, where kl.lambda_max is null


def lambda_max(kl: KlConfig) -> float:
    """The upper bound of lambda."""
    return LAMBDA_MAX[kl.schedule] if kl.lambda_max is None else kl.lambda_max


def position_references(kl: KlConfig) -> dict[str, str]:
    """What position KLs are measured against: "position" -> "fixed" or "moving", and "initial" -> "fixed" beside it.

    Empty where the strategy has no such term.
    """
    kind = kl.position if kl.strategy == "dual" else kl.strategy
    if kind == "both":
        return {"position": "moving", "initial": "fixed"}
    return {"position": kind} if kind in ("fixed", "moving") else {}


# Megatron's command-line names for the same quantities, so that habits and existing launch scripts carry over.
ALIASES = {
    "parallel.tensor_model_parallel_size": "parallel.tensor",
    "parallel.sequence_parallel": "parallel.sequence",
    "parallel.context_parallel_size": "parallel.context",
    "parallel.hierarchical_context_parallel_sizes": "parallel.hierarchical_context",
    "parallel.pipeline_model_parallel_size": "parallel.pipeline",
    "parallel.virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "parallel.pipeline_model_parallel_layout": "parallel.pipeline_layout",
    "parallel.data_parallel_size": "parallel.data",
}

# Values that a reader of the paper may try: why they are refused, said before the list of what there is.
UNAVAILABLE = {
    ("sampler.sde_type", "ode"): "draws no noise, so there is no log-probability to train on",
    ("precision.dtype", "fp8"): "is the format of GEMMs, not of weights: set precision.fp8 and keep dtype bf16",
}
