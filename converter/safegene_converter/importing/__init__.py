"""Adapters of other tools and other times, made plain: one safetensors file and PEFT's configuration."""
