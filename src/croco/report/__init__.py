"""What a run found, for people: one self-contained page, and the same tables as Markdown."""
