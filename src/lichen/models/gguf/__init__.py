"""Writes and reads language models as GGUF, the file that llama.cpp runs."""
