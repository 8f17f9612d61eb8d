"""What a long run says of itself: phases, throughput, stragglers, logs, TensorBoard, W&B, one-line status."""
