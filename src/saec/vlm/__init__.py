"""Vision-language models: prompts, answers, the registry, loading, deciding."""

import logging

# Where it is installed, PEFT imports it, and on some CPUs it then warns that an optional kernel package is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
