"""Vision-language models: prompts, answers, the registry, loading, deciding."""
