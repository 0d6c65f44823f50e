"""Processes, and how a module's gradients are shared between them."""
