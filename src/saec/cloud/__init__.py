"""The cloud service, its backends, and its client."""
