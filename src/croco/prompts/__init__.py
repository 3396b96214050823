"""Prompts: read and checked (`load.py`)."""
