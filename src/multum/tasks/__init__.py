"""One file, one task, named as Hugging Face pipelines name it."""
