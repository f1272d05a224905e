"""Tokens in, tokens out: the engine. No Flask, no text."""
