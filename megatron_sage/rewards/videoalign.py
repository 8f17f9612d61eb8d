"""VideoAlign (VideoReward, arXiv 2501.13918): visual quality, motion quality and text alignment by a Qwen2-VL.

A video is sampled at 2 frames a second, shown to the model with a question that holds one special token for each
dimension, and a linear head reads the score at each of these tokens. What the original leaves implicit and what
changes scores without an error is an argument or a check here: the frame rate, the positions, the keys of the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sage.config.schema import VideoConfig
from megatron_sage.errors import UserError
from megatron_sage.reporting.progress import no_progress_bar
from megatron_sage.rewards import frames as pictures
from megatron_sage.rewards import videoalign_checkpoint as checkpoint_files
from megatron_sage.rewards.model import (
    DTYPES,
    check_count,
    check_dtype,
    default_device,
    on_device,
    tokenizer,
)
from megatron_sage.rewards.protocol import check_inputs
from megatron_sage.rewards.videoalign_prompt import REWARD_TOKENS, VIDEO_TOKEN, conversation


@dataclass(frozen=True)
class _Sample:
    """One video with its question."""

    ids_L: torch.Tensor  # int64
    patches_PD: torch.Tensor  # float32
    grid: list[int]  # patches in time, height, width


class VideoAlign:
    """Scores VQ, MQ and TA, normalised by the statistics of the model's training videos."""

    dimensions: tuple[str, ...] = checkpoint_files.DIMENSIONS

    def __init__(
        self,
        checkpoint: str,
        base: str | None = None,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        batch: int = 1,
        normalize: bool = True,
        mrope: bool = False,
        resident: bool = True,
        h264_round_trip: bool = False,
    ) -> None:
        """Loads the model, which takes 4.4 GB in bf16.

        checkpoint: released directory (model_config.json, checkpoint-N/model.pth); base: directory of
        Qwen2-VL-2B-Instruct with config.json and the tokenizer, where `checkpoint` has none; dtype: fp32 or bf16,
        null: bf16 on a GPU, fp32 on a CPU; batch: videos of one forward; normalize: false gives the head's own
        numbers; mrope: Qwen2-VL's three-dimensional positions instead of the plain ones that the released weights
        were trained with; resident: false lets the weights wait in host memory between two calls; h264_round_trip:
        compress each clip first, as programs do that hand over mp4 files.
        """
        check_dtype(dtype)
        check_count("batch", batch)
        directory = Path(checkpoint)
        self.settings = checkpoint_files.read_settings(directory)
        place = checkpoint_files.base_directory(directory, base, self.settings)
        self.device = default_device(device)
        self.dtype = DTYPES[dtype or ("fp32" if self.device.type == "cpu" else "bf16")]
        self.batch, self.normalize, self.mrope, self.resident = batch, normalize, mrope, resident
        self.h264_round_trip = h264_round_trip
        self.tokenizer = _tokenizer(place)
        self.tokens = {t: self.tokenizer.convert_tokens_to_ids(t) for t in (*REWARD_TOKENS, VIDEO_TOKEN)}
        self.model, self.head, self.account = _load(
            directory, place, self.settings, len(self.tokenizer), self.tokens[VIDEO_TOKEN], self.dtype
        )
        if resident:
            self.model.to(self.device)

    @classmethod
    def check_run(cls, video: VideoConfig, /, checkpoint: str, base: str | None = None, **others: Any) -> None:
        """What can be known without loading the model: settings, files, and that such a clip can be looked at."""
        check_dtype(others.get("dtype"))
        check_count("batch", others.get("batch", 1))
        settings = checkpoint_files.read_settings(Path(checkpoint))
        checkpoint_files.weights_file(Path(checkpoint))
        checkpoint_files.base_directory(Path(checkpoint), base, settings)
        _number(settings, video.frames, video.fps)
        pictures.smart_size(video.height, video.width, 28, pictures.VIDEO_MIN_PIXELS, settings.max_pixels)

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Score n uint8 clips [F, H, W, 3] at `fps` frames a second: {"VQ", "MQ", "TA"}, float64 [n]."""
        check_inputs(videos, prompts, fps)
        rows = np.empty((len(videos), len(self.dimensions)))
        with on_device(self.model, self.device, self.resident):
            for start in range(0, len(videos), self.batch):
                chosen = slice(start, start + self.batch)
                pairs = zip(videos[chosen], prompts[chosen], strict=True)
                rows[chosen] = self._scores([self._sample(video, prompt, fps) for video, prompt in pairs])
        if self.normalize:
            mean, std = np.array([self.settings.statistics[name] for name in self.dimensions]).T
            rows = (rows - mean) / std
        return dict(zip(self.dimensions, rows.T, strict=True))

    def _sample(self, video: np.ndarray, prompt: str, fps: float) -> _Sample:
        if self.h264_round_trip:
            from megatron_sage.rewards.h264 import round_trip

            video = round_trip(video, fps)
        vision = self.model.config.vision_config
        total, height, width, _ = video.shape
        chosen = video[pictures.uniform(total, _number(self.settings, total, fps))]
        factor = vision.patch_size * vision.spatial_merge_size
        size = pictures.smart_size(height, width, factor, pictures.VIDEO_MIN_PIXELS, self.settings.max_pixels)
        x_F3HW = pictures.normalized(pictures.resized(chosen, *size))
        patches_PD, grid = pictures.patches(
            x_F3HW, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        )
        return _Sample(self._ids(prompt, len(patches_PD) // vision.spatial_merge_size**2), patches_PD, grid)

    def _ids(self, prompt: str, video_tokens: int) -> torch.Tensor:
        """Token numbers [L] of the question about a video of so many tokens."""
        ids = torch.tensor(self.tokenizer(conversation(prompt))["input_ids"])
        special = [int(i) for i in ids if int(i) in self.tokens.values()]
        if special != [self.tokens[t] for t in (VIDEO_TOKEN, *REWARD_TOKENS)]:
            raise UserError(f"prompt {prompt!r}: holds one of the model's special tokens; take it out of the text")
        place = int((ids == self.tokens[VIDEO_TOKEN]).nonzero())
        return torch.cat([ids[:place], ids.new_full((video_tokens,), self.tokens[VIDEO_TOKEN]), ids[place + 1 :]])

    @torch.no_grad()
    def _scores(self, samples: list[_Sample]) -> np.ndarray:
        """The head's numbers float64 [B, 3]."""
        ids_BL = torch.nn.utils.rnn.pad_sequence(
            [sample.ids_L for sample in samples], batch_first=True, padding_value=self.tokenizer.pad_token_id
        ).to(self.device)
        lengths_B1 = torch.tensor([[len(sample.ids_L)] for sample in samples], device=self.device)
        places_L = torch.arange(ids_BL.shape[1], device=self.device)
        positions: dict[str, Any] = {"position_ids": places_L.expand(3, *ids_BL.shape)}
        if self.mrope:
            positions = {"mm_token_type_ids": (ids_BL == self.tokens[VIDEO_TOKEN]).int() * 2}
        hidden_BLD = self.model(
            input_ids=ids_BL,
            attention_mask=(places_L < lengths_B1).long(),
            pixel_values_videos=torch.cat([sample.patches_PD for sample in samples]).to(self.device, self.dtype),
            video_grid_thw=torch.tensor([sample.grid for sample in samples], device=self.device),
            use_cache=False,
            **positions,
        ).last_hidden_state
        asked_BL = torch.isin(ids_BL, torch.tensor([self.tokens[t] for t in REWARD_TOKENS], device=self.device))
        hidden_B3D = hidden_BLD[asked_BL].view(len(samples), len(REWARD_TOKENS), -1)
        # in float32: the original's bf16 head rounds scores to 2 or 3 digits, so that samples of a group tie
        out_B3N = hidden_B3D.float() @ self.head.to(self.device).T
        out_B3 = out_B3N[..., 0] if self.settings.output_dim == 1 else out_B3N.diagonal(dim1=1, dim2=2)
        return out_B3.double().cpu().numpy()


