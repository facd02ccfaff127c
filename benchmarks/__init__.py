"""Measurements behind every performance number in the docs; results in ``results/*.json``."""
