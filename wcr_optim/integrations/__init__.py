"""Callbacks for training frameworks, each a module of its own that imports its framework."""
