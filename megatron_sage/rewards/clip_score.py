"""CLIPScore and PickScore of a video: how well its frames and its prompt agree to a CLIP model.

Both are means over uniformly sampled frames f with image embedding e_f and text embedding t:

    CLIPScore = mean of scale · max(cos(e_f, t), 0)      scale 2.5: Hessel et al., arXiv 2104.08718, in [0, 2.5]
    PickScore = mean of exp(logit_scale) · cos(e_f, t) / divisor      Kirstain et al., arXiv 2305.01569; / 26 brings
                                                                      it near 1, as reward code usually has it

Papers seldom say which scale they mean: the SAGE-GRPO paper's CLIPScore of 0.54 fits 2.5 · 0.216 as well as a logit
100 · 0.162 / 30, and its PickScore of 0.74 fits 100 · 0.192 / 26. So the plain mean of the cosine is a dimension of
its own (`CLIPScore_cosine`, `PickScore_cosine`): compare that one.
"""

import json
import warnings
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
from megatron_sage.rewards.model import (
    DTYPES,
    check_count,
    check_dtype,
    default_device,
    on_device,
    reason,
    tokenizer,
)
from megatron_sage.rewards.protocol import check_inputs

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class _Preprocessor:
    """Hugging Face's CLIPImageProcessor: shorter side to `size`, bicubic, centre crop, normalisation."""

    size: int
    crop: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> float32 [F, 3, height, width]."""
        height, width = frames.shape[1:3]
        short = min(height, width)
        x_F3HW = pictures.resized(frames, int(self.size * height / short), int(self.size * width / short))
        top, left = ((have - want) // 2 for have, want in zip(x_F3HW.shape[-2:], self.crop, strict=True))
        x_F3HW = x_F3HW[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return pictures.normalized(x_F3HW, self.mean, self.std)


class _ClipReward:
    """A CLIP model, its tokenizer and its picture size; the cosines of a video's frames with its prompt."""

    def __init__(
        self,
        model: str,
        processor: str | None,
        frames: int,
        device: torch.device | str | None,
        dtype: str,
        resident: bool,
    ) -> None:
        _check(model, processor, frames, dtype)
        self.place, self.frames, self.resident = Path(model), frames, resident
        self.device, self.dtype = default_device(device), DTYPES[dtype]
        self.preprocessor = _preprocessor(Path(processor or model) / PREPROCESSOR)
        self.tokenizer = tokenizer(Path(processor or model))
        self.model = _load(self.place, self.dtype)
        self.length = self.model.config.text_config.max_position_embeddings
        self.truncated = 0  # prompts that were longer than `length` tokens, so far
        image = self.model.config.vision_config.image_size
        if self.preprocessor.crop != (image, image):
            crop = " x ".join(map(str, self.preprocessor.crop))
            raise UserError(f"{processor or model}: {PREPROCESSOR} gives pictures of {crop}, the model takes {image}")
        if resident:
            self.model.to(self.device)

    @classmethod
    def check_run(cls, video: VideoConfig, /, model: str, processor: str | None = None, **others: Any) -> None:
        """Directories and settings, without loading the model."""
        _check(model, processor, others.get("frames", 1), others.get("dtype", "fp32"))
        _preprocessor(Path(processor or model) / PREPROCESSOR)
        for name in ("scale", "divisor"):
            _positive(name, others.get(name, 1.0))

    def _cosines(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> list[np.ndarray]:
        """For each video the cosine of every sampled frame, float64 [F]."""
        check_inputs(videos, prompts, fps)
        with on_device(self.model, self.device, self.resident), torch.no_grad():
            return [self._cosine(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    def _cosine(self, video: np.ndarray, prompt: str) -> np.ndarray:
        chosen = video[pictures.uniform(len(video), min(self.frames, len(video)))]
        pixels_F3HW = self.preprocessor(chosen).to(self.device, self.dtype)
        image_FD = self.model.get_image_features(pixel_values=pixels_F3HW).pooler_output.float()
        text_1D = self.model.get_text_features(**self._tokens(prompt)).pooler_output.float()
        return torch.nn.functional.cosine_similarity(image_FD, text_1D).double().cpu().numpy()

    def _tokens(self, prompt: str) -> dict[str, torch.Tensor]:
        """The prompt's tokens, cut to the model's length: CLIP reads no more, so long prompts are judged by a part."""
        if len(self.tokenizer(prompt)["input_ids"]) > self.length:
            if self.truncated == 0:
                warnings.warn(
                    f"{type(self).__name__}: {self.place} reads {self.length} tokens of a prompt, the rest of "
                    f"{prompt!r} is not scored; further ones are counted in `truncated`",
                    stacklevel=2,
                )
            self.truncated += 1
        found = self.tokenizer([prompt], truncation=True, max_length=self.length, return_tensors="pt")
        return {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}


class CLIPScore(_ClipReward):
    """Mean of scale · max(cos, 0) over frames, and the mean cosine."""

    dimensions: tuple[str, ...] = ("CLIPScore", "CLIPScore_cosine")

    def __init__(
        self,
        model: str,
        frames: int = 8,
        scale: float = 2.5,
        processor: str | None = None,
        device: torch.device | str | None = None,
        dtype: str = "fp32",
        resident: bool = True,
    ) -> None:
        """`model`: directory of a CLIPModel, e.g. openai/clip-vit-large-patch14; `processor`: that of its tokenizer
        and preprocessor_config.json where these are not in it; `frames` looked at, all of a shorter video; `resident`:
        false lets the weights wait in host memory between two calls.
        """
        super().__init__(model, processor, frames, device, dtype, resident)
        self.scale = _positive("scale", scale)

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Scores of n clips uint8 [F, H, W, 3], float64 [n]."""
        cosines = self._cosines(videos, prompts, fps)
        scores = [(self.scale * np.maximum(cos_F, 0).mean(), cos_F.mean()) for cos_F in cosines]
        return dict(zip(self.dimensions, np.array(scores).reshape(-1, 2).T, strict=True))


class PickScore(_ClipReward):
    """Mean of exp(logit_scale) · cos / divisor over frames, and the mean cosine."""

    dimensions: tuple[str, ...] = ("PickScore", "PickScore_cosine")

    def __init__(
        self,
        model: str,
        frames: int = 8,
        divisor: float = 26.0,
        processor: str | None = None,
        device: torch.device | str | None = None,
        dtype: str = "fp32",
        resident: bool = True,
    ) -> None:
        """`model`: directory of yuvalkirstain/PickScore_v1; the others as in `CLIPScore`."""
        super().__init__(model, processor, frames, device, dtype, resident)
        self.scale = self.model.logit_scale.double().exp().item() / _positive("divisor", divisor)

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Scores of n clips uint8 [F, H, W, 3], float64 [n]."""
        means = np.array([cos_F.mean() for cos_F in self._cosines(videos, prompts, fps)])
        return dict(zip(self.dimensions, (self.scale * means, means), strict=True))


def _check(model: str, processor: str | None, frames: int, dtype: str) -> None:
    check_count("frames", frames)
    check_dtype(dtype)
    for key, place, needed in (("model", model, [CONFIG]), ("processor", processor or model, [PREPROCESSOR])):
        if not Path(place).is_dir():
            raise UserError(f"{key}={place}: no such directory; fetch the model and name it")
        for name in needed:
            if not (Path(place) / name).is_file():
                raise UserError(f"{key}={place}: has no {name}; name the directory that holds it")
    content = _json(Path(model) / CONFIG)
    if content.get("model_type") != "clip":
        raise UserError(f"{model}/{CONFIG}: model_type={content.get('model_type')}: expected clip")


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < np.inf:
        raise UserError(f"{name}={value}: expected a number above 0")
    return float(value)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {reason(error)}; fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object; fetch it again")
    return content


def _preprocessor(file: Path) -> _Preprocessor:
    content = _json(file)
    for key, wanted in {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": BICUBIC}.items():
        if content.get(key, wanted) != wanted:
            raise UserError(f"{file}: {key}={content[key]}: only {wanted} is supported")
    size, crop = content.get("size", 224), content.get("crop_size", 224)
    shortest: Any = size.get("shortest_edge") if isinstance(size, dict) else size
    sides: list[Any] = [crop.get("height"), crop.get("width")] if isinstance(crop, dict) else [crop, crop]
    if not all(type(side) is int and side > 0 for side in (shortest, *sides)) or max(sides) > shortest:
        raise UserError(f"{file}: size={size}, crop_size={crop}: a shortest edge and a crop within it are supported")
    mean, std = content.get("image_mean", pictures.CLIP_MEAN), content.get("image_std", pictures.CLIP_STD)
    for key, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, (list, tuple)) or [type(v) for v in values] != [float] * 3:
            raise UserError(f"{file}: {key}={values}: expected three numbers")
    return _Preprocessor(shortest, (sides[0], sides[1]), tuple(mean), tuple(std))


def _load(place: Path, dtype: torch.dtype) -> Any:
    """The CLIPModel of a directory; every weight must be there and have its place."""
    from transformers import CLIPModel

    try:
        with no_progress_bar():
            model, account = CLIPModel.from_pretrained(
                place, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # safetensors, pickle and transformers have none in common
        raise UserError(f"{place}: its weights cannot be read: {reason(error)}; fetch them again") from error
    unknown = {key for key in account["unexpected_keys"] if not key.endswith("position_ids")}  # old files hold a range
    for keys, what in ((set(account["missing_keys"]), "missing"), (unknown, "unknown")):
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(f"{place}: {len(keys)} keys {what} ({first}): not the weights of the CLIPModel of {CONFIG}")
    return model.eval().requires_grad_(False)
