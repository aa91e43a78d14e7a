"""Fine-tuning: rows, the training loop, checkpoints, parity gates."""
