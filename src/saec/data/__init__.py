"""Readers, builders, leak-proof splits and manifests."""
