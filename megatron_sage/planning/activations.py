"""What a rank keeps for the backward pass of one micro-batch, from what the single process keeps.

Video activations are divided by TP x CP, text activations by TP (with sequence parallelism), both by how many of the
blocks a pipeline stage has. The single process' parts are measured, not assumed: bytes are linear in both token counts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SavedBytes:
    """Of a whole model in one process: a * video tokens + b * text tokens + c, for one branch and sample."""

    per_video_token: float
    per_text_token: float
    constant: float

    @classmethod
    def fit(cls, video: tuple[int, int], text: tuple[int, int], saved: tuple[float, float, float]) -> "SavedBytes":
        """From three measurements: at (video[0], text[0]), (video[1], text[0]) and (video[0], text[1]) tokens."""
        base, more_video, more_text = saved
        a = (more_video - base) / (video[1] - video[0])
        b = (more_text - base) / (text[1] - text[0])
        return cls(a, b, base - a * video[0] - b * text[0])

    def on_rank(
        self, video_tokens: int, text_tokens: int, tensor: int = 1, context: int = 1, share_of_blocks: float = 1.0
    ) -> float:
        """Bytes of a rank of a layout with sequence parallelism; `share_of_blocks`: of its pipeline stage."""
        video = self.per_video_token * video_tokens / (tensor * context)
        return share_of_blocks * (video + self.per_text_token * text_tokens / tensor + self.constant)
