"""Behavioural probes: skills, policy neighborhoods, active routes and self-verification. Import the module that you need."""
