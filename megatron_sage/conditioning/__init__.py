"""Text conditioning and the video codec: what surrounds the transformer."""
