"""The stages' own files. Each has `parts(setting, **options)`: by name, functions that give figures or raise."""
