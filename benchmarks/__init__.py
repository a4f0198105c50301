"""Measurements of time and memory; nothing here is imported by the library."""
