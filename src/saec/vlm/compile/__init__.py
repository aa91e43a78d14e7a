"""Compiling exported graphs for devices: QNN context binaries, AI Hub, optimised ONNX models."""
