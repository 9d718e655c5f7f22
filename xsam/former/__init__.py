"""Modules of version 0.1 under their former names, for code that was written for them."""
