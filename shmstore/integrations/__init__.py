"""Stores inside other people's servers."""
