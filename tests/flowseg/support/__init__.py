"""Helpers that several test files of the stack share."""
