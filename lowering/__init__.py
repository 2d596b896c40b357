"""Converted graph in, runnable program out: one module a backend."""
