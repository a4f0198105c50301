"""Probes: what models do, measured beside what chance would do."""