def _number(settings: checkpoint_files.Settings, total: int, fps: float) -> int:
    """How many frames of a clip are looked at."""
    number = pictures.sampled_number(total, fps, settings.fps)
    if settings.num_frames is None:
        return number
    fixed = round(settings.num_frames / 2) * 2
    if not 2 <= fixed <= total:
        raise UserError(f"a clip of {total} frames: {checkpoint_files.CONFIG} asks for {fixed} of them, at least 2")
    return fixed


def _tokenizer(place: Path) -> Any:
    """Qwen2-VL's tokenizer with the three reward tokens after its own, as in training."""
    found = tokenizer(place, padding_side="right")
    if found.convert_tokens_to_ids(VIDEO_TOKEN) in (None, found.unk_token_id):
        raise UserError(f"{place}: its tokenizer has no {VIDEO_TOKEN}; name a directory of Qwen2-VL as base")
    found.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    return found


def _load(
    directory: Path, place: Path, settings: checkpoint_files.Settings, words: int, video_token: int, dtype: torch.dtype
) -> tuple[Any, torch.Tensor, checkpoint_files.Account]:
    """The model without a language head, the reward head float32 [N, D], and the account of the file's keys."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig.from_pretrained(place, local_files_only=True)
    config.text_config.vocab_size = words  # the embedding was cut to the tokenizer's size when tokens were added
    if config.video_token_id != video_token:
        raise UserError(f"{place}: config.json has video_token_id={config.video_token_id}, its tokenizer {video_token}")
    shapes, linears = outline(config, settings.output_dim)
    file = checkpoint_files.weights_file(directory)
    state = checkpoint_files.read_state(file)
    state, account = checkpoint_files.merged(file, state, shapes, linears, settings.lora, dtype)
    head = state.pop("rm_head.weight").float()
    options: dict[str, Any] = {"config": config, "state_dict": state, "attn_implementation": "sdpa"}
    with no_progress_bar():
        model = Qwen2VLModel.from_pretrained(None, dtype=dtype, **options)
    # `to` after loading rounds the rotary frequencies as well: the original does so, in training too
    return model.to(dtype).eval().requires_grad_(False), head, account


def outline(config: Any, output_dim: int) -> tuple[dict[str, torch.Size], list[str]]:
    """Shapes of all weights that a Qwen2VLConfig and a reward head make, and the names of the linear layers."""
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        model = Qwen2VLModel(config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    shapes["rm_head.weight"] = torch.Size([output_dim, config.text_config.hidden_size])
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return shapes, [*linears, "lm_head", "rm_head"]
