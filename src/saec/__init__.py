"""SAEC: edge-cloud industrial visual inspection with a multimodal LLM."""

__version__ = "0.1.0"
