"""Running an exported VLM with ONNX Runtime: fixed KV cache, generation, prefix cache. No torch."""
