"""From checkpoints to ONNX graphs: decoder, vision tower, embeddings. Needs ``saec[export]``; no torch."""
