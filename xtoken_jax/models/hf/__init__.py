"""Hugging Face folders: families, config.json and safetensors, read and written."""
