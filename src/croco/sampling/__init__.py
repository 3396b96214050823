"""Completions: chat templates, seeds, the shared-prefix decoder and the sample stage."""
