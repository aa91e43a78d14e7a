"""The pure decision function and the streaming pipeline."""
