"""What a run shows of itself: progress on the terminal, videos, and a self-contained page."""
