"""Files that are not plain Hugging Face checkpoints: GGUF, and GPTQ or AWQ weights. Their codes stay as they are; nothing is widened."""
