"""A page in the browser that asks a model: python -m xsam.demo."""
